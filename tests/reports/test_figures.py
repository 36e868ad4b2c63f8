"""The loss curve: what it shows, and that odd histories still give a picture."""

import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.reports.figures import heat_map, loss_curve

HISTORY = {
    "train/loss": [(step, 3 + math.exp(-step / 100) + 0.1 * math.sin(step)) for step in range(0, 1000, 10)],
    "validation/perplexity": [(step, 20 + 20 * math.exp(-step / 200)) for step in range(0, 1000, 100)],
}
REFERENCES = {"unigram": 27.4, "bigram": 14.3}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_panels_curves_and_labels() -> None:
    figure = loss_curve(HISTORY, REFERENCES)
    loss, perplexity = figure.axes
    raw, smooth = loss.lines[:2]
    assert np.array_equal(raw.get_ydata(), [value for _, value in HISTORY["train/loss"]])
    tail = slice(-30, None)
    assert np.std(np.asarray(smooth.get_ydata())[tail]) < 0.5 * np.std(np.asarray(raw.get_ydata())[tail])
    assert {text.get_text() for text in perplexity.texts} == {"unigram 27.4", "bigram 14.3", "20.22"}
    assert {line.get_ydata()[0] for line in perplexity.lines if len(set(line.get_ydata())) == 1} >= {
        27.4,
        14.3,
    }
    low, high = perplexity.get_ylim()
    assert low < 14.3
    assert high > 40
    assert len(png(figure)) > 10_000


def test_labels_do_not_overlap() -> None:
    figure = loss_curve({"validation/perplexity": [(0, 30.0), (10, 27.0)]}, {"a": 27.0, "b": 27.1, "c": 26.9})
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[1].texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_a_spike_does_not_flatten_the_curve() -> None:
    spiked = [(step, 1e4 if step == 500 else value) for step, value in HISTORY["train/loss"]]
    axes = loss_curve({"train/loss": spiked}).axes[0]
    assert axes.get_ylim()[1] < 5
    assert np.max(axes.lines[1].get_ydata()) < 5


def test_wide_range_is_logarithmic() -> None:
    history = {"validation/perplexity": [(0, 250.0), (100, 20.0)]}
    assert loss_curve(history, REFERENCES).axes[1].get_yscale() == "log"
    assert loss_curve(HISTORY, REFERENCES).axes[1].get_yscale() == "linear"


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"train/loss": [], "validation/perplexity": []},
        {"train/loss": [(0, 5.0)], "validation/perplexity": [(0, 5.0)]},
        {"train/loss": [(0, math.nan), (1, math.inf), (2, 1.8e308), (3, 2.0), (4, 2.0)]},
        {"validation/perplexity": [(0, math.inf)]},
    ],
)
def test_odd_histories(history: dict[str, list[tuple[int, float]]]) -> None:
    assert len(png(loss_curve(history, REFERENCES))) > 5_000


def test_heat_map_writes_every_value_in_its_place() -> None:
    cells = {"PGM, guidance 0": {8: 100.0, 16: 12.5}, "MaskGIT": {16: 3.25, 32: math.inf}}
    figure = heat_map(cells, "FID", "sampling steps")
    axes = figure.axes[0]
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places == {"100": (0, 0), "12.5": (1, 0), "3.25": (1, 1)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "32"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(cells)
    assert len(png(figure)) > 5_000
