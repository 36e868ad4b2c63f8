"""Likelihood over folders of prepared data, the rows spread over Ray actors.

A folder's (row, draw) pairs are cut into parts whose number depends on the data alone, and the parts' sums are added
in order: the result is the same, bit by bit, for any number of actors.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch
from jaxtyping import Float64, Int, UInt

from pipeline import storage
from pipeline.data.manifest import Manifest, differences
from pipeline.data.shards import ShardReader
from pipeline.errors import DataError
from pipeline.logs import Progress
from pipeline.metrics import likelihood
from pipeline.metrics.likelihood import Estimator, Likelihood
from pipeline.models import model_folder
from pipeline.reports.measures import Group, Measure
from pipeline.runtime.actors import Resources, in_order, own_device, started

log = logging.getLogger(__name__)

_PARTS = 64  # of a folder's batches, at most


@dataclass(frozen=True)
class Corpus:
    """A folder of prepared data whose validation split is judged.

    Attributes:
        key: in the metrics' names.
    """

    key: str
    path: str
    manifest: Manifest


@dataclass(frozen=True)
class Draws:
    """How rows are hidden; what `masked_batches` wants to know."""

    estimator: Estimator
    draws: int
    seed: int
    eps: float
    bos: bool
    batch: int


def open_corpora(paths: Sequence[str]) -> list[Corpus]:
    """The folders of `evaluation.data`.

    Raises:
        DataError: one has no complete data.
    """
    places = [storage.resolve(path).rstrip("/") for path in paths]
    names = [re.sub(r"[^\w.-]", "_", place.rpartition("/")[2]) for place in places]
    keys = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    return [
        Corpus(f"zero_shot/{key}", place, Manifest.read(place))
        for key, place in zip(keys, places, strict=True)
    ]


def check_fits(corpus: Corpus, facts: model_folder.DataFacts, tokenizer_hash: str) -> None:
    """Refuse rows that mean something else than the model's.

    Args:
        facts: of the model.
        tokenizer_hash: of the tokenizer that the model was trained with.

    Raises:
        DataError: every field that differs, or a validation split without rows.
    """
    manifest = corpus.manifest
    pairs = {
        "length": (manifest.length, facts.length),
        "vocabulary": (manifest.vocabulary, facts.vocab_size),
        "bos": (manifest.special.bos, facts.bos),
        "tokenizer (hash)": (manifest.tokenizer.hash[:12], tokenizer_hash[:12]),
    }
    if lines := differences(pairs, "model"):
        head = f"evaluation: the model cannot read {corpus.path} (tokenizer {manifest.tokenizer.name!r}):"
        raise DataError("\n".join([head, *lines]))
    if not manifest.rows("validation"):
        raise DataError(f"evaluation: {corpus.path} has no validation rows; expected at least one")


def held_out_rows(corpus: Corpus, numbers: Int[np.ndarray, "R"]) -> UInt[np.ndarray, "R L"]:
    """Validation rows by number."""
    return ShardReader(corpus.path, corpus.manifest, "validation").rows(numbers)


@dataclass(frozen=True)
class Case:
    """A likelihood that is asked for.

    Attributes:
        model: consolidated folder that every node can read.
        rows: which validation rows.
        labelled: whether the model is conditioned on the rows' labels.
    """

    model: str
    corpus: Corpus
    rows: Int[np.ndarray, "R"]
    labelled: bool
    how: Draws

    @property
    def parts(self) -> int:
        """Tasks that it is cut into."""
        return min(_PARTS, -(-len(self.rows) * self.how.draws // self.how.batch))


class _LikelihoodActor:
    """One actor: the model that it was asked for last, on its device."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._device = own_device()
        self._model = ""

    def sums(
        self,
        model: str,
        tokens: UInt[np.ndarray, "R L"],
        labels: Int[np.ndarray, "R"] | None,
        how: Draws,
        part: int,
        parts: int,
    ) -> Float64[np.ndarray, "R"]:
        """Every row's sum over its draws in this part."""
        if model != self._model:
            self._denoiser = model_folder.read(storage.fetch(model))[0].to(self._device)
            self._model = model
        batches = likelihood.masked_batches(
            tokens,
            how.estimator,
            how.draws,
            how.seed,
            how.eps,
            how.bos,
            how.batch,
            part,
            parts,
            self._device,
            labels,
        )
        return likelihood.row_sums(self._denoiser, batches, len(tokens)).numpy()


def measure_cases(cases: Sequence[Case], resources: Resources) -> list[Likelihood]:
    """The likelihood of every case, by actors that are started once."""
    found = []
    with started(_LikelihoodActor, (resources.cpus,), resources, max(case.parts for case in cases)) as judges:
        for case in cases:
            corpus, how, parts = case.corpus, case.how, case.parts
            reader = ShardReader(corpus.path, corpus.manifest, "validation")
            tokens = ray.put(reader.rows(case.rows))
            labels = ray.put(reader.labels(case.rows) if case.labelled else None)
            sums = torch.zeros(len(case.rows), dtype=torch.float64)
            progress = Progress("judged", "parts", parts, "rows")
            tasks = [(case.model, tokens, labels, how, part, parts) for part in range(parts)]
            for part in in_order(judges, "sums", tasks):
                sums += torch.from_numpy(part.copy())
                progress.add(round(len(case.rows) / parts))
            found.append(likelihood.summarise(sums, how.estimator, how.draws, how.seed))
            log.info("%s: %s", corpus.key, found[-1])
    return found


def likelihood_group(corpus: Corpus, title: str, found: Likelihood) -> Group:
    """One corpus in the report."""
    how = {
        "data": corpus.path.rpartition("/")[2],
        "split": "validation",
        "rows": found.rows,
        "estimator": found.estimator,
        "draws": found.draws,
        "seed": found.seed,
        "precision": "float32",
    }
    if found.estimator == "arccos":
        measures = [Measure("loss", "loss, nats per masked token", found.nats, found.interval)]
    else:
        bound = "" if found.estimator == "exact" else "upper bound"
        measures = [
            Measure("perplexity", "perplexity", found.perplexity, found.perplexity_interval, bound),
            Measure("nats", "nats per token", found.nats, found.interval, bound),
        ]
    return Group(corpus.key, title, how, measures)
