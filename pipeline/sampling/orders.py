"""Which positions a sampling step reveals: fixed plans, and choices by confidence or entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.config.schema import SamplingConfig
from pipeline.errors import ConfigError, did_you_mean

PLANNED = ("uniform", "binomial", "halton", "left_to_right")
CHOSEN = ("confidence", "entropy")
ORDERS = PLANNED + CHOSEN
Schedule = Literal["linear", "arccos"]


@dataclass(frozen=True)
class Order:
    """An order and its settings.

    Attributes:
        name: one of `ORDERS`. uniform: a random permutation in equal parts. binomial: the MDLM posterior on a
            grid of `steps` times. halton: a low-discrepancy order of a square grid. confidence: predict all
            unknown tokens, keep the most likely. entropy: predict all, keep as many as are nearly independent.
            left_to_right: ascending positions, the only order of an autoregressive model.
        schedule: how many a step; None: arccos for confidence and halton, linear otherwise.
        gumbel: scale of the Gumbel noise on log-confidences at the first step, falling linearly to 0.
        gamma: bound, in nats, on the error of taking an entropy step's tokens as independent.
    """

    name: str = "uniform"
    schedule: Schedule | None = None
    gumbel: float = 1.0
    gamma: float = 0.1

    @classmethod
    def of(cls, settings: SamplingConfig) -> "Order":
        """The order that a config names."""
        return cls(settings.order, settings.schedule, settings.gumbel, settings.gamma)


def check(order: Order, steps: int, unknown: int, length: int) -> None:
    """Refuse an unknown order, more steps than positions to reveal, a Halton order of what is no square.

    Raises:
        ConfigError: names the choices, or the largest number of steps.
    """
    name = order.name
    if name not in ORDERS:
        raise ConfigError(f"order: {name!r} is not one of {', '.join(ORDERS)}{did_you_mean(name, ORDERS)}")
    most = max(unknown, 1)
    # The binomial grid may be finer than there are tokens: steps that reveal nothing cost nothing.
    if steps < 1 or (steps > most and name != "binomial"):
        raise ConfigError(f"steps: {steps} for {unknown} positions to reveal; expected 1 to {most}")
    if name == "halton" and round(length**0.5) ** 2 != length:
        raise ConfigError(f"order: 'halton' needs a square grid of tokens, not {length}; expected 'uniform'")


def step_counts(unknown: int, steps: int, schedule: Schedule) -> Int[np.ndarray, "steps"]:
    """Positions revealed at every step, `unknown` in all.

    linear: sizes that differ by at most one. arccos: one each (while they last), and the rest growing as
    `arccos(1 - s / steps)`, so that the first steps, which know least, reveal least.

    Source: arXiv 2503.17076 (arccos schedule), method.md section 4.
    """
    if schedule == "linear" or unknown <= steps:
        return unknown // steps + (np.arange(steps) < unknown % steps)
    growth = np.arccos(1 - (np.arange(steps) + 1) / steps)
    ends = np.rint(np.cumsum(growth) / growth.sum() * (unknown - steps)).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def schedule_of(order: Order) -> Schedule:
    """The order's schedule, or its default."""
    return order.schedule or ("arccos" if order.name in ("confidence", "halton") else "linear")


def plan(
    order: Order, unknown: Int[np.ndarray, "U"], steps: int, rng: np.random.Generator, bos: bool
) -> tuple[Int[np.ndarray, "U"], Int[np.ndarray, "steps"]]:
    """One row's positions in the order of their revelation, and how many every step reveals.

    Source: arXiv 2406.07524 (the posterior behind `binomial`), arXiv 2503.17076 (`halton`).
    """
    if order.name == "binomial":
        # A token's time of revelation is uniform under the log-linear schedule, so drawing all times at once
        # and counting them by steps is the posterior's Binomial counts, exactly.
        step = np.minimum((rng.random(len(unknown)) * steps).astype(np.int64), steps - 1)
        return unknown[np.argsort(step, kind="stable")], np.bincount(step, minlength=steps)
    counts = step_counts(len(unknown), steps, schedule_of(order))
    if order.name == "left_to_right":
        return unknown, counts
    if order.name == "halton":
        side = round((unknown.max(initial=0) + 1 - bos) ** 0.5) if len(unknown) else 0
        return _halton(unknown - bos, side) + bos, counts
    return rng.permutation(unknown), counts


def _halton(cells: Int[np.ndarray, "U"], side: int) -> Int[np.ndarray, "U"]:
    """The given cells of a side x side grid, in the order in which a Halton sequence first visits them."""
    visited: dict[int, None] = {}
    wanted, index = set(cells.tolist()), 1
    while len(visited) < len(wanted):
        row, column = (int(_radical_inverse(index, base) * side) for base in (2, 3))
        if (cell := row * side + column) in wanted:
            visited.setdefault(cell)
        index += 1
    return np.array(list(visited), dtype=np.int64)


def _radical_inverse(index: int, base: int) -> float:
    """Digits of `index` in `base`, mirrored behind the point."""
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        index, digit = divmod(index, base)
        value += digit * scale
    return value


def choose(
    order: Order,
    unknown: Bool[Tensor, "B L"],
    log_prob: Float[Tensor, "B L"],
    entropy: Float[Tensor, "B L"],
    gumbel: Float[Tensor, "B L"],
    counts: Sequence[int],
    progress: float,
) -> Bool[Tensor, "B L"]:
    """Which unknown positions to keep, after a prediction of all of them.

    Args:
        log_prob: log-probability of the token drawn at every position.
        entropy: of the prediction at every position, nats.
        gumbel: standard Gumbel noise.
        counts: how many to keep in every row (confidence), or at least (entropy).
        progress: share of the steps done.

    Source: arXiv 2202.04200 (confidence with annealed noise); arXiv 2505.24857, section 4 (entropy bound: of
    the most certain positions the largest set whose entropies sum to at most gamma beyond the largest one).
    """
    least = torch.tensor(counts, device=unknown.device)[:, None]
    # Rounded, so that positions of equal certainty rank by place, not by the last bit, which a batch may change.
    log_prob, entropy = (x.mul(1e9).round() / 1e9 for x in (log_prob, entropy))
    if order.name == "confidence":
        score = log_prob + order.gumbel * (1 - progress) * gumbel
        return _ranks(score.masked_fill(~unknown, -torch.inf)) < least
    ranks = _ranks(-entropy.masked_fill(~unknown, torch.inf))
    ascending = entropy.masked_fill(~unknown, torch.inf).sort(dim=1).values
    # In ascending order the largest entropy of a prefix is its last: the sum of those before bounds the error.
    before = ascending.cumsum(1) - ascending
    allowed = (before <= order.gamma).sum(1, keepdim=True)
    return unknown & (ranks < torch.maximum(allowed, least))


def _ranks(score: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Place of every entry in its row, 0 for the largest."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
