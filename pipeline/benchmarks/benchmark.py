"""A benchmark from its config to its files and its MLflow run."""

from dataclasses import dataclass
from pathlib import Path

from pipeline import storage, tracking
from pipeline.benchmarks.preparation import data_wait, measure_preparation
from pipeline.benchmarks.report import SpeedReport, machine
from pipeline.benchmarks.speed import first_step, measure, place_of
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import flatten
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.reports.figures import png


@dataclass(frozen=True)
class BenchmarkResult:
    """A report and its places.

    Attributes:
        report: all figures.
        folder: of its files.
        tracking_uri: the MLflow store.
        run_id: id of the MLflow run.
    """

    report: SpeedReport
    folder: str
    tracking_uri: str
    run_id: str


def benchmark(config: BenchmarkConfig) -> BenchmarkResult:
    """Measure everything that a config names, write report, table and picture, and log them.

    Args:
        config: what to measure.

    Returns:
        The report, its folder and its MLflow run.

    Raises:
        ConfigError: there is no GPU, the tokenizer is not available, or the MLflow store cannot be reached.
    """
    folder = storage.join(config.storage, "benchmarks", config.name)
    cluster = ClusterConfig(storage=config.storage)
    uri = tracking.tracking_uri(RunConfig(name=config.name, tracking=config.tracking, cluster=cluster))
    params, tags = flatten(config.model_dump(mode="json")), machine(place_of(config).device)
    run_id = tracking.open_run(uri, config.tracking.experiment, name=config.name, params=params, tags=tags)
    with tracking.ending(uri, run_id):
        preparation = waited = None
        # Preparation comes first, so that a missing tokenizer fails at once and not after an hour.
        if config.preparation is not None:
            preparation = measure_preparation(config.preparation, config)
        traces = Path(storage.resolve(folder), "traces")
        measured = measure(config, traces if config.trace else None)
        if preparation is not None and config.training:
            waited = data_wait(first_step(config), config)
        report = SpeedReport(config, tags, measured, preparation, waited)
        figures = {"benchmark.png": report.picture(), "steps.png": report.steps_picture()}
        with tracking.Tracker(uri, run_id) as tracker:
            tracker.log_metrics(report.metrics(), 0)
            for name, text in (("benchmark.md", report.to_markdown()), ("benchmark.csv", report.to_csv())):
                storage.publish_text(storage.join(folder, name), text)
                tracker.log_text(text, name)
            for name, figure in figures.items():
                if figure is not None:
                    storage.publish_bytes(storage.join(folder, name), png(figure))
                    tracker.log_figure(figure, name)
            tracker.flush()
    return BenchmarkResult(report, folder, tracking_uri=uri, run_id=run_id)
