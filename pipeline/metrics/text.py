"""Figures of drawn text: how varied it is, and what language models of others think of it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

import numpy as np
from jaxtyping import Float, Integer

from pipeline.errors import DataError
from pipeline.metrics.external_lm import Scored
from pipeline.reports.measures import Measure

log = logging.getLogger(__name__)

Rows = Integer[np.ndarray, "n L"]


def unigram_entropy(rows: Rows) -> float:
    """Mean over rows of the entropy of a row's own token frequencies, in nats; at most log L.

    Raises:
        DataError: there are no rows.

    Source: Dieleman et al. 2022, arXiv 2211.15089; as reported beside generative perplexity in arXiv 2505.18883.
    """
    _check(rows)
    entropies = []
    for row in rows:
        p = np.unique(row, return_counts=True)[1] / len(row)
        entropies.append(-(p * np.log(p)).sum())
    return float(np.mean(entropies))


def distinct(rows: Rows, n: int) -> float:
    """Share of different n-grams among all n-grams of all rows.

    Raises:
        DataError: there are no rows.

    Source: Li et al. 2016, arXiv 1510.03055.
    """
    _check(rows)
    vocabulary, width = int(rows.max()) + 1, rows.shape[1] - n + 1
    codes = np.zeros((len(rows), width), np.int64)  # V^3 fits for V below two million
    for shift in range(n):
        codes = codes * vocabulary + rows[:, shift : shift + width]
    return len(np.unique(codes)) / codes.size


def text_measures(
    rows: Rows,
    bos: bool,
    bigram: Callable[[Iterable[Rows]], float],
    scored: Scored | None,
    scorer: str | None,
    real: Scored | None = None,
) -> list[Measure]:
    """Figures of rows of text, drawn or real.

    Args:
        bos: whether every row begins with a token that is given.
        bigram: perplexity under the bigrams of the training rows, from `ngram.bigram_model`.
        scored: what `scorer` found, if there is one.
        real: what it found in real text, which drawn rows are compared with (MAUVE, where it is installed).

    Raises:
        DataError: there are no rows.
    """
    own = rows[:, int(bos) :]
    measures = [Measure("entropy", "unigram entropy, nats", unigram_entropy(own), by="mean over rows")]
    measures += [
        Measure(f"distinct_{n}", f"distinct {n}-grams", distinct(own, n), by=f"of all {n}-grams")
        for n in (1, 2, 3)
        if own.shape[1] >= n
    ]
    measures.append(
        Measure("bigram_perplexity", "bigram perplexity", bigram([rows]), by="bigrams of the training rows")
    )
    if scored is not None:
        by = f"{scorer}, float32, {scored.tokens:,} of its tokens"
        by += f", {scored.cut:,} beyond its context left out" if scored.cut else ""
        measures.append(Measure("generative_perplexity", "generative perplexity", scored.perplexity, by=by))
    if scored is not None and real is not None and has_mauve():
        value, clusters = mauve(real.features, scored.features)
        by = f"last hidden state of {scorer}, {len(scored.features):,} texts against {len(real.features):,}"
        measures.append(Measure("mauve", "MAUVE", value, by=f"{by} held-out ones, {clusters} clusters"))
    return measures


def has_mauve() -> bool:
    """Whether the package that computes MAUVE is installed."""
    return find_spec("mauve") is not None


def mauve(real: Float[np.ndarray, "n H"], drawn: Float[np.ndarray, "m H"]) -> tuple[float, int]:
    """How near drawn texts are to real ones, between 0 and 1, and the number of clusters that it rests on.

    Source: Pillutla et al. 2021, arXiv 2102.01454; features of another model than there, so compare within a report.
    """
    from mauve import compute_mauve  # an extra

    found = compute_mauve(p_features=real, q_features=drawn)
    return float(found.mauve), int(found.num_buckets)


def _check(rows: Sequence[object] | np.ndarray) -> None:
    if not len(rows):
        raise DataError("0 samples; expected at least one")
