"""Figures of a sweep: learning curves, parallel coordinates, quality against sampling speed."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.reports.figures import INK, label_right, panels
from pipeline.sweeps.report import Row

_NAMED = 12  # variants that are named beside a figure
_SIZE = (8.5, 4.6)


def learning_curves(table: Sequence[Row], metric: str) -> Figure:
    """Draw the metric by step: the mean over seeds as a line, from the least to the greatest as a band.

    Args:
        table: rows of the sweep.
        metric: name of the metric.
    """
    figure, (axes,) = panels(("Learning curves of the variants", metric, "step"), size=_SIZE)
    ends = []
    for row, color in zip(table, _colors(len(table)), strict=True):
        points = [point for trial in row.trials for point in trial.curve]
        if not points:
            continue
        values = pd.DataFrame(points).groupby(0)[1]  # by step
        means = values.mean()
        axes.plot(means.index, means, color=color, linewidth=1.6, marker="o", markersize=3)
        axes.fill_between(means.index, values.min(), values.max(), color=color, alpha=0.12, linewidth=0)
        ends.append((float(means.iloc[-1]), row.variant, color))
    label_right(axes, ends[:_NAMED])
    return figure


def parallel_coordinates(table: Sequence[Row], metric: str, mode: Literal["min", "max"]) -> Figure:
    """Draw an axis per dimension of the space, the metric last, and a line per variant, the best one thick.

    Args:
        table: rows of the sweep.
        metric: name of the metric.
        mode: whether lower ("min") or higher ("max") values of the metric are better.
    """
    entries = list(dict.fromkeys(entry for row in table for entry in row.choices))
    shown = [row for row in table if not math.isnan(row.metric.mean)]
    figure = Figure(figsize=(1.8 * (len(entries) + 1) + 1, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    columns = [
        _heights(axes, index, [row.choices.get(entry) for row in shown])
        for index, entry in enumerate(entries)
    ]
    finals = [row.metric.mean for row in shown]
    columns.append(_heights(axes, len(entries), finals))
    order = sorted(range(len(shown)), key=lambda i: finals[i], reverse=mode == "min")
    for index, color in zip(order, reversed(_colors(len(shown))), strict=True):  # the best last, on top
        heights = [column[index] for column in columns]
        width = 2.6 if index == order[-1] else 1.2
        axes.plot(range(len(columns)), heights, color=color, linewidth=width, alpha=0.85)
    names = [name.rpartition(".")[2] for name in entries]
    axes.set_xticks(range(len(columns)), [*names, metric.rpartition("/")[2]], fontsize=9, color=INK)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    for index in range(len(columns)):
        axes.axvline(index, color="#c9ced4", linewidth=1, zorder=0)
    axes.set_title("Variants and their results", loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def quality_against_speed(table: Sequence[Row], metric: str) -> Figure:
    """Draw the metric against the tokens that a variant samples per second, with the spread over seeds.

    Args:
        table: rows of the sweep.
        metric: name of the metric.
    """
    figure, (axes,) = panels(("Quality and sampling speed", metric, "sampling tokens/s"), size=_SIZE)
    ends = []
    for row, color in zip(table, _colors(len(table)), strict=True):
        (speed, _), (quality, deviation) = row.sample_rate, row.metric
        if math.isnan(speed) or math.isnan(quality):
            continue
        # Without a deviation, which is nan, there is no bar.
        axes.errorbar(speed, quality, yerr=deviation, fmt="o", color=color, markersize=5, capsize=2)
        ends.append((quality, row.variant, color))
    axes.margins(x=0.1, y=0.15)
    label_right(axes, ends[:_NAMED])
    return figure


def _heights(axes: Axes, place: int, values: Sequence[str | float | None]) -> list[float]:
    """Label one axis and place every variant's value on it, from 0 to 1; nan where it has none."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, float) for value in known):
        numbers = np.array(values, dtype=np.float64)  # None becomes nan
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        ticks = {f"{low:.4g}": 0.0, f"{high:.4g}": 1.0}
        if low > 0 and high / low > 10:
            numbers, low, high = np.log(numbers), np.log(low), np.log(high)
        heights = ((numbers - low) / (high - low or 1)).tolist()
    else:
        labels = list(dict.fromkeys(map(str, known)))
        ticks = {label: index / max(1, len(labels) - 1) for index, label in enumerate(labels)}
        heights = [math.nan if value is None else ticks[str(value)] for value in values]
    for text, height in ticks.items():
        axes.text(place + 0.04, height, text, fontsize=8, color=INK)
    return heights


def _colors(count: int) -> list[str]:
    """List colours from the best variant's dark one to the last one's light one."""
    return [to_hex(colormaps["viridis"](0.9 * index / max(1, count - 1))) for index in range(count)]
