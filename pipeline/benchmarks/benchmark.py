"""A benchmark from its config to its files and its MLflow run."""

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage, tracking
from pipeline.benchmarks.preparation import Preparation, data_wait, measure_preparation
from pipeline.benchmarks.report import SpeedReport, machine
from pipeline.benchmarks.roofline import clock
from pipeline.benchmarks.speed import first_step, measure
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import flatten
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.reports.figures import png

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """A report, and where it lies."""

    report: SpeedReport
    folder: str
    tracking_uri: str
    run_id: str


def benchmark(config: BenchmarkConfig) -> BenchmarkResult:
    """Measure everything that a config names, write report, table and picture, and log them.

    Raises:
        ConfigError: the tokenizer or the MLflow store cannot be had.
    """
    folder = storage.join(config.storage, "benchmarks", config.name)
    cluster = ClusterConfig(storage=config.storage)
    uri = tracking.tracking_uri(RunConfig(name=config.name, tracking=config.tracking, cluster=cluster))
    params = flatten(config.model_dump(mode="json"))
    facts = machine()
    run_id = tracking.open_run(uri, config.tracking.experiment, config.name, params, facts)
    with tracking.ending(uri, run_id):
        preparation = _preparation(config)
        traces = Path(storage.resolve(folder), "traces") if config.trace else None
        measured, peaks = measure(config, traces)
        waited = None
        if preparation is not None and config.training:
            waited = data_wait(first_step(config), config.batch, config.length, config.repetitions)
        report = SpeedReport(config, facts, measured, peaks, preparation, waited)
        _publish(report, folder, uri, run_id)
    return BenchmarkResult(report, folder, uri, run_id)


def _preparation(config: BenchmarkConfig) -> Preparation | None:
    """First of all, since a tokenizer that cannot be had should not be told of after an hour."""
    if config.preparation is None:
        return None
    asked, turns = config.preparation, config.repetitions
    return measure_preparation(asked.tokenizer, asked.megabytes, config.length, turns, clock(config.clock))


def _publish(report: SpeedReport, folder: str, uri: str, run_id: str) -> None:
    figure = report.picture()
    storage.publish_text(storage.join(folder, "benchmark.md"), report.to_markdown())
    storage.publish_text(storage.join(folder, "benchmark.csv"), report.to_csv())
    storage.publish_bytes(storage.join(folder, "benchmark.png"), png(figure))
    with tracking.Tracker(uri, run_id) as tracker:
        tracker.log_metrics(report.metrics(), 0)
        tracker.log_text(report.to_markdown(), "benchmark.md")
        tracker.log_text(report.to_csv(), "benchmark.csv")
        tracker.log_figure(figure, "benchmark.png")
        tracker.flush()
