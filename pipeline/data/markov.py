"""A text source of known entropy: no model can be better than that, and a bound that is lower is wrong.

Letters of a stationary Markov chain, whose transitions are drawn once from a Dirichlet distribution.
"""

import functools
import string

import numpy as np
from jaxtyping import Float64

LETTERS = string.ascii_lowercase[:16]
DOCUMENTS, LETTERS_EACH = 64, 32_768
_CONCENTRATION, _SEED = 0.25, 2026


@functools.cache
def transitions() -> Float64[np.ndarray, "K K"]:
    """Probabilities of the next letter after every letter."""
    kinds = len(LETTERS)
    return np.random.default_rng(_SEED).dirichlet(np.full(kinds, _CONCENTRATION), kinds)


@functools.cache
def letters() -> Float64[np.ndarray, "K"]:
    """Probabilities of a letter anywhere in a document: what one more transition leaves as it is."""
    kinds = len(LETTERS)
    balance = np.vstack([transitions().T - np.eye(kinds), np.ones(kinds)])
    return np.linalg.lstsq(balance, np.append(np.zeros(kinds), 1.0), rcond=None)[0]


def documents() -> list[str]:
    """The same ones every time."""
    random = np.random.default_rng(_SEED + 1)
    drawn = np.empty((DOCUMENTS, LETTERS_EACH), np.int64)
    drawn[:, 0] = random.choice(len(LETTERS), DOCUMENTS, p=letters())
    below = transitions().cumsum(-1)[:, :-1]
    for place in range(1, LETTERS_EACH):
        drawn[:, place] = (random.random((DOCUMENTS, 1)) > below[drawn[:, place - 1]]).sum(-1)
    return ["".join(LETTERS[letter] for letter in row) for row in drawn]


def entropy(length: int) -> float:
    """Nats per letter of `length` letters in a row, from anywhere in a document."""
    first, rate = _entropy(letters()), letters() @ _entropy(transitions())
    return float((first + (length - 1) * rate) / length)


def _entropy(chances: np.ndarray) -> np.ndarray:
    """Over the last axis, in nats."""
    return -(chances * np.log(np.where(chances > 0, chances, 1))).sum(-1)
