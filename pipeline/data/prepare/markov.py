"""Text of known entropy: no model has a lower loss, and a bound that is lower is wrong."""

import functools
import string
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

LETTERS = string.ascii_lowercase[:16]
DOCUMENTS, LETTERS_EACH = 64, 32_768
_CONCENTRATION, _SEED = 0.25, 2026


@dataclass(frozen=True)
class Chain:
    """A stationary Markov chain.

    Attributes:
        first: stationary probabilities of the tokens.
        transitions: probabilities of the next token after every token.
    """

    first: Float64[np.ndarray, "V"]
    transitions: Float64[np.ndarray, "V V"]

    def entropy(self, length: int) -> float:
        """Return the entropy of a row in nats per token.

        Args:
            length: tokens of the row.
        """
        alone, following = _entropy(self.first), self.first @ _entropy(self.transitions)
        return float((alone + (length - 1) * following) / length)

    def draw(self, rows: int, length: int, rng: np.random.Generator) -> Int64[np.ndarray, "rows length"]:
        """Draw independent rows.

        Args:
            rows: number of rows.
            length: tokens of a row.
            rng: source of the random numbers.
        """
        drawn = np.empty((rows, length), np.int64)
        drawn[:, 0] = rng.choice(len(self.first), rows, p=self.first)
        below = self.transitions.cumsum(-1)[:, :-1]
        for place in range(1, length):
            drawn[:, place] = (rng.random((rows, 1)) > below[drawn[:, place - 1]]).sum(-1)
        return drawn


@functools.cache
def embedded() -> Chain:
    """Return the chain of the source "markov": letters, with transitions drawn from a Dirichlet distribution."""
    kinds = len(LETTERS)
    transitions = np.random.default_rng(_SEED).dirichlet(np.full(kinds, _CONCENTRATION), kinds)
    balance = np.vstack([transitions.T - np.eye(kinds), np.ones(kinds)])
    first = np.linalg.lstsq(balance, np.append(np.zeros(kinds), 1.0), rcond=None)[0]
    return Chain(first, transitions)


@functools.cache
def documents() -> list[str]:
    """Return the documents of the source "markov", drawn once per process, since every start compares them."""
    drawn = embedded().draw(DOCUMENTS, LETTERS_EACH, np.random.default_rng(_SEED + 1))
    return ["".join(LETTERS[letter] for letter in row) for row in drawn]


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy of distributions along the last axis, in nats."""
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1))).sum(-1)
