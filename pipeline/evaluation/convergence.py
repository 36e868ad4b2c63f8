"""Convergence: validation of several runs against tokens and seconds of training, from their MLflow histories."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from pipeline.reports.figures import finite
from pipeline.reports.measures import short

SPEED = "train/tokens_per_second"
_MULTIPLES = (2.0, 1.5, 1.0)  # of the best value that all runs reach


@dataclass(frozen=True)
class Curve:
    """One run's validation.

    Attributes:
        steps, tokens, seconds, values: of every validation. Tokens are those of the rows that were read; seconds
            are those of training steps, without validation, checkpoints and the time between restarts.
    """

    model: str
    steps: Float64[np.ndarray, "n"]
    tokens: Float64[np.ndarray, "n"]
    seconds: Float64[np.ndarray, "n"]
    values: Float64[np.ndarray, "n"]


def curve(
    model: str, history: Mapping[str, Sequence[tuple[int, float]]], metric: str, tokens_a_step: int
) -> Curve | None:
    """A run's curve from its history; None where it has no validation or no speed.

    Args:
        history: (step, value) points under `metric` and `train/tokens_per_second`, which is the mean since the
            point before.
    """
    steps, values = finite(history.get(metric, ()))
    logged, speeds = finite(history.get(SPEED, ()))
    if not steps.size or not logged.size:
        return None
    passed = np.cumsum(np.diff(logged, prepend=0) * tokens_a_step / speeds)
    seconds = np.interp(steps, [0, *logged], [0, *passed])
    return Curve(model, steps, steps * tokens_a_step, seconds, values)


def targets(curves: Sequence[Curve]) -> list[float]:
    """Values to reach, the easiest first: the best that every run reaches, and multiples of it."""
    worst = max(float(one.values.min()) for one in curves)
    digits = 2 - math.floor(math.log10(worst))
    rounded = math.ceil(worst * 10**digits) / 10**digits  # up, so that all runs do reach it
    return [rounded * multiple for multiple in _MULTIPLES]


def reach(one: Curve, target: float) -> tuple[float, float, float] | None:
    """Steps, tokens and seconds until a value is reached for the first time, between validations on a line.

    None where it never is; the first validation's where that is below already.
    """
    below = np.flatnonzero(one.values <= target)
    if not below.size:
        return None
    at = int(below[0])
    share = 1.0
    if at:
        share = float((one.values[at - 1] - target) / (one.values[at - 1] - one.values[at]))
    found = [
        float(axis[at] if not at else axis[at - 1] + share * (axis[at] - axis[at - 1]))
        for axis in (one.steps, one.tokens, one.seconds)
    ]
    return found[0], found[1], found[2]


def table(curves: Sequence[Curve], metric: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people: a row for every value to reach and run."""
    head = [f"validation {metric}", "model", "steps", "tokens", "seconds of training", "best"]
    rows = []
    for target in targets(curves):
        for one in curves:
            found = reach(one, target)
            first = "at most " if found is not None and one.values[0] <= target else ""
            cells = ["not reached"] * 3
            if found is not None:
                cells = [f"{first}{found[0]:,.0f}", f"{first}{found[1]:,.0f}", f"{first}{found[2]:,.0f}"]
            rows.append([short(target), one.model, *cells, short(float(one.values.min()))])
    return head, rows


def to_csv(curves: Sequence[Curve], metric: str) -> str:
    """The data behind the figure."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(["model", "step", "tokens", "seconds", metric])
    for one in curves:
        for step, tokens, seconds, value in zip(one.steps, one.tokens, one.seconds, one.values, strict=True):
            write.writerow([one.model, int(step), int(tokens), f"{seconds:.3f}", value])
    return out.getvalue()
