"""Convergence from histories: time from speeds, values reached between validations, and its figure."""

import math

import numpy as np
import pytest

from pipeline.evaluation import convergence
from pipeline.evaluation.convergence import Curve, curve, reach, targets
from pipeline.reports.figures import convergence as draw
from pipeline.reports.figures import frontier

METRIC = "validation/perplexity"
HISTORY = {
    METRIC: [(10, 40.0), (15, math.inf), (20, 20.0), (25, 10.0)],
    "train/tokens_per_second": [(10, 100.0), (20, 50.0), (30, 100.0)],
}


def test_seconds_are_those_of_training() -> None:
    """10 steps of 20 tokens at 100 tokens/s, then 10 at 50, then 5 at 100."""
    one = curve("a", HISTORY, METRIC, 20)
    assert one is not None
    assert list(one.steps) == [10, 20, 25]
    assert list(one.tokens) == [200, 400, 500]
    assert list(one.seconds) == [2, 6, 7]
    assert list(one.values) == [40, 20, 10]
    assert curve("a", {METRIC: HISTORY[METRIC]}, METRIC, 20) is None
    assert curve("a", HISTORY, "validation/loss", 20) is None


def test_reached_between_validations() -> None:
    one = curve("a", HISTORY, METRIC, 20)
    assert one is not None
    assert reach(one, 30) == (15, 300, 4)
    assert reach(one, 10) == (25, 500, 7)
    assert reach(one, 50) == (10, 200, 2)
    assert reach(one, 9.9) is None


def test_table_and_data() -> None:
    first = curve("a", HISTORY, METRIC, 20)
    assert first is not None
    second = Curve("b", *(np.array(x) for x in ([10.0, 20.0], [200.0, 400.0], [1.0, 2.0], [30.0, 12.004])))
    assert targets([first, second]) == pytest.approx([24.2, 18.15, 12.1])
    table = convergence.table([first, second], "perplexity")
    assert table.columns[0] == "validation perplexity"
    assert [row[:3] for row in table.values.tolist()][-2:] == [["12.10", "a", "24"], ["12.10", "b", "20"]]
    easy = Curve("c", *(np.array([x]) for x in (5.0, 100.0, 1.0, 11.0)))
    assert convergence.table([first, easy], "perplexity").values.tolist()[1][2:5] == [
        "at most 5",
        "at most 100",
        "at most 1",
    ]
    lines = convergence.to_csv([first, second], "perplexity").splitlines()
    assert lines[0] == "model,step,tokens,seconds,perplexity"
    assert lines[2] == "a,20,400,6.000,20.0"
    assert len(lines) == 6


def test_figures() -> None:
    told = {"a": [[1e3, 2e3], [1.0, 2.0], [40.0, 5.0]], "b": [[1e3, 2e3], [2.0, 4.0], [30.0, 6.0]]}
    curves = {name: (np.array(x), np.array(y), np.array(z)) for name, (x, y, z) in told.items()}
    by_tokens, by_time = (axes for axes in draw(curves, "perplexity").axes)
    assert [list(line.get_xdata()) for line in by_tokens.lines] == [[1e3, 2e3]] * 2
    assert [list(line.get_xdata()) for line in by_time.lines] == [[1, 2], [2, 4]]
    assert by_time.get_yscale() == "log"
    points = {"PGM": [(8, 200.0, [30.0, 2.0]), (16, 100.0, [20.0, 2.1])], "AR": [(64, 10.0, [9.0, 2.2])]}
    figure = frontier(points, ["perplexity", "entropy"], [8.0, 2.3])
    quality, entropy = figure.axes
    assert [list(line.get_xdata()) for line in quality.lines[:2]] == [[200, 100], [10]]
    assert [list(line.get_ydata()) for line in entropy.lines[:2]] == [[2, 2.1], [2.2]]
    assert {"8", "16", "64", "real 8"} <= {text.get_text() for text in quality.texts}
    assert [text.get_text() for text in quality.get_legend().get_texts()] == ["PGM", "AR"]
    figure.draw_without_rendering()
