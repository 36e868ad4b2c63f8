"""Pictures of a sweep: learning curves, parallel coordinates, quality against sampling speed."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reports.figures import GREY, INK, label_right, style
from pipeline.sweeps.report import Row

_NAMED = 12  # variants that are named beside a picture
_COLORS = "viridis"


def learning_curves(table: Sequence[Row], metric: str) -> Figure:
    """The metric by step: the mean over seeds as a line, from the least to the greatest as a band."""
    figure = Figure(figsize=(8.5, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    style(axes, "Variants while they learn", metric)
    ends = []
    for row, color in zip(table, _colors(len(table)), strict=True):
        curves = [dict(trial.curve) for trial in row.trials if trial.curve]
        steps = sorted({step for curve in curves for step in curve})
        if not steps:
            continue
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        means = [float(np.mean(there)) for there in values]
        axes.plot(steps, means, color=color, linewidth=1.6, marker="o", markersize=3)
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, linewidth=0
        )
        ends.append((means[-1], row.variant, color))
    label_right(axes, ends[:_NAMED])
    return figure


def parallel_coordinates(table: Sequence[Row], metric: str, mode: Literal["min", "max"]) -> Figure:
    """An axis a dimension of the space and the metric last; a line a variant, the best one thick."""
    entries = list(dict.fromkeys(entry for row in table for entry in row.choices))
    shown = [row for row in table if not math.isnan(row.metric.mean)]
    figure = Figure(figsize=(1.8 * (len(entries) + 1) + 1, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    columns = [_heights(axes, index, entry, shown) for index, entry in enumerate(entries)]
    finals = [row.metric.mean for row in shown]
    low, high = (min(finals), max(finals)) if finals else (0.0, 1.0)
    columns.append([(value - low) / (high - low or 1) for value in finals])
    for value in dict.fromkeys((low, high)):
        axes.text(
            len(entries) + 0.04, (value - low) / (high - low or 1), f"{value:.4g}", fontsize=8, color=INK
        )
    order = sorted(range(len(shown)), key=lambda i: finals[i], reverse=mode == "min")
    colors = _colors(len(shown))
    for rank, index in enumerate(order):  # the best last, on top
        heights = [column[index] for column in columns]
        color, thick = colors[len(order) - 1 - rank], rank == len(order) - 1
        axes.plot(range(len(columns)), heights, color=color, linewidth=2.6 if thick else 1.2, alpha=0.85)
    names = [*(entry.rpartition(".")[2] for entry in entries), metric.rpartition("/")[2]]
    axes.set_xticks(range(len(columns)), names, fontsize=9, color=INK)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    for place in range(len(columns)):
        axes.axvline(place, color="#c9ced4", linewidth=1, zorder=0)
    axes.set_title("Choices and what they lead to", loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def quality_against_speed(table: Sequence[Row], metric: str) -> Figure:
    """The metric against the tokens that a variant draws a second, with the spread over seeds."""
    figure = Figure(figsize=(8.5, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    style(axes, "Quality and sampling speed", metric)
    axes.set_xlabel("tokens/s when sampling", fontsize=9, color=GREY)
    ends = []
    for row, color in zip(table, _colors(len(table)), strict=True):
        speed, quality = row.sample_rate, row.metric
        if math.isnan(speed.mean) or math.isnan(quality.mean):
            continue
        spread = None if math.isnan(quality.deviation) else quality.deviation
        axes.errorbar(speed.mean, quality.mean, yerr=spread, fmt="o", color=color, markersize=5, capsize=2)
        ends.append((quality.mean, row.variant, color))
    axes.margins(x=0.1, y=0.15)
    label_right(axes, ends[:_NAMED])
    return figure


def _heights(axes: Axes, place: int, entry: str, table: Sequence[Row]) -> list[float]:
    """Where each variant crosses the axis of one dimension, from 0 to 1; nan where it has none."""
    values = [row.choices.get(entry) for row in table]
    numbers = [value for value in values if isinstance(value, float)]
    if numbers and len(numbers) == sum(value is not None for value in values):
        logs = min(numbers) > 0 and max(numbers) / min(numbers) > 10
        scale = math.log if logs else float
        low, high = scale(min(numbers)), scale(max(numbers))
        ticks = {f"{min(numbers):.3g}": 0.0, f"{max(numbers):.3g}": 1.0}
        heights = [
            (scale(value) - low) / (high - low or 1) if isinstance(value, float) else math.nan
            for value in values
        ]
    else:
        labels = list(dict.fromkeys(str(value) for value in values if value is not None))
        ticks = {label: index / max(1, len(labels) - 1) for index, label in enumerate(labels)}
        heights = [math.nan if value is None else ticks[str(value)] for value in values]
    for text, height in ticks.items():
        axes.text(place + 0.04, height, text, fontsize=8, color=INK)
    return heights


def _colors(count: int) -> list[str]:
    """From the best variant's dark colour to the last one's light one."""
    scale = colormaps[_COLORS]
    shades = [scale(0.9 * index / max(1, count - 1)) for index in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade[:3]) for shade in shades]
