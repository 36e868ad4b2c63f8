"""Perplexities of unigram and bigram models, which count tokens in training rows."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Integer

Rows = Integer[np.ndarray, "n L"]
Perplexity = Callable[[Iterable[Rows]], float]  # of blocks of rows

_PORTION = 1 << 22  # tokens counted at a time


def unigram_perplexity(train_rows: Iterable[Rows], rows: Iterable[Rows], vocabulary: int) -> float:
    """Compute the perplexity of rows under add-one counts of the training rows' tokens.

    Args:
        train_rows: blocks of training rows.
        rows: blocks of the rows to score; they never enter the counts.
        vocabulary: V, the number of token ids.
    """
    counts = np.zeros(vocabulary, np.int64)
    for portion in _portions(train_rows):
        counts += np.bincount(portion.ravel(), minlength=vocabulary)
    log_probs = np.log(_add_one(counts))
    return _perplexity(log_probs[portion] for portion in _portions(rows))


def bigram_perplexity(train_rows: Iterable[Rows], rows: Iterable[Rows], vocabulary: int) -> float:
    """Compute the perplexity of rows under `bigram_model`.

    Args:
        train_rows: blocks of training rows.
        rows: blocks of the rows to score; they never enter the counts.
        vocabulary: V, the number of token ids.
    """
    return bigram_model(train_rows, vocabulary)(rows)


def bigram_model(train_rows: Iterable[Rows], vocabulary: int) -> Perplexity:
    """Count token pairs in training rows and return the perplexity as a function of blocks of rows.

    The first token of a row is predicted by the unigram, the others by Witten-Bell interpolation: with `c(a, b)` the
    count of a pair, `c(a)` of its first token and `d(a)` the number of different tokens seen after `a`,
    `p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a))`, where `p(b)` is the add-one unigram. After a token that has no
    successor in the training rows, the unigram alone is used. Only pairs that occur are stored, never V x V.

    Args:
        train_rows: blocks of training rows.
        vocabulary: V, the number of token ids.

    Source: Witten and Bell 1991, method C.
    """
    counts = np.zeros(vocabulary, np.int64)
    pairs: np.ndarray = np.empty(0, np.int64)  # codes a V + b, sorted
    pair_counts: np.ndarray = np.empty(0, np.int64)  # c(a, b)
    for portion in _portions(train_rows):
        counts += np.bincount(portion.ravel(), minlength=vocabulary)
        new_pairs, new_counts = np.unique(_codes(portion, vocabulary), return_counts=True)
        pairs, index = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        pair_counts = np.bincount(index, np.concatenate([pair_counts, new_counts])).astype(np.int64)
    unigram = _add_one(counts)
    first_counts = np.bincount(pairs // vocabulary, pair_counts, minlength=vocabulary)  # c(a)
    successors = np.bincount(pairs // vocabulary, minlength=vocabulary)  # d(a)

    def log_probs(portion: Rows) -> Float[np.ndarray, "n L"]:
        a, b, codes = portion[:, :-1], portion[:, 1:], _codes(portion, vocabulary)  # each [n, L - 1]
        index = np.searchsorted(pairs, codes)
        seen = np.append(pair_counts, 0)[index] * (np.append(pairs, -1)[index] == codes)
        with np.errstate(invalid="ignore"):  # 0 / 0 after a token without a successor
            bigram = (seen + successors[a] * unigram[b]) / (first_counts + successors)[a]
        bigram = np.where(first_counts[a] > 0, bigram, unigram[b])
        return np.log(np.concatenate([unigram[portion[:, :1]], bigram], axis=1))

    return lambda rows: _perplexity(log_probs(portion) for portion in _portions(rows))


def _portions(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """Yield the rows in portions of about `_PORTION` tokens, as indices."""
    portion: list[Rows] = []
    for block in blocks:
        portion.append(block)
        if sum(part.size for part in portion) >= _PORTION:
            yield np.concatenate(portion).astype(np.int64)
            portion = []
    if portion:
        yield np.concatenate(portion).astype(np.int64)


def _codes(rows: Rows, vocabulary: int) -> Integer[np.ndarray, "n L-1"]:
    """Encode each pair of neighbours as one number."""
    return rows[:, :-1] * vocabulary + rows[:, 1:]


def _add_one(counts: Integer[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    return (counts + 1) / (counts.sum() + len(counts))


def _perplexity(log_probs: Iterable[np.ndarray]) -> float:
    """Return exp of minus the mean log-probability over all portions."""
    total, count = 0.0, 0
    for portion in log_probs:
        total += float(portion.sum())
        count += portion.size
    return math.exp(-total / count)
