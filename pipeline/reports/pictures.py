"""Figures of sampled images: labelled grids, and the order in which tokens were revealed."""

import textwrap
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib import font_manager
from matplotlib.figure import Figure

from pipeline.errors import printable

_INK, _GREY = "#22262b", "#7a828c"
_HIDDEN = 208  # grey level of tokens that are not revealed yet
_COLUMNS = 8  # of a grid without labels
_CAPTIONED, _WIDTH = 4, 28  # columns of a grid with captions, and characters of their lines
_SQUARE = "\N{WHITE SQUARE}"
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps, at which a sample is shown


def sample_grid(images: UInt8[np.ndarray, "n S S 3"], labels: Sequence[int] | None = None) -> Figure:
    """Arrange images in a grid; with labels, in one column per class under its number.

    Args:
        images: of one size.
        labels: class of every image, None for unconditional samples.
    """
    if labels is None:
        groups, names = [images[i::_COLUMNS] for i in range(min(_COLUMNS, len(images)))], [""] * _COLUMNS
    else:
        classes = list(dict.fromkeys(labels))
        groups, names = [images[np.asarray(labels) == label] for label in classes], [*map(str, classes)]
    height = max(map(len, groups))
    figure = Figure(figsize=(0.9 * len(groups), 0.9 * height + 0.3), dpi=150)
    axes = figure.subplots(height, len(groups), squeeze=False)
    top = 1 - 0.28 / (0.9 * height + 0.3)
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=0.01, wspace=0.06, hspace=0.06)
    for cell in axes.flat:
        cell.set_axis_off()
    for column, group, name in zip(axes.T, groups, names, strict=False):
        column[0].set_title(name, fontsize=10, color=_INK, pad=3)
        for cell, image in zip(column, group, strict=False):
            cell.imshow(image, interpolation="nearest")
    return figure


def captioned_grid(images: UInt8[np.ndarray, "n S S 3"], captions: Sequence[str]) -> Figure:
    """Arrange images in a grid, each under its caption.

    Args:
        images: of one size.
        captions: of the images.
    """
    columns = min(_CAPTIONED, len(images))
    height = -(-len(images) // columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * height), dpi=150, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for cell in axes.flat:
        cell.set_axis_off()
    for cell, image, caption in zip(axes.flat, images, captions, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set_title(caption_lines(caption), fontsize=7, color=_INK, pad=3)
    return figure


def caption_lines(caption: str) -> str:
    """Break a caption into a few short lines, which mean nothing to matplotlib but text.

    Characters that the figures' font lacks become squares.

    Args:
        caption: of any length.
    """
    drawable = "".join(c if ord(c) in _characters() else _SQUARE for c in printable(caption))
    lines = textwrap.wrap(drawable, _WIDTH, max_lines=4, placeholder=" ...") or ["(empty)"]
    return "\n".join(lines).replace("$", r"\$")


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """The characters of the font in which figures are written, by their numbers."""
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def unmasking_order(
    images: UInt8[np.ndarray, "n S S 3"], revealed_at: Int[np.ndarray, "n T"], most: int = 5
) -> Figure:
    """Show which tokens of samples were known after a quarter of the steps, a half, ..., and when each was revealed.

    Args:
        images: the samples.
        revealed_at: step of every token of the grid, row by row, from 1.
        most: largest number of samples that are shown.
    """
    images, revealed_at = images[:most], revealed_at[:most]
    grid, steps = round(revealed_at.shape[1] ** 0.5), int(revealed_at.max())
    orders, factor = revealed_at.reshape(-1, grid, grid), images.shape[1] // grid
    size = (1.3 * (len(_SHARES) + 1) + 0.6, 1.3 * len(images) + 0.3)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(images), len(_SHARES) + 1, squeeze=False)
    for line, image, order in zip(axes, images, orders, strict=True):
        for cell, share in zip(line, _SHARES, strict=False):
            hidden = (order > np.ceil(share * steps)).repeat(factor, 0).repeat(factor, 1)
            cell.imshow(np.where(hidden[..., None], _HIDDEN, image).astype(np.uint8), interpolation="nearest")
        shown = line[-1].imshow(order, cmap="viridis", vmin=1, vmax=steps, interpolation="nearest")
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    for cell, share in zip(axes[0], _SHARES, strict=False):
        cell.set_title(f"step {int(np.ceil(share * steps))}", fontsize=9, color=_INK)
    axes[0, -1].set_title("revealed at", fontsize=9, color=_INK)
    bar = figure.colorbar(shown, ax=axes[:, -1], fraction=0.08)
    bar.ax.tick_params(labelsize=8, colors=_GREY)
    return figure
