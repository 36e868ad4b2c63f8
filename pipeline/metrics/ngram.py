"""Unigram and bigram perplexities: what counting alone achieves on the rows that a model is judged by."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Integer

Rows = Integer[np.ndarray, "n L"]

_PORTION = 1 << 22  # tokens counted at a time


def unigram_perplexity(
    train_rows: Iterable[Rows], rows: Iterable[Rows], vocabulary: int, max_train_rows: int | None = None
) -> float:
    """Perplexity of rows whose tokens are predicted by how often each occurs in the training rows, plus one.

    Args:
        train_rows: blocks of training rows.
        rows: blocks of the rows to judge; they never enter the counts.
        vocabulary: V, the number of token ids.
        max_train_rows: count in the first so many training rows only.
    """
    counts = np.zeros(vocabulary, np.int64)
    for portion in _portions(train_rows, max_train_rows):
        counts += np.bincount(portion.ravel(), minlength=vocabulary)
    logs = np.log(_add_one(counts))
    return _perplexity(logs[portion] for portion in _portions(rows))


def bigram_perplexity(
    train_rows: Iterable[Rows], rows: Iterable[Rows], vocabulary: int, max_train_rows: int | None = None
) -> float:
    """`bigram_model` for rows that are judged once.

    Args:
        train_rows: blocks of training rows.
        rows: blocks of the rows to judge; they never enter the counts.
        vocabulary: V, the number of token ids.
        max_train_rows: count in the first so many training rows only.
    """
    return bigram_model(train_rows, vocabulary, max_train_rows)(rows)


def bigram_model(
    train_rows: Iterable[Rows], vocabulary: int, max_train_rows: int | None = None
) -> Callable[[Iterable[Rows]], float]:
    """Perplexity, as a function of blocks of rows, of tokens that are predicted from the one before.

    The first token of a row is predicted by the unigram, the others by Witten-Bell interpolation, all of it from
    the training rows: with `c(a, b)` the count of a pair, `c(a)` of its first token and `d(a)` of the different
    tokens seen after `a`, `p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a))`, where `p(b)` is the add-one unigram,
    which also stands alone after a token that the training rows never follow up. Only pairs that occur are stored,
    never V x V.

    Args:
        train_rows: blocks of training rows; the rows to judge never enter the counts.
        vocabulary: V, the number of token ids.
        max_train_rows: count in the first so many training rows only.

    Source: Witten and Bell 1991, method C.
    """
    counts = np.zeros(vocabulary, np.int64)
    pairs: np.ndarray = np.empty(0, np.int64)  # codes a V + b, sorted
    pair_counts: np.ndarray = np.empty(0, np.int64)  # c(a, b)
    for portion in _portions(train_rows, max_train_rows):
        counts += np.bincount(portion.ravel(), minlength=vocabulary)
        found, found_counts = np.unique(_codes(portion, vocabulary), return_counts=True)
        pairs, place = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        pair_counts = np.bincount(place, np.concatenate([pair_counts, found_counts])).astype(np.int64)
    unigram = _add_one(counts)
    followed = np.bincount(pairs // vocabulary, pair_counts, minlength=vocabulary)  # c(a)
    different = np.bincount(pairs // vocabulary, minlength=vocabulary)  # d(a)

    def logs(portion: Rows) -> Float[np.ndarray, "n L"]:
        before, after = portion[:, :-1], portion[:, 1:]
        wanted = _codes(portion, vocabulary)  # [n, L - 1]
        place = np.searchsorted(pairs, wanted)
        seen = np.append(pair_counts, 0)[place] * (np.append(pairs, -1)[place] == wanted)
        with np.errstate(invalid="ignore"):  # 0 / 0 after a token without a follower
            share = (seen + different[before] * unigram[after]) / (followed + different)[before]
        share = np.where(followed[before] > 0, share, unigram[after])
        return np.log(np.concatenate([unigram[portion[:, :1]], share], axis=1))

    return lambda rows: _perplexity(logs(portion) for portion in _portions(rows))


def _portions(blocks: Iterable[Rows], max_rows: int | None = None) -> Iterator[Rows]:
    """The same rows in portions of about `_PORTION` tokens, cut off after `max_rows`, as indices."""
    left = math.inf if max_rows is None else max_rows
    held: list[Rows] = []
    for block in blocks:
        kept = block[: int(min(left, len(block)))]
        left -= len(kept)
        held.append(kept)
        if sum(part.size for part in held) >= _PORTION:
            yield np.concatenate(held).astype(np.int64)
            held = []
        if left <= 0:
            break
    if held:
        yield np.concatenate(held).astype(np.int64)


def _codes(rows: Rows, vocabulary: int) -> Integer[np.ndarray, "n L-1"]:
    """One number for each pair of neighbours."""
    return rows[:, :-1] * vocabulary + rows[:, 1:]


def _add_one(counts: Integer[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    return (counts + 1) / (counts.sum() + len(counts))


def _perplexity(logs: Iterable[np.ndarray]) -> float:
    """exp of minus the mean log-probability over all portions."""
    total, count = 0.0, 0
    for portion in logs:
        total += float(portion.sum())
        count += portion.size
    return math.exp(-total / count)
