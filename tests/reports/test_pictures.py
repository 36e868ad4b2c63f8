"""Grids and order pictures hold what they are given."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.reports.pictures import caption_lines, captioned_grid, sample_grid, unmasking_order

COLOURS = np.random.default_rng(0).integers(30, 226, (6, 3)).astype(np.uint8)
IMAGES = np.broadcast_to(COLOURS[:, None, None], (6, 4, 4, 3))


def drawn(figure: Figure) -> np.ndarray:
    """The picture as pixels [h, w, 3]."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def share(pixels: np.ndarray, colour: np.ndarray) -> float:
    return float((pixels == colour).all(-1).mean())


@pytest.mark.parametrize("labels", [None, [4, 4, 1, 1, 0, 0], [3, 5, 3, 3, 3, 5]])
def test_every_image_is_in_the_grid(labels: list[int] | None) -> None:
    pixels = drawn(sample_grid(IMAGES, labels))
    shares = [share(pixels, colour) for colour in COLOURS]
    assert min(shares) > 0.02
    assert max(shares) < 1.3 * min(shares)


def test_captions_of_any_characters() -> None:
    """What the font lacks becomes squares, without a warning of matplotlib."""
    captions = [
        "un \N{LATIN SMALL LETTER E WITH ACUTE}l\ufffd\u0356phant",
        "\u72ac \U0001f436",
        "$x^$",
        "",
        "\n",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = drawn(captioned_grid(IMAGES[:5], captions))
    assert min(share(pixels, colour) for colour in COLOURS[:5]) > 0.02
    assert caption_lines(captions[0]) == "un \xe9l\ufffd\u25a1phant"
    assert caption_lines(captions[1]) == "\u25a1 \u25a1"


def test_what_is_not_revealed_is_grey() -> None:
    steps = np.tile(np.arange(1, 5), (6, 1))  # a grid of 2 x 2, one token a step
    figure = unmasking_order(IMAGES, steps, most=2)
    assert [axes.get_title() for axes in figure.axes[:5]] == [
        "step 1",
        "step 2",
        "step 3",
        "step 4",
        "revealed at",
    ]
    for known, axes in enumerate(figure.axes[:4], 1):
        shown = np.asarray(axes.images[0].get_array())
        assert (shown == COLOURS[0]).all(-1).mean() == known / 4
        assert (shown == 208).all(-1).mean() == 1 - known / 4
    assert np.array_equal(figure.axes[4].images[0].get_array(), [[1, 2], [3, 4]])
