"""Perplexities of unigram and bigram models, which count tokens in training rows."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

Rows = Collection[Integer[np.ndarray, "length"]]  # an array [n, L], or rows of different lengths
Perplexity = Callable[[Iterable[Rows]], float]  # of blocks of rows
Tokens = Int64[np.ndarray, "T"]  # of rows, one after the other

_PORTION = 1 << 22  # tokens counted at a time


def unigram_perplexity(train_rows: Iterable[Rows], rows: Iterable[Rows], vocabulary: int) -> float:
    """Compute the perplexity of rows under add-one counts of the training rows' tokens.

    Args:
        train_rows: blocks of training rows.
        rows: blocks of the rows to score; they never enter the counts.
        vocabulary: V, the number of token ids.
    """
    counts = np.zeros(vocabulary, np.int64)
    for tokens, _ in _portions(train_rows):
        counts += np.bincount(tokens, minlength=vocabulary)
    log_probs = np.log(_add_one(counts))
    return _perplexity(log_probs[tokens] for tokens, _ in _portions(rows))


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
    for tokens, first in _portions(train_rows):
        counts += np.bincount(tokens, minlength=vocabulary)
        new_pairs, new_counts = np.unique(_codes(tokens, vocabulary)[~first[1:]], return_counts=True)
        pairs, index = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        pair_counts = np.bincount(index, np.concatenate([pair_counts, new_counts])).astype(np.int64)
    unigram = _add_one(counts)
    first_counts = np.bincount(pairs // vocabulary, pair_counts, minlength=vocabulary)  # c(a)
    successors = np.bincount(pairs // vocabulary, minlength=vocabulary)  # d(a)

    def log_probs(tokens: Tokens, first: Bool[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
        a, b, codes = tokens[:-1], tokens[1:], _codes(tokens, vocabulary)  # each [T - 1]
        index = np.searchsorted(pairs, codes)
        seen = np.append(pair_counts, 0)[index] * (np.append(pairs, -1)[index] == codes)
        with np.errstate(invalid="ignore"):  # 0 / 0 after a token without a successor
            bigram = (seen + successors[a] * unigram[b]) / (first_counts + successors)[a]
        bigram = np.where((first_counts[a] > 0) & ~first[1:], bigram, unigram[b])
        return np.log(np.concatenate([unigram[tokens[:1]], bigram]))

    return lambda rows: _perplexity(log_probs(*portion) for portion in _portions(rows))


def _portions(blocks: Iterable[Rows]) -> Iterator[tuple[Tokens, Bool[np.ndarray, "T"]]]:
    """Yield the rows one after the other in portions of about `_PORTION` tokens, and which tokens begin a row."""
    portion: list[Integer[np.ndarray, length]] = []
    size = 0
    for row in chain.from_iterable(blocks):
        portion.append(row)
        size += len(row)
        if size >= _PORTION:
            yield _joined(portion)
            portion, size = [], 0
    if size:
        yield _joined(portion)


def _joined(rows: Rows) -> tuple[Tokens, Bool[np.ndarray, "T"]]:
    """Join rows, as indices, and tell which tokens begin a row."""
    tokens = np.concatenate([*rows]).astype(np.int64)
    first = np.zeros(len(tokens), dtype=bool)
    first[np.cumsum([0, *map(len, rows)])[:-1]] = True
    return tokens, first


def _codes(tokens: Tokens, vocabulary: int) -> Integer[np.ndarray, "T-1"]:
    """Encode each pair of neighbours as one number."""
    return tokens[:-1] * vocabulary + tokens[1:]


def _add_one(counts: Integer[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    return (counts + 1) / (counts.sum() + len(counts))


def _perplexity(log_probs: Iterable[np.ndarray]) -> float:
    """Return exp of minus the mean log-probability over all portions."""
    total, count = 0.0, 0
    for portion in log_probs:
        total += float(portion.sum())
        count += portion.size
    return math.exp(-total / count)
