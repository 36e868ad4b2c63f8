"""Which positions a sampling step reveals: fixed plans, and choices by confidence or entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import arguments
from pipeline.config.evaluation import LARGEST_SETTING, MOST_STEPS
from pipeline.errors import ConfigError
from pipeline.sampling.logits import Drawn

PLANNED = ("uniform", "binomial", "halton", "left_to_right")
CHOSEN = ("confidence", "entropy")
ORDERS = PLANNED + CHOSEN
Schedule = Literal["linear", "arccos"]
SCHEDULES = get_args(Schedule)


@dataclass(frozen=True)
class Order:
    """An order and its settings.

    Attributes:
        name: one of `ORDERS`. "uniform": a random permutation in equal parts. "binomial": the MDLM posterior on a
            grid of `steps` times. "halton": a low-discrepancy order of a square grid. "confidence": predict all
            unknown tokens and keep the most likely. "entropy": predict all and keep as many as are nearly
            independent. "left_to_right": ascending positions, the only order of an autoregressive model.
        schedule: how many positions each step reveals; None: arccos for confidence and halton, linear otherwise.
        gumbel: scale of the Gumbel noise on log-probabilities at the first step, falling linearly to 0 at the last.
        gamma: bound, in nats, on the error of taking an entropy step's tokens as independent.

    Raises:
        ConfigError: an unknown name or schedule, or a gumbel or gamma outside 0 to 1e6.
    """

    name: str = "uniform"
    schedule: Schedule | None = None
    gumbel: float = 5.0
    gamma: float = 0.1

    def __post_init__(self) -> None:
        arguments.choice("order", self.name, ORDERS)
        if self.schedule is not None:
            arguments.choice("schedule", self.schedule, SCHEDULES)
        arguments.number("gumbel", self.gumbel, 0, LARGEST_SETTING)
        arguments.number("gamma", self.gamma, 0, LARGEST_SETTING)


def check(order: Order, steps: int, unknown: int, length: int) -> None:
    """Check that an order can reveal a row in a number of steps.

    Args:
        order: the order.
        steps: number of steps.
        unknown: positions to reveal in the row that has the most.
        length: positions of a row, without BOS or caption.

    Raises:
        ConfigError: fewer than 1 step or more steps than positions, or a Halton order of rows that are no square
            grid.
    """
    name = order.name
    # The binomial grid may be finer than there are tokens: steps that reveal nothing cost nothing.
    most = MOST_STEPS if name == "binomial" else max(unknown, 1)
    if not arguments.is_integer(steps) or not 1 <= steps <= most:
        raise ConfigError(f"steps: {steps!r} for {unknown} positions to reveal; expected 1 to {most}")
    if name == "halton" and round(length**0.5) ** 2 != length:
        raise ConfigError(f"order: 'halton' needs a square grid of tokens, not {length}; expected 'uniform'")


def step_counts(unknown: int, steps: int, schedule: Schedule) -> Int[np.ndarray, "steps"]:
    """Spread positions over steps.

    Args:
        unknown: number of positions.
        steps: number of steps.
        schedule: "linear": counts that differ by at most one. "arccos": one each (while they last), and the rest
            growing as `arccos(1 - s / steps)`, so that the first steps, which know least, reveal least.

    Returns:
        The number of positions that each step reveals.

    Source:
        arXiv 2503.17076 (arccos schedule); docs/method.md section 4.
    """
    if schedule == "linear" or unknown <= steps:
        return unknown // steps + (np.arange(steps) < unknown % steps)
    growth = np.arccos(1 - (np.arange(steps) + 1) / steps)
    ends = np.rint(np.cumsum(growth) / growth.sum() * (unknown - steps)).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def schedule_of(order: Order) -> Schedule:
    """Find the schedule of an order.

    Args:
        order: the order.

    Returns:
        Its own schedule, or the default one of its name.
    """
    return order.schedule or ("arccos" if order.name in ("confidence", "halton") else "linear")


def plan(
    order: Order,
    unknown: Int[np.ndarray, "U"],
    steps: int,
    *,
    rng: np.random.Generator,
    start: int,
    length: int,
) -> tuple[Int[np.ndarray, "U"], Int[np.ndarray, "steps"]]:
    """Plan the revelation of one row by an order of `PLANNED`.

    Args:
        order: the order.
        unknown: positions to reveal, ascending.
        steps: number of steps.
        rng: source of random orders.
        start: position where the grid of an image begins, behind BOS or a caption. In a Halton order, positions
            before it are revealed beside the grid, in a uniform order and in equal parts.
        length: L.

    Returns:
        The positions in the order of their revelation, and how many each step reveals.

    Source:
        arXiv 2406.07524 (the posterior behind `binomial`); arXiv 2503.17076 (`halton`).
    """
    if order.name == "binomial":
        # A token's time of revelation is uniform under the log-linear schedule, so drawing all times at once
        # and counting them by steps is the posterior's Binomial counts, exactly.
        time = rng.random(len(unknown)) * steps
        step = np.minimum(time.astype(np.int64), steps - 1)
        return unknown[np.argsort(time)], np.bincount(step, minlength=steps)
    if order.name == "halton":
        text, cells = unknown[unknown < start], unknown[unknown >= start] - start
        grid = _halton(cells, round((length - start) ** 0.5)) + start
        counts = step_counts(len(grid), steps, schedule_of(order))
        if not len(text):
            return grid, counts
        others = step_counts(len(text), steps, "linear")
        parts = (np.split(x, n.cumsum()[:-1]) for x, n in ((rng.permutation(text), others), (grid, counts)))
        sequence = [part for both in zip(*parts, strict=True) for part in both]
        return np.concatenate(sequence), counts + others
    counts = step_counts(len(unknown), steps, schedule_of(order))
    if order.name == "left_to_right":
        return unknown, counts
    assert order.name == "uniform", order.name
    return rng.permutation(unknown), counts


def _halton(cells: Int[np.ndarray, "U"], side: int) -> Int[np.ndarray, "U"]:
    """Cells of a side x side grid, in the order in which a Halton sequence first visits them."""
    order: list[int] = []
    remaining, index = set(cells.tolist()), 1
    while remaining:
        row, column = (int(_radical_inverse(index, base) * side) for base in (2, 3))
        if (cell := row * side + column) in remaining:
            remaining.remove(cell)
            order.append(cell)
        index += 1
    return np.array(order, dtype=np.int64)


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` in `base`, mirrored at the decimal point."""
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        index, digit = divmod(index, base)
        value += digit * scale
    return value


def choose(
    order: Order,
    unknown: Bool[Tensor, "B L"],
    drawn: Drawn,
    gumbel: Float[Tensor, "B L"],
    *,
    counts: Sequence[int],
    progress: float,
) -> Bool[Tensor, "B L"]:
    """Choose the positions to keep by an order of `CHOSEN`, after all unknown positions were drawn.

    Args:
        order: the order.
        unknown: positions to choose from.
        drawn: tokens, log-probabilities and entropies at every position, [B, L] each.
        gumbel: standard Gumbel noise.
        counts: number of positions to keep in every row ("confidence"), or at least ("entropy").
        progress: 0 at the first step, 1 at the last.

    Returns:
        [B, L], True = kept.

    Source:
        arXiv 2202.04200 (confidence with annealed noise); arXiv 2505.24857, section 4 (entropy bound: of the most
        certain positions the largest set whose entropies sum to at most gamma beyond the largest one).
    """
    least = torch.tensor(counts, device=unknown.device)[:, None]
    # Rounded, so that positions of equal certainty rank by place, not by the last bit, which the batch may change.
    log_prob, entropy = (x.mul(1e9).round() / 1e9 for x in (drawn.log_prob, drawn.entropy))
    if order.name == "confidence":
        score = log_prob + order.gumbel * (1 - progress) * gumbel
        return _ranks(score.masked_fill(~unknown, -torch.inf)) < least
    assert order.name == "entropy", order.name
    entropy = entropy.masked_fill(~unknown, torch.inf)
    ascending = entropy.sort(dim=1).values
    # In ascending order the largest entropy of a prefix is its last: the sum of those before bounds the error.
    before = ascending.cumsum(1) - ascending
    allowed = (before <= order.gamma).sum(1, keepdim=True)
    return unknown & (_ranks(-entropy) < torch.maximum(allowed, least))


def _ranks(score: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Rank of every entry in its row, 0 for the largest."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
