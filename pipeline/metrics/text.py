"""Metrics of generated text: its diversity, and its score under other language models."""

from importlib.util import find_spec

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.errors import DataError
from pipeline.metrics.external_lm import Scored
from pipeline.metrics.ngram import Perplexity, Rows
from pipeline.reports.measures import Measure


def unigram_entropy(rows: Rows) -> float:
    """Compute the entropy of each row's own token frequencies and average it over rows.

    Args:
        rows: token ids.

    Returns:
        Nats, at most log L.

    Raises:
        DataError: there are no rows.

    Source: Dieleman et al. 2022, arXiv 2211.15089; reported with generative perplexity in arXiv 2505.18883.
    """
    _check(rows)
    frequencies = [np.unique(row, return_counts=True)[1] / len(row) for row in rows]
    return float(np.mean([-(p * np.log(p)).sum() for p in frequencies]))


def distinct(rows: Rows, n: int) -> float:
    """Compute the share of different n-grams among all n-grams of all rows.

    Args:
        rows: token ids.
        n: length of the n-grams.

    Raises:
        DataError: there are no rows.

    Source: Li et al. 2016, arXiv 1510.03055.
    """
    _check(rows)
    vocabulary = 1 + max(int(row.max()) for row in rows)
    powers = vocabulary ** np.arange(n)  # V^3 fits for V below two million
    codes = np.concatenate([sliding_window_view(row, n) @ powers for row in rows if len(row) >= n])
    return len(np.unique(codes)) / len(codes)


def text_measures(
    rows: Rows,
    bos: bool,
    bigram: Perplexity | None,
    scored: Scored | None,
    scorer: str | None,
    real: Scored | None = None,
) -> list[Measure]:
    """Compute all metrics of rows of text, generated or real.

    Args:
        rows: token ids.
        bos: whether every row begins with a given token.
        bigram: perplexity under the bigrams of the training rows, from `ngram.bigram_model`; None: there are none.
        scored: the rows' scores under `scorer`, if there is one.
        scorer: name of the language model that scored them.
        real: scores of real text, with which generated rows are compared (MAUVE, where it is installed).

    Raises:
        DataError: there are no rows.
    """
    generated = [row[int(bos) :] for row in rows]
    measures = [Measure("entropy", "unigram entropy, nats", unigram_entropy(generated), by="mean over rows")]
    measures += [
        Measure(f"distinct_{n}", f"distinct {n}-grams", distinct(generated, n), by=f"of all {n}-grams")
        for n in (1, 2, 3)
        if any(len(row) >= n for row in generated)
    ]
    if bigram is not None:
        by = "bigrams of the training rows"
        measures.append(Measure("bigram_perplexity", "bigram perplexity", bigram([rows]), by=by))
    if scored is None:
        return measures
    method = f"{scorer}, float32, {scored.tokens:,} of its tokens"
    method += f", {scored.cut:,} beyond its context left out" if scored.cut else ""
    measures.append(Measure("generative_perplexity", "generative perplexity", scored.perplexity, by=method))
    if real is not None and has_mauve():
        value, clusters = mauve(real.features, scored.features)
        texts = f"{len(scored.features):,} texts against {len(real.features):,} held-out ones"
        method = f"last hidden state of {scorer}, {texts}, {clusters} clusters"
        measures.append(Measure("mauve", "MAUVE", value, by=method))
    return measures


def has_mauve() -> bool:
    """Tell whether the package that computes MAUVE is installed."""
    return find_spec("mauve") is not None


def mauve(real: Float[np.ndarray, "n H"], generated: Float[np.ndarray, "m H"]) -> tuple[float, int]:
    """Compute MAUVE, the similarity of generated and real texts between 0 and 1.

    Args:
        real: features of real texts. The model that computes them is not that of the paper, so values compare only
            within a report.
        generated: features of generated texts.

    Returns:
        The value and the number of clusters that it rests on.

    Source: Pillutla et al. 2021, arXiv 2102.01454.
    """
    from mauve import compute_mauve  # an extra

    result = compute_mauve(p_features=real, q_features=generated)
    return float(result.mauve), int(result.num_buckets)


def _check(rows: Rows) -> None:
    if not len(rows):
        raise DataError("0 samples; expected at least one")
