"""Likelihood of models on folders of prepared data, computed by Ray actors.

A folder's (row, draw) pairs are cut into parts. Their number depends only on the data, and the sums of the parts are
added in order, so that the result is bitwise the same for any number of actors.
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
from pipeline.models import model_folder
from pipeline.models.batch import Roles
from pipeline.reports.measures import Group, Measure
from pipeline.runtime.actors import Resources, in_order, own_device, started

log = logging.getLogger(__name__)

_PARTS = 64  # of a folder's batches, at most


@dataclass(frozen=True)
class Corpus:
    """A folder of prepared data whose validation split is evaluated.

    Attributes:
        key: the corpus's part of metric names.
        path: of the folder.
        manifest: of the data.
    """

    key: str
    path: str
    manifest: Manifest

    def reader(self, split: str) -> ShardReader:
        """Open the rows of a split.

        Args:
            split: "train" or "validation".
        """
        return ShardReader(self.path, self.manifest, split)


def open_corpora(paths: Sequence[str]) -> list[Corpus]:
    """Open the folders of `evaluation.data`.

    Args:
        paths: folders of prepared data; folders of the same name get numbered keys.

    Raises:
        DataError: a folder has no complete data.
    """
    folders = [storage.resolve(path).rstrip("/") for path in paths]
    names = [re.sub(r"[^\w.-]", "_", folder.rpartition("/")[2]) for folder in folders]
    keys = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    return [
        Corpus(f"zero_shot/{key}", folder, Manifest.read(folder))
        for key, folder in zip(keys, folders, strict=True)
    ]


def check_fits(corpus: Corpus, facts: model_folder.DataFacts, tokenizer_hash: str) -> None:
    """Refuse rows that do not mean the same to the model.

    Args:
        corpus: the data.
        facts: what the model knows about its own data.
        tokenizer_hash: of the tokenizer that the model was trained with.

    Raises:
        DataError: fields differ (all are named), or the validation split has no rows.
    """
    manifest = corpus.manifest
    fields = {
        "length": (manifest.length, facts.length),
        "vocabulary": (manifest.vocabulary, facts.vocab_size),
        "bos": (manifest.special.bos, facts.bos),
        "padding": (manifest.special.pad, facts.pad),
        "tokenizer (hash)": (manifest.tokenizer.hash[:12], tokenizer_hash[:12]),
    }
    if lines := differences(fields, "model"):
        head = f"evaluation: the model cannot read {corpus.path} (tokenizer {manifest.tokenizer.name!r}):"
        raise DataError("\n".join([head, *lines]))
    if not manifest.rows("validation"):
        raise DataError(f"evaluation: {corpus.path} has no validation rows; expected at least one")


@dataclass(frozen=True)
class Case:
    """A likelihood to measure.

    Attributes:
        model: consolidated folder that every node can read.
        corpus: the data.
        rows: numbers of the validation rows.
        masking: how rows are hidden.
        given: part of captions and images that is given.
    """

    model: str
    corpus: Corpus
    rows: Int[np.ndarray, "R"]
    masking: likelihood.Masking
    given: likelihood.Part = "nothing"

    @property
    def parts(self) -> int:
        """Return the number of tasks that the measurement is cut into."""
        return min(_PARTS, -(-len(self.rows) * self.masking.draws // self.masking.batch))


class _LikelihoodActor:
    """Measure parts of cases; hold the model of the last part on the actor's device."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._device = own_device()
        self._folder = ""

    def sums(
        self,
        model: str,
        masking: likelihood.Masking,
        tokens: UInt[np.ndarray, "R L"],
        labels: Int[np.ndarray, "R"] | None,
        roles: Roles | None,
        share: tuple[int, int],
    ) -> Float64[np.ndarray, "R"]:
        """Sum every row's estimates over its draws in this part."""
        if model != self._folder:
            self._model = model_folder.read(storage.fetch(model))[0].to(self._device)
            self._folder = model
        labels = None if self._model.classes is None else labels
        batches = likelihood.masked_batches(
            masking, tokens, labels, roles=roles, share=share, device=self._device
        )
        return likelihood.row_sums(self._model, batches, len(tokens)).numpy()


def measure_cases(cases: Sequence[Case], resources: Resources) -> list[likelihood.Likelihood]:
    """Measure the likelihood of every case on actors that are started once.

    Args:
        cases: what to measure.
        resources: of the actors.
    """
    results = []
    with started(_LikelihoodActor, (resources.cpus,), resources, max(case.parts for case in cases)) as actors:
        for case in cases:
            reader = case.corpus.reader("validation")
            tokens, labels, roles = reader.read(case.rows)
            # Data for evaluation only has no facts about rows of training; captions always have them.
            if case.corpus.manifest.caption and (modalities := case.corpus.manifest.facts.modalities):
                roles = likelihood.roles_of(case.given, len(tokens), reader.length, modalities)
            sums = torch.zeros(len(case.rows), dtype=torch.float64)
            progress = Progress("measured the likelihood of", "parts", case.parts, "rows")
            fields = (case.model, case.masking, *map(ray.put, (tokens, labels, roles)))
            tasks = [(*fields, (part, case.parts)) for part in range(case.parts)]
            for part in in_order(actors, "sums", tasks):
                sums += torch.from_numpy(part.copy())
                progress.add(round(len(case.rows) / case.parts))
            results.append(likelihood.summarise(sums, case.masking, roles))
            what = "" if case.given == "nothing" else f", {case.given} given"
            log.info("%s%s: %s", case.corpus.key, what, results[-1])
    return results


def caption_bounds(
    case: Case, candidates: Int[np.ndarray, "R K"], resources: Resources
) -> Float64[np.ndarray, "R K"]:
    """Bound -log p(image | caption) of every image and several captions, in nats per code.

    All captions of an image are measured with the same maskings, so that their differences are more exact than the
    bounds.

    Args:
        case: whose images are measured.
        candidates: the rows, of those of the case, that have the captions.
        resources: of the actors.
    """
    reader, modalities = case.corpus.reader("validation"), case.corpus.manifest.facts.modalities
    assert modalities is not None
    rows = reader.rows(case.rows)
    roles = ray.put(likelihood.roles_of("caption", len(rows), reader.length, modalities))
    bounds = np.zeros(candidates.shape)
    with started(_LikelihoodActor, (resources.cpus,), resources, case.parts) as actors:
        tasks = []
        for column in candidates.T:
            tokens = rows.copy()
            tokens[:, : modalities.places] = rows[column, : modalities.places]
            fields = (case.model, case.masking, ray.put(tokens), None, roles)
            tasks += [(*fields, (part, case.parts)) for part in range(case.parts)]
        progress = Progress("compared captions of", "parts", len(tasks), "rows")
        for number, sums in enumerate(in_order(actors, "sums", tasks)):
            bounds[:, number // case.parts] += sums
            progress.add(round(len(rows) / case.parts))
    return bounds / case.masking.draws


def likelihood_group(
    corpus: Corpus,
    title: str,
    result: likelihood.Likelihood,
    scored_bos: bool = False,
    given: likelihood.Part = "nothing",
) -> Group:
    """Make the report's group of a likelihood.

    Args:
        corpus: the data.
        title: for people.
        result: the measured likelihood.
        scored_bos: whether BOS counts as predicted (`evaluation.score_bos`).
        given: part of captions and images that is given.
    """
    method = {
        "data": corpus.path.rpartition("/")[2],
        "split": "validation",
        "rows": result.rows,
        "estimator": result.estimator,
        "draws": result.draws,
        "seed": result.seed,
        "precision": "float32",
    }
    if result.estimator == "arccos":
        measures = [Measure("loss", "loss, nats per masked token", result.nats, result.interval)]
    else:
        bound = "" if result.estimator == "exact" else "upper bound"
        measures = [
            Measure("perplexity", "perplexity", result.perplexity, result.perplexity_interval, bound),
            Measure("nats", "nats per token", result.nats, result.interval, bound),
        ]
        if (scale := corpus.manifest.bits_per_byte(1.0, scored_bos)) is not None:
            interval = result.interval and (result.interval[0] * scale, result.interval[1] * scale)
            measures.append(Measure("bits_per_byte", "bits per byte", result.nats * scale, interval, bound))
    if given == "nothing":
        return Group(corpus.key, title, method, measures)
    return Group(f"{corpus.key}_given_{given}", f"{title}, {given} given", method, measures)
