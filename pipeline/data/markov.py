"""A text source of known entropy: no model can be better than that, and a bound that is lower is wrong.

Letters of a stationary second-order Markov chain whose transitions are drawn once from a Dirichlet distribution.
"""

import functools
import string

import numpy as np
from jaxtyping import Float64

LETTERS = string.ascii_lowercase[:12]
DOCUMENTS, LETTERS_EACH = 64, 32_768
_CONCENTRATION, _SEED = 0.25, 2026


@functools.cache
def transitions() -> Float64[np.ndarray, "K K K"]:
    """Probabilities of the next letter after every two."""
    kinds = len(LETTERS)
    return np.random.default_rng(_SEED).dirichlet(np.full(kinds, _CONCENTRATION), (kinds, kinds))


@functools.cache
def pairs() -> Float64[np.ndarray, "K K"]:
    """Stationary probabilities of two letters in a row."""
    kinds, chances = len(LETTERS), transitions()
    now = np.full((kinds, kinds), kinds**-2.0)
    for _ in range(10_000):
        then = np.einsum("ab,abc->bc", now, chances)
        if np.abs(then - now).max() < 1e-15:
            break
        now = then
    return now


def documents() -> list[str]:
    """The same ones every time."""
    kinds, random = len(LETTERS), np.random.default_rng(_SEED + 1)
    drawn = np.empty((DOCUMENTS, LETTERS_EACH), np.int64)
    first = random.choice(kinds**2, DOCUMENTS, p=pairs().ravel())
    drawn[:, 0], drawn[:, 1] = np.divmod(first, kinds)
    below = transitions().cumsum(-1)
    for place in range(2, LETTERS_EACH):
        limits = below[drawn[:, place - 2], drawn[:, place - 1]]
        drawn[:, place] = (random.random((DOCUMENTS, 1)) > limits[:, :-1]).sum(-1)
    return ["".join(LETTERS[letter] for letter in row) for row in drawn]


def entropy(length: int) -> float:
    """Nats per letter of `length` letters in a row, from anywhere in a document; `length` is at least 2."""
    start = pairs()
    rate = start * _entropy(transitions())
    return float((_entropy(start.ravel()) + (length - 2) * rate.sum()) / length)


def _entropy(chances: np.ndarray) -> np.ndarray:
    """Over the last axis, in nats."""
    return -(chances * np.log(np.where(chances > 0, chances, 1))).sum(-1)
