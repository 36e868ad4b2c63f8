"""A sweep's table and pictures from trials of known figures."""

import csv
import io
import math

import pytest

from pipeline.errors import TrainingError
from pipeline.sweeps.figures import learning_curves, parallel_coordinates, quality_against_speed
from pipeline.sweeps.report import Row, Trial, best, markdown, rows, trials_csv, variants_csv
from pipeline.sweeps.summary import refuse_total_failure

METRIC = "validation/perplexity"


def trial(
    variant: str, seed: int, *values: float, status: str = "finished", error: str | None = None
) -> Trial:
    """A trial that was judged every 10 steps of 30."""
    curve = [(10 * (i + 1), value) for i, value in enumerate(values)]
    choices = {"model.swap.pooling": variant, "optim.lr": 0.1 if variant == "none" else 0.003}
    return Trial(
        variant, choices, seed, status, 10 * len(values), curve,  # type: ignore[arg-type]
        parameters=1234 if values else None, train_rate=1000.0 + seed if values else None,
        sample_rate=50.0 if values else None, run_id=f"run-{variant}-{seed}", error=error,
    )  # fmt: skip


@pytest.fixture
def table() -> list[Row]:
    return rows(
        [
            trial("none", 0, 9, 8, 7),
            trial("none", 1, 9, 8, 5),
            trial("mean", 0, 9, 7, 6.5),
            trial("mean", 1, 9, 7, 4.7),
            trial("cut", 0, 12, status="stopped"),
            trial("cut", 1, 9, 8, 4, status="finished"),
            trial("gone", 0, status="failed", error="4 workers of 1 CPUs, the cluster has 2"),
        ],
        "min",
    )


def test_order_means_and_spread(table: list[Row]) -> None:
    assert [row.variant for row in table] == ["mean", "none", "cut", "gone"]
    mean, none, cut, gone = table
    assert none.metric == pytest.approx((6.0, math.sqrt(2)))
    assert mean.metric.mean == pytest.approx(5.6)
    assert cut.metric.mean == 4  # of the seed that went to the end
    assert cut.state == "1 finished, stopped at step 10"
    assert math.isnan(gone.metric.mean)
    assert gone.parameters is None
    chosen = best(table)
    assert chosen is not None
    assert chosen.variant == "mean"


def test_differences_are_paired_by_seed(table: list[Row]) -> None:
    """mean is 0.5 and 0.3 better: sure, although the seeds themselves lie 2 apart."""
    mean, none, cut, _ = table
    assert none.difference is None
    assert mean.difference == pytest.approx((-0.4, 0.1 * math.sqrt(2)))
    assert cut.difference is not None
    assert cut.difference.mean == pytest.approx(4 - 5)


def test_greater_can_be_better() -> None:
    ones = [trial("none", 0, 1, 2, 3), trial("mean", 0, 1, 2, 4)]
    assert [row.variant for row in rows(ones, "max")] == ["mean", "none"]


def test_nothing_judged_has_no_best() -> None:
    assert best(rows([trial("gone", 0, status="failed", error="x")], "min")) is None


def test_markdown_names_what_failed(table: list[Row]) -> None:
    text = markdown(table, METRIC, "About.")
    head, _, first, *rest = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["pooling", "lr", "perplexity"]
    assert "5.600 ± 1.273" in first
    assert "-0.4000 ± 0.1414" in first
    assert len(rest) == 3
    assert "- gone seed 0: 4 workers of 1 CPUs, the cluster has 2" in text


def test_csv_holds_the_same(table: list[Row]) -> None:
    variants = list(csv.DictReader(io.StringIO(variants_csv(table, METRIC))))
    assert [one["model.swap.pooling"] for one in variants] == ["mean", "none", "cut", "gone"]
    assert float(variants[1]["perplexity_std"]) == pytest.approx(math.sqrt(2))
    assert variants[3]["perplexity"] == ""
    lines = list(csv.DictReader(io.StringIO(trials_csv(table, METRIC))))
    assert len(lines) == 7
    assert lines[4]["status"] == "stopped"
    assert lines[4]["run_id"] == "run-cut-0"


def test_learning_curves_are_means_over_seeds(table: list[Row]) -> None:
    (axes,) = learning_curves(table, METRIC).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[9, 7, 5.6], [9, 8, 6], [10.5, 8, 4]]
    assert {text.get_text() for text in axes.texts} == {"mean", "none", "cut"}


def test_parallel_coordinates_have_a_line_a_judged_variant(table: list[Row]) -> None:
    (axes,) = parallel_coordinates(table, METRIC, "min").axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 3
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["pooling", "lr", "perplexity"]
    thick = max(lines, key=lambda line: line.get_linewidth())
    assert thick.get_ydata()[2] == 0  # cut's 4 is the least of all
    assert {"4", "6"} <= {text.get_text() for text in axes.texts}


def test_quality_against_speed_shows_what_has_both(table: list[Row]) -> None:
    (axes,) = quality_against_speed(table, METRIC).axes
    assert [text.get_text() for text in axes.texts] == ["cut", "mean", "none"]  # from the lowest up


def test_pictures_of_nothing_can_be_drawn() -> None:
    table = rows([trial("gone", 0, status="failed", error="x")], "min")
    figures = (
        learning_curves(table, METRIC),
        parallel_coordinates(table, METRIC, "min"),
        quality_against_speed(table, METRIC),
    )
    for figure in figures:
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        assert stream.getvalue()[:4] == b"\x89PNG"


def test_a_sweep_of_which_all_trials_failed_is_an_error(table: list[Row]) -> None:
    refuse_total_failure(table, "there")  # one of these failed
    failed = rows([trial("none", seed, status="failed", error="no room") for seed in range(2)], "min")
    with pytest.raises(
        TrainingError, match=r"all 2 trials failed: no room \(2 trials\); there/table.md lists them"
    ):
        refuse_total_failure(failed, "there")
