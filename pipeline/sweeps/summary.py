"""The end of a sweep: its table, pictures and best configuration, in its folder and its MLflow run."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from pipeline import storage, tracking
from pipeline.config.evaluation import SamplingConfig
from pipeline.config.load import dump
from pipeline.config.sweep import Sweep
from pipeline.errors import ConfigError, TrainingError
from pipeline.metrics.draw import Sampler
from pipeline.models import model_folder
from pipeline.reports.figures import png
from pipeline.run import Run
from pipeline.runtime.actors import Resources, in_order, started
from pipeline.runtime.ray_cluster import available_resources
from pipeline.sweeps import figures, report
from pipeline.sweeps.trial import PlannedTrial, TrialEnd, read_end, read_reports

log = logging.getLogger(__name__)

REPEATS = 5  # timed batches of every variant
BEST = "best.yaml"


@dataclass(frozen=True)
class SweepResult:
    """Results of a sweep.

    Attributes:
        folder: of the sweep.
        rows: the table, the best variant first.
        table: the same as Markdown.
        best: file of the best variant's config; None if no trial was validated.
        run_id: of the sweep's MLflow run.
        tracking_uri: of the MLflow store.
    """

    folder: str
    rows: Sequence[report.Row]
    table: str
    best: str | None
    run_id: str | None
    tracking_uri: str


def summarise(plan: Sweep, base: Run, folder: str, trials: Sequence[PlannedTrial]) -> SweepResult:
    """Measure the sampling speed of the variants, average over seeds, and write and log tables and figures.

    Args:
        plan: the sweep's config and space.
        base: the run that all variants start from, with the sweep's MLflow run.
        folder: of the sweep.
        trials: all that were started.

    Returns:
        The table, and where the files are.
    """
    own, sampling = plan.config, base.config.sampling
    resources = replace(available_resources(base.config.cluster), actors=1)
    speeds = _speeds(trials, resources)
    table = report.rows([_result(trial, own.metric, speeds) for trial in trials], own.mode)
    device = "GPU" if resources.use_gpu else f"{resources.cpus} CPU"
    about = (
        f"Sweep {own.name}: {own.metric} at each trial's end, mean ± standard deviation over seeds "
        f"{', '.join(map(str, own.seeds))}; sampling: median of {REPEATS} batches of {sampling.batch} rows, "
        f"{sampling.order} order, {sampling.steps} steps, {device}, after all training."
    )
    texts = {
        "table.md": report.markdown(table, own.metric, about),
        "table.csv": report.variants_csv(table, own.metric),
        "trials.csv": report.trials_csv(table, own.metric),
        "sweep.json": json.dumps(own.model_dump(mode="json"), indent=2) + "\n",
    }
    pictures = {
        "learning_curves.png": figures.learning_curves(table, own.metric),
        "parallel_coordinates.png": figures.parallel_coordinates(table, own.metric, own.mode),
        "quality_against_speed.png": figures.quality_against_speed(table, own.metric),
    }
    states = Counter(trial.status for row in table for trial in row.trials)
    metrics = {f"trials/{status}": float(states[status]) for status in get_args(report.Status)}
    if winner := report.best(table):
        metrics[f"best/{own.metric}"] = winner.metric.mean
        best_trials = [trial for trial in trials if trial.variant.label == winner.variant]
        config = plan.trial(best_trials[0].variant, own.seeds[0])
        named = config.model_copy(update={"name": f"{own.name}-best"})
        texts[BEST] = f"# The best variant of {own.name}: {winner.variant}\n" + dump(named)
        _move_alias(base.tracking_uri, best_trials)
    with base.tracker() as tracker:
        tracker.log_metrics(metrics, 0)
        for name, text in texts.items():
            storage.publish_text(storage.join(folder, name), text)
            tracker.log_text(text, name)
        for name, figure in pictures.items():
            storage.publish_bytes(storage.join(folder, name), png(figure))
            tracker.log_figure(figure, f"figures/{name}")
        tracker.flush()
    best = storage.join(folder, BEST) if winner else None
    return SweepResult(folder, table, texts["table.md"], best, base.run_id, base.tracking_uri)


def refuse_total_failure(rows: Sequence[report.Row], folder: str) -> None:
    """Refuse a sweep of which nothing is left.

    Args:
        rows: the table.
        folder: of the sweep.

    Raises:
        TrainingError: every trial failed; names the reasons.
    """
    trials = [trial for row in rows for trial in row.trials]
    if trials and all(trial.status == "failed" for trial in trials):
        reasons = Counter(trial.error or "no reason is known" for trial in trials)
        listed = "; ".join(f"{reason} ({count} trials)" for reason, count in reasons.most_common(3))
        raise TrainingError(f"all {len(trials)} trials failed: {listed}; {folder}/table.md lists them")


def _result(trial: PlannedTrial, metric: str, speeds: dict[str, tuple[int, float]]) -> report.Trial:
    """Collect what a trial left in its folder and in its MLflow run."""
    folder, label = trial.run.folder, trial.variant.label
    end = read_end(folder) or TrialEnd("failed", 0, {}, error="its process was lost")
    recorded = tracking.recorded_run(folder)
    run_id = recorded and recorded[0]
    parameters, sample_rate = speeds.get(label, (None, None))
    return report.Trial(
        variant=label,
        choices=trial.variant.choices,
        seed=trial.seed,
        status=end.status,
        step=end.step,
        curve=[(int(point["step"]), point[metric]) for point in read_reports(folder) if metric in point],
        parameters=parameters,
        train_rate=_train_rate(trial.run.tracking_uri, run_id) if run_id else None,
        sample_rate=sample_rate,
        run_id=run_id,
        error=(end.error or "").partition("\n")[0] or None,
    )


def _train_rate(uri: str, run_id: str) -> float | None:
    """Compute the median tokens/s between two log lines."""
    key = "train/tokens_per_second"
    try:
        points = tracking.metric_history(uri, run_id, [key])[key]
    except ConfigError as error:
        log.warning("the training speed of run %s is unknown: %s", run_id, error)
        return None
    return float(np.median([rate for _, rate in points])) if points else None


def _speeds(trials: Sequence[PlannedTrial], resources: Resources) -> dict[str, tuple[int, float]]:
    """Measure parameters and tokens/s of every variant that left a model, with one model of each in one process."""
    models: dict[str, tuple[str, SamplingConfig]] = {}
    for trial in trials:
        if storage.folder_complete(trial.run.model_folder):
            models.setdefault(trial.variant.label, (trial.run.model_folder, trial.run.config.sampling))
    if not models:
        return {}
    log.info("measuring the sampling speed of %d variants", len(models))
    # In turn, so that other load on the machine affects all of them; the first batch of each turn warms up.
    tasks = [(model, settings, 0, settings.batch) for model, settings in models.values() for _ in range(2)]
    with started(Sampler, (resources.cpus,), resources, 1) as samplers:
        timed = list(in_order(samplers, "draw", tasks * REPEATS))[1::2]
    speeds = {}
    for index, (label, (model, _)) in enumerate(models.items()):
        denoiser = model_folder.read(storage.fetch(model))[0]
        parameters = sum(value.numel() for value in denoiser.parameters())
        rates = [batch.tokens.size / batch.seconds for batch in timed[index :: len(models)]]
        speeds[label] = parameters, float(np.median(rates))
    return speeds


def _move_alias(uri: str, trials: Sequence[PlannedTrial]) -> None:
    """Let `models:/NAME@teacher` mean the first model of these trials; every trial moved it when it ended."""
    versions = [end.version for trial in trials if (end := read_end(trial.run.folder)) and end.version]
    if versions:
        _, name, number = versions[0].split("/")
        try:
            tracking.set_alias(uri, name, "teacher", number)
        except ConfigError as error:
            log.warning("models:/%s@teacher is not the best variant: %s", name, error)
