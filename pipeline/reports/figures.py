"""Figures of a run: plain `Figure` objects, which need no window system and share no state between threads."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

_BLUE, _RED, INK, GREY = "#2563a8", "#c2452d", "#22262b", "#7a828c"
_MODELS = (_BLUE, _RED, "#2e8540", "#8a5fb0", "#b7791f", "#0f8b8d")  # colours of models, in turn
_WINDOWS = 20  # the smooth curve averages over a twentieth of the run
_LABEL_HEIGHT = 0.06  # of an axis, so that labels beside it do not overlap
_HUGE = 1e300  # MLflow stores infinity as 1.8e308

Label = tuple[float, str, str]  # value, text, colour
History = Mapping[str, Sequence[tuple[int, float]]]  # (step, value) points of every metric


def loss_curve(history: History, references: Mapping[str, float] | None = None) -> Figure:
    """Draw the training loss, raw and smoothed, and the validation perplexity (images: loss) with references.

    Args:
        history: (step, value) points by step under `train/loss` (nats per token) and `validation/perplexity`,
            or `validation/loss`; either may be missing or empty, and values that are not finite are left out.
        references: perplexities to compare with, such as `{"unigram": 27.4, "bigram": 14.3}`.
    """
    metric, unit = "perplexity", "exp(nats per token)"
    if "validation/loss" in history:
        metric, unit = "loss", "nats per masked token"
    figure, (left, right) = panels(
        ("Training loss", "nats per token", "step"), (f"Validation {metric}", unit, "step")
    )
    steps, losses = finite(history.get("train/loss", ()))
    if steps.size:
        # The centred moving median (a mean would show a spike as a plateau), then the mean; both are cut at the ends.
        window = {"window": 2 * max(1, len(losses) // (2 * _WINDOWS)) + 1, "center": True, "min_periods": 1}
        smooth = pd.Series(losses).rolling(**window).median().rolling(**window).mean().to_numpy()
        left.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=0.8)
        left.plot(steps, smooth, color=_BLUE, linewidth=1.8)
        left.plot(steps[-1:], smooth[-1:], "o", color=_BLUE, markersize=5)
        # The upper limit comes from the smooth curve: one spike must not flatten all the rest.
        low, high = losses.min(), smooth.max()
        pad = 0.06 * (high - low) or 0.1
        left.set_ylim(low - pad, high + pad)
        label_right(left, [(float(smooth[-1]), f"{smooth[-1]:.3g}", _BLUE)])
    else:
        _draw_nothing(left)
    steps, values = finite(history.get(f"validation/{metric}", ()))
    if steps.size:
        references = references or {}
        labels = [_reference(right, value, name) for name, value in references.items()]
        size = 3.5 if steps.size <= 40 else 0
        right.plot(steps, values, color=_RED, linewidth=1.8, marker="o", markersize=size)
        right.plot(steps[-1:], values[-1:], "o", color=_RED, markersize=5)
        _logarithmic(right.yaxis, [*values, *references.values()])
        label_right(right, [*labels, (float(values[-1]), f"{values[-1]:.4g}", _RED)])
    else:
        _draw_nothing(right)
    return figure


def quality_against_steps(
    points: Mapping[str, Sequence[tuple[int, float, float]]], reference: float | None = None
) -> Figure:
    """Draw perplexity and entropy of samples by the number of steps: the teacher blue, the last student red.

    Args:
        points: (steps, perplexity, entropy in nats) by model, the teacher first.
        reference: perplexity of held-out rows under the same bigram model.
    """
    figure, axes = panels(
        ("Samples under the bigram model", "perplexity", "sampling steps"),
        ("Entropy of a sample", "nats", "sampling steps"),
    )
    labels: list[list[Label]] = [[], []]
    for index, (model, values) in enumerate(points.items()):
        steps, *columns = zip(*sorted(values), strict=True)
        color = _BLUE if index == 0 else _RED if index == len(points) - 1 else GREY
        for panel, column, ends in zip(axes, columns, labels, strict=True):
            panel.plot(steps, column, "o-", color=color, linewidth=1.6, markersize=4)
            ends.append((column[-1], model, color))
    if reference is not None:
        labels[0].append(_reference(axes[0], reference, "held out"))
    counts = sorted({steps for values in points.values() for steps, _, _ in values})
    for panel, ends in zip(axes, labels, strict=True):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(counts))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        label_right(panel, ends)
    return figure


def frontier(
    points: Mapping[str, Sequence[tuple[int, float, Sequence[float]]]],
    names: Sequence[str],
    references: Sequence[float] = (),
) -> Figure:
    """Draw metrics of samples against the sampling speed: a panel per metric, a line per model.

    Args:
        points: (steps, tokens/s, values of the metrics) by model.
        names: of the metrics, for the axes.
        references: the metrics of real data; empty where there are none.
    """
    figure, axes = panels(*((name, name, "tokens/s") for name in names), size=(5.4, 4.2))
    speeds = [speed for values in points.values() for _, speed, _ in values]
    for index, panel in enumerate(axes):
        for (model, values), color in zip(points.items(), cycle(_MODELS), strict=False):
            line = [(speed, metrics[index]) for _, speed, metrics in values]
            panel.plot(*zip(*line, strict=True), "o-", color=color, linewidth=1.6, markersize=5, label=model)
            for (steps, _, _), point in zip(values, line, strict=True):
                label = panel.annotate(str(steps), point, (4, 5), textcoords="offset points", fontsize=7.5)
                label.set_color(color)
        shown = [metrics[index] for values in points.values() for _, _, metrics in values]
        _logarithmic(panel.yaxis, [*shown, *references[index : index + 1]])
        _logarithmic(panel.xaxis, speeds)
        panel.margins(x=0.08)
        if references:
            label_right(panel, [_reference(panel, references[index], "real")])
    axes[0].legend(frameon=False, fontsize=8.5, title="dots: sampling steps", title_fontsize=8)
    return figure


def heat_map(cells: Mapping[str, Mapping[int, float]], metric: str, x_label: str) -> Figure:
    """Draw a metric as a table of colours: a row per name, a column per number; dark is small.

    Args:
        cells: values by row and column; a row may lack columns.
        metric: name of the metric.
        x_label: what the columns are.
    """
    columns = sorted({column for row in cells.values() for column in row})
    values = np.array([[row.get(column, np.nan) for column in columns] for row in cells.values()])
    size = (3.5 + 0.9 * len(columns), 1.2 + 0.32 * len(cells))
    figure, (axes,) = panels((metric, "", x_label), size=size)
    known = values[np.isfinite(values)]
    positive = known.size > 0 and known.min() > 0 and known.max() > 4 * known.min()
    image = axes.imshow(values, "viridis", aspect="auto", norm="log" if positive else "linear")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            color = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else INK
            axes.text(column, row, f"{value:.4g}", ha="center", va="center", fontsize=8.5, color=color)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.grid(False)
    return figure


def convergence(curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], metric: str) -> Figure:
    """Draw validation against tokens read, and against seconds of training.

    Args:
        curves: (tokens, seconds, values) by model.
        metric: perplexity or loss.
    """
    units = ("tokens", "seconds of training")
    figure, axes = panels(*((f"Validation {metric} by {unit}", metric, unit) for unit in units))
    for index, panel in enumerate(axes):
        ends = []
        for (model, curve), color in zip(curves.items(), cycle(_MODELS), strict=False):
            values = curve[2]
            panel.plot(curve[index], values, "o-", color=color, linewidth=1.6, markersize=3.5)
            ends.append((float(values[-1]), f"{model} {values[-1]:.4g}", color))
        _logarithmic(panel.yaxis, [value for curve in curves.values() for value in curve[2]])
        label_right(panel, ends)
    return figure


def panels(
    *labels: tuple[str, str, str], size: tuple[float, float] = (5.0, 3.8)
) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels side by side, in the style of all figures.

    Args:
        labels: title, label of the y axis and label of the x axis of every panel.
        size: width and height of a panel in inches.
    """
    figure = Figure(figsize=(size[0] * len(labels), size[1]), dpi=150, layout="constrained")
    every = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (title, y_label, x_label) in zip(every, labels, strict=True):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_ylabel(y_label, fontsize=9, color=GREY)
        axes.set_xlabel(x_label, fontsize=9, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9ced4")
        axes.tick_params(colors=GREY, labelsize=8.5, length=3)
        axes.grid(axis="y", color="#e8ebee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return figure, list(every)


def label_right(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels to the right of the axes at the heights of their values, pushed apart where they would overlap.

    Args:
        axes: of the values.
        labels: value, text and colour of every label.
    """
    axes.get_ylim()  # settles the scale, which matplotlib otherwise leaves until it draws
    to_axes = axes.transData + axes.transAxes.inverted()
    floor = -1.0
    heights = sorted((float(to_axes.transform((0, value))[1]), text, color) for value, text, color in labels)
    for height, text, color in heights:
        floor = max(height, floor + _LABEL_HEIGHT)
        label = axes.text(1.015, floor, text, transform=axes.transAxes, va="center", color=color, fontsize=9)
        label.set_fontweight("normal" if color == INK else "bold")


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def finite(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Split a history into steps and values, without those that are not finite.

    Args:
        points: (step, value) by step.
    """
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table = table[np.abs(np.nan_to_num(table[:, 1], nan=np.inf)) < _HUGE]
    return table[:, 0], table[:, 1]


def _logarithmic(axis: Axis, values: Sequence[float]) -> None:
    """Show plain numbers, on a logarithmic scale where the values are positive and span a factor above 4."""
    if 0 < 4 * min(values) < max(values):
        (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())


def _reference(axes: Axes, value: float, name: str) -> Label:
    """Draw a dashed horizontal line and return its label."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return value, f"{name} {value:.4g}", INK


def _short(value: float) -> str:
    """Write 1200 as '1.2k' and 1000000 as '1M'."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def _draw_nothing(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=GREY, fontsize=9)
