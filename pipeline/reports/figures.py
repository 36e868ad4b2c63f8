"""Pictures of a run. Plain `Figure` objects: no window system, no state shared between threads."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

_BLUE, _RED, INK, GREY = "#2563a8", "#c2452d", "#22262b", "#7a828c"
_MODELS = (_BLUE, _RED, "#2e8540", "#8a5fb0", "#b7791f", "#0f8b8d")  # one after the other
_WINDOWS = 20  # the smooth curve looks at a twentieth of the run at a time
_LABEL_HEIGHT = 0.06  # of an axis, so that labels beside it do not overlap
_HUGE = 1e300  # MLflow stores infinity as 1.8e308


def loss_curve(
    history: Mapping[str, Sequence[tuple[int, float]]], references: Mapping[str, float] | None = None
) -> Figure:
    """Training loss (raw and smoothed) beside validation perplexity (images: loss) with references.

    Args:
        history: (step, value) points by step under `train/loss` (nats per token) and `validation/perplexity`,
            or `validation/loss`; either may be missing or empty, and values that are not finite are left out.
        references: perplexities to compare with, such as `{"unigram": 27.4, "bigram": 14.3}`.
    """
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_loss(left, *finite(history.get("train/loss", ())))
    metric, unit = "perplexity", "exp(nats per token)"
    if "validation/loss" in history:
        metric, unit = "loss", "nats per masked token"
    style(right, f"Validation {metric}", unit)
    _draw_validation(right, *finite(history.get(f"validation/{metric}", ())), references or {})
    return figure


def quality_against_steps(
    points: Mapping[str, Sequence[tuple[int, float, float]]], reference: float | None = None
) -> Figure:
    """Perplexity and entropy of samples by the number of steps: the teacher blue, the last student red.

    Args:
        points: (steps, perplexity, entropy in nats) by model, the teacher first.
        reference: perplexity of held-out rows under the same bigram model.
    """
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    style(left, "Samples under the bigram model", "perplexity")
    style(right, "Entropy of a sample", "nats")
    ends: list[list[tuple[float, str, str]]] = [[], []]
    for index, (model, found) in enumerate(points.items()):
        steps, *columns = zip(*sorted(found), strict=True)
        color = _BLUE if index == 0 else _RED if index == len(points) - 1 else GREY
        for axes, values, labels in zip((left, right), columns, ends, strict=True):
            axes.plot(steps, values, "o-", color=color, linewidth=1.6, markersize=4)
            labels.append((values[-1], model, color))
    if reference is not None:
        left.axhline(reference, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends[0].append((reference, f"held out {reference:.4g}", INK))
    counts = sorted({steps for found in points.values() for steps, _, _ in found})
    for axes, labels in zip((left, right), ends, strict=True):
        axes.set_xlabel("sampling steps", fontsize=9, color=GREY)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        label_right(axes, labels)
    return figure


def frontier(
    points: Mapping[str, Sequence[tuple[int, float, Sequence[float]]]],
    names: Sequence[str],
    references: Sequence[float] = (),
) -> Figure:
    """Figures of samples against the speed of drawing them: a panel a figure, a line a model, a dot a step count.

    Args:
        points: (steps, tokens/s, figures) by model.
        names: of the figures, for the axes.
        references: their values for real data; empty where there are none.
    """
    figure = Figure(figsize=(5.4 * len(names), 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, (axes, name) in enumerate(zip(panels, names, strict=True)):
        style(axes, name, name)
        axes.set_xlabel("tokens/s", fontsize=9, color=GREY)
        for (model, found), color in zip(points.items(), cycle(_MODELS), strict=False):
            speeds = [speed for _, speed, _ in found]
            values = [figures[panel] for _, _, figures in found]
            axes.plot(speeds, values, "o-", color=color, linewidth=1.6, markersize=5, label=model)
            for (steps, speed, _), value in zip(found, values, strict=True):
                axes.annotate(
                    str(steps),
                    (speed, value),
                    xytext=(4, 5),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=color,
                )
        shown = [figures[panel] for found in points.values() for _, _, figures in found]
        if references:
            axes.axhline(references[panel], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            shown.append(references[panel])
        _logarithmic(axes.yaxis, shown)
        _logarithmic(axes.xaxis, [speed for found in points.values() for _, speed, _ in found])
        axes.margins(x=0.08)
        if references:
            label_right(axes, [(references[panel], f"real {references[panel]:.4g}", INK)])
    panels[0].legend(frameon=False, fontsize=8.5, title="dots: sampling steps", title_fontsize=8)
    return figure


def convergence(curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], metric: str) -> Figure:
    """Validation against tokens read, and against seconds of training.

    Args:
        curves: (tokens, seconds, values) by model.
        metric: perplexity or loss.
    """
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (axes, unit) in enumerate([(left, "tokens"), (right, "seconds of training")]):
        style(axes, f"Validation {metric} by {unit}", metric)
        axes.set_xlabel(unit, fontsize=9, color=GREY)
        ends = []
        for (model, found), color in zip(curves.items(), cycle(_MODELS), strict=False):
            values = found[2]
            axes.plot(found[index], values, "o-", color=color, linewidth=1.6, markersize=3.5)
            ends.append((float(values[-1]), f"{model} {values[-1]:.4g}", color))
        _logarithmic(axes.yaxis, [value for found in curves.values() for value in found[2]])
        label_right(axes, ends)
    return figure


def _logarithmic(axis: Axis, shown: Sequence[float]) -> None:
    """Plain numbers, on a logarithmic scale where the values span enough of one and none is below."""
    low, high = min(shown), max(shown)
    if 0 < 4 * low < high:
        (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())


def _draw_loss(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    style(axes, "Training loss", "nats per token")
    if not steps.size:
        _say_empty(axes)
        return
    smooth = _smooth(losses)
    axes.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth, color=_BLUE, linewidth=1.8)
    axes.plot(steps[-1:], smooth[-1:], "o", color=_BLUE, markersize=5)
    # Set by the smooth curve at the top: one spike must not flatten all the rest.
    low, high = losses.min(), smooth.max()
    pad = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - pad, high + pad)
    label_right(axes, [(float(smooth[-1]), f"{smooth[-1]:.3g}", _BLUE)])


def _draw_validation(
    axes: Axes, steps: np.ndarray, values: np.ndarray, references: Mapping[str, float]
) -> None:
    if not steps.size:
        _say_empty(axes)
        return
    labels = [(float(values[-1]), f"{values[-1]:.4g}", _RED)]
    for name, value in references.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        labels.append((value, f"{name} {value:.4g}", INK))
    axes.plot(steps, values, color=_RED, linewidth=1.8, marker="o", markersize=3.5 if steps.size <= 40 else 0)
    axes.plot(steps[-1:], values[-1:], "o", color=_RED, markersize=5)
    shown = np.array([*values, *references.values()])
    if shown.max() > 4 * shown.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(shown.min() / 1.15, shown.max() * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_minor_locator(NullLocator())
    label_right(axes, labels)


def png(figure: Figure) -> bytes:
    """The picture as a PNG file's bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def finite(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a history as arrays, without those that are not finite."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table = table[np.abs(np.nan_to_num(table[:, 1], nan=np.inf)) < _HUGE]
    return table[:, 0], table[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving median (a mean would show a spike as a plateau), then mean; cut at both ends."""
    reach = max(1, len(values) // (2 * _WINDOWS))
    for average in (np.nanmedian, np.nanmean):
        padded = np.pad(values, reach, constant_values=np.nan)
        values = average(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
    return values


def style(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(unit, fontsize=9, color=GREY)
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9ced4")
    axes.tick_params(colors=GREY, labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step)))


def _short(value: float) -> str:
    """1200 -> '1.2k', 1000000 -> '1M'."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) beside the right end of the axes, pushed apart where they would overlap."""
    axes.get_ylim()  # settles the scale, which matplotlib otherwise leaves until it draws
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((0, value))[1]), text, color) for value, text, color in labels)
    floor = -1.0
    for height, text, color in placed:
        floor = max(height, floor + _LABEL_HEIGHT)
        weight = "normal" if color == INK else "bold"
        axes.text(
            1.015,
            floor,
            text,
            transform=axes.transAxes,
            va="center",
            color=color,
            fontsize=9,
            fontweight=weight,
        )


def _say_empty(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=GREY, fontsize=9)
