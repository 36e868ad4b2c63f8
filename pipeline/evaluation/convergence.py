"""Convergence: validation of several runs against tokens and seconds of training, from their MLflow histories."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64

from pipeline.reports import tables
from pipeline.reports.figures import History, finite

SPEED = "train/tokens_per_second"
_MULTIPLES = (2.0, 1.5, 1.0)  # of the best value that all runs reach


@dataclass(frozen=True)
class Curve:
    """Validation of one run.

    Attributes:
        model: its name.
        steps, tokens, seconds, values: of every validation. Tokens are those of the rows that were read; seconds
            are those of training steps, without validation, checkpoints and the time between restarts.
    """

    model: str
    steps: Float64[np.ndarray, "n"]
    tokens: Float64[np.ndarray, "n"]
    seconds: Float64[np.ndarray, "n"]
    values: Float64[np.ndarray, "n"]


def curve(model: str, history: History, metric: str, tokens_per_step: int) -> Curve | None:
    """Make the curve of a run from its history.

    Args:
        model: name of the curve.
        history: (step, value) points under `metric` and `train/tokens_per_second`, which is the mean since the
            point before.
        metric: key of the validation.
        tokens_per_step: tokens of the rows of one update.

    Returns:
        The curve; None for a history without validation or without speed.
    """
    steps, values = finite(history.get(metric, ()))
    logged, speeds = finite(history.get(SPEED, ()))
    if not steps.size or not logged.size:
        return None
    elapsed = np.cumsum(np.diff(logged, prepend=0) * tokens_per_step / speeds)
    seconds = np.interp(steps, [0, *logged], [0, *elapsed])
    return Curve(model, steps, steps * tokens_per_step, seconds, values)


def targets(curves: Sequence[Curve]) -> list[float]:
    """List values to reach, the easiest first: multiples of the best value that every run reaches.

    Args:
        curves: of the runs.
    """
    worst = max(float(curve.values.min()) for curve in curves)
    digits = 2 - math.floor(math.log10(worst))
    rounded = math.ceil(worst * 10**digits) / 10**digits  # up, so that all runs do reach it
    return [rounded * multiple for multiple in _MULTIPLES]


def reach(curve: Curve, target: float) -> tuple[float, float, float] | None:
    """Find when a value is reached for the first time, on straight lines between validations.

    Args:
        curve: of the run.
        target: the value.

    Returns:
        Steps, tokens and seconds (those of the first validation where it is below the target already); None where
        the target is never reached.
    """
    below = np.flatnonzero(curve.values <= target)
    if not below.size:
        return None
    after = int(below[0])
    pair = [after, max(after - 1, 0)]
    axes = (curve.steps, curve.tokens, curve.seconds)
    steps, tokens, seconds = (float(np.interp(target, curve.values[pair], axis[pair])) for axis in axes)
    return steps, tokens, seconds


def table(curves: Sequence[Curve], metric: str) -> pd.DataFrame:
    """Make a table of texts with a row for every target and run.

    Args:
        curves: of the runs.
        metric: perplexity or loss.
    """
    rows, units = [], ("steps", "tokens", "seconds of training")
    for target in targets(curves):
        for curve in curves:
            reached = reach(curve, target)
            bound = "at most " if curve.values[0] <= target else ""
            cells = ["not reached"] * 3 if reached is None else [f"{bound}{value:,.0f}" for value in reached]
            rows.append(
                {
                    f"validation {metric}": tables.short(target),
                    "model": curve.model,
                    **dict(zip(units, cells, strict=True)),
                    "best": tables.short(float(curve.values.min())),
                }
            )
    return tables.table_of(rows)


def to_csv(curves: Sequence[Curve], metric: str) -> str:
    """Write the points of the curves as CSV.

    Args:
        curves: of the runs.
        metric: perplexity or loss.
    """
    points = pd.concat(pd.DataFrame(asdict(curve)) for curve in curves)
    points = points.astype({"steps": int, "tokens": int}).rename(columns={"steps": "step", "values": metric})
    return tables.to_csv(points.assign(seconds=points["seconds"].map("{:.3f}".format)))
