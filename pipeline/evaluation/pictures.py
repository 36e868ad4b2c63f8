"""Pictures of what image models draw: labelled grids, and the order in which tokens were revealed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

_INK, _GREY = "#22262b", "#7a828c"
_HIDDEN = 208  # grey level of what is not revealed yet
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps, at which a sample is shown


def sample_grid(
    images: UInt8[np.ndarray, "n S S 3"], labels: Sequence[int] | None = None, columns: int = 8
) -> Figure:
    """Images side by side; with labels, one row of pictures a class, its number in front.

    Args:
        labels: class of every image, None for unconditional samples.
        columns: of the grid, without labels; with them as many as a class has images.
    """
    if labels is None:
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        names = [""] * len(rows)
    else:
        classes = list(dict.fromkeys(labels))
        rows = [images[np.asarray(labels) == one] for one in classes]
        names = [str(one) for one in classes]
    width = max(map(len, rows))
    figure = Figure(figsize=(0.9 * width + 0.5, 0.9 * len(rows)), dpi=150)
    axes = figure.subplots(len(rows), width, squeeze=False)
    figure.subplots_adjust(
        left=0.5 / (0.9 * width + 0.5), right=0.99, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06
    )
    for line, pictures, name in zip(axes, rows, names, strict=True):
        for cell in line:
            cell.set_axis_off()
        for cell, picture in zip(line, pictures, strict=False):
            cell.imshow(picture, interpolation="nearest")
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", color=_INK)
    return figure


def unmasking_order(
    images: UInt8[np.ndarray, "n S S 3"], revealed_at: Int[np.ndarray, "n T"], most: int = 5
) -> Figure:
    """How samples came about: what was known after a quarter of the steps, a half, ..., and when each token came.

    Args:
        revealed_at: step of every token of the grid, row by row, from 1.
        most: samples shown.
    """
    images, revealed_at = images[:most], revealed_at[:most]
    grid, steps = round(revealed_at.shape[1] ** 0.5), int(revealed_at.max())
    when = revealed_at.reshape(-1, grid, grid)
    factor = images.shape[1] // grid
    figure = Figure(
        figsize=(1.3 * (len(_SHARES) + 1) + 0.6, 1.3 * len(images) + 0.3), dpi=150, layout="constrained"
    )
    axes = figure.subplots(len(images), len(_SHARES) + 1, squeeze=False)
    for line, image, order in zip(axes, images, when, strict=True):
        for cell, share in zip(line, _SHARES, strict=False):
            hidden = (order > np.ceil(share * steps)).repeat(factor, 0).repeat(factor, 1)
            cell.imshow(np.where(hidden[..., None], _HIDDEN, image).astype(np.uint8), interpolation="nearest")
        shown = line[-1].imshow(order, cmap="viridis", vmin=1, vmax=steps, interpolation="nearest")
        for cell in line:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
    for cell, share in zip(axes[0], _SHARES, strict=False):
        cell.set_title(f"step {int(np.ceil(share * steps))}", fontsize=9, color=_INK)
    axes[0, -1].set_title("revealed at", fontsize=9, color=_INK)
    bar = figure.colorbar(shown, ax=axes[:, -1], fraction=0.08)
    bar.ax.tick_params(labelsize=8, colors=_GREY)
    return figure
