"""The end of a sweep: its table, pictures and best configuration, in its folder and its MLflow run."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import storage, tracking
from pipeline.config.load import dump
from pipeline.config.schema import SamplingConfig
from pipeline.config.space import Variant
from pipeline.config.sweep import Sweep
from pipeline.errors import ConfigError
from pipeline.metrics.draw import Sampler
from pipeline.models import model_folder
from pipeline.reports.figures import png
from pipeline.run import Run
from pipeline.runtime.actors import Resources, in_order, started
from pipeline.runtime.ray_cluster import check_resources
from pipeline.sweeps import figures, report
from pipeline.sweeps.report import Row, Trial
from pipeline.sweeps.trial import read_ended, read_reports

log = logging.getLogger(__name__)

REPEATS = 5  # timed batches of every variant
BEST = "best.yaml"


@dataclass(frozen=True)
class Planned:
    """One trial: a variant with a seed, and its run."""

    variant: Variant
    seed: int
    run: Run


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind.

    Attributes:
        rows: the table, the best variant first.
        best: file of the best variant's config; None where no trial was judged.
    """

    folder: str
    rows: Sequence[Row]
    table: str
    best: str | None
    run_id: str | None
    tracking_uri: str


def summarise(plan: Sweep, base: Run, folder: str, trials: Sequence[Planned]) -> SweepResult:
    """Measure how fast the variants draw, average over seeds, draw, write and log."""
    own, cluster, sampling = plan.config, base.config.cluster, base.config.sampling
    use_gpu = check_resources(cluster)
    speeds = _speeds(trials, Resources(1, cluster.cpus_per_worker, use_gpu))
    table = report.rows([_facts(trial, own.metric, base.tracking_uri, speeds) for trial in trials], own.mode)
    device = "GPU" if use_gpu else f"{cluster.cpus_per_worker} CPU"
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
    winner = report.best(table)
    if winner is not None:
        seed = own.seeds[0]
        variant = next(trial.variant for trial in trials if trial.variant.label == winner.variant)
        config = plan.trial(variant, seed).model_copy(update={"name": f"{own.name}-best"})
        texts[BEST] = f"# The best of {own.name}: {winner.variant}\n" + dump(config)
    pictures = {
        "learning_curves.png": figures.learning_curves(table, own.metric),
        "parallel_coordinates.png": figures.parallel_coordinates(table, own.metric, own.mode),
        "quality_against_speed.png": figures.quality_against_speed(table, own.metric),
    }
    for name, text in texts.items():
        storage.publish_text(storage.join(folder, name), text)
    for name, figure in pictures.items():
        storage.publish_bytes(storage.join(folder, name), png(figure))
    counts = {
        f"trials/{status}": float(sum(one.status == status for row in table for one in row.trials))
        for status in ("finished", "stopped", "failed")
    }
    if winner is not None:
        counts[f"best/{own.metric}"] = winner.metric.mean
    with base.tracker() as tracker:
        tracker.log_metrics(counts, 0)
        for name, text in texts.items():
            tracker.log_text(text, name)
        for name in pictures:
            tracker.log_artifact(storage.fetch(storage.join(folder, name)), "figures")
        tracker.flush()
    if winner is not None:
        _let_best_teach(base.tracking_uri, winner, trials)
    best = storage.join(folder, BEST) if winner is not None else None
    return SweepResult(folder, table, texts["table.md"], best, base.run_id, base.tracking_uri)


def _facts(trial: Planned, metric: str, uri: str, speeds: dict[str, tuple[int, float]]) -> Trial:
    """What a trial left in its folder and in its MLflow run."""
    run = trial.run.folder
    ended, recorded = read_ended(run), tracking.recorded_run(run)
    run_id = recorded and recorded[0]
    label = trial.variant.label
    parameters, sample_rate = speeds.get(label, (None, None))
    return Trial(
        variant=label,
        choices=trial.variant.choices,
        seed=trial.seed,
        status=ended.status if ended else "failed",
        step=ended.step if ended else 0,
        curve=[(int(told["step"]), told[metric]) for told in read_reports(run) if metric in told],
        parameters=parameters,
        train_rate=None if run_id is None else _train_rate(uri, run_id),
        sample_rate=sample_rate,
        run_id=run_id,
        error=(ended.error or "").splitlines()[0] or None if ended and ended.error else _lost(ended is None),
    )


def _lost(unknown: bool) -> str | None:
    return "its process was lost" if unknown else None


def _train_rate(uri: str, run_id: str) -> float | None:
    """Median tokens/s between two log lines."""
    key = "train/tokens_per_second"
    try:
        points = tracking.metric_history(uri, run_id, [key])[key]
    except ConfigError as error:
        log.warning("training speed of run %s is not known: %s", run_id, error)
        return None
    return float(np.median([rate for _, rate in points])) if points else None


def _speeds(trials: Sequence[Planned], resources: Resources) -> dict[str, tuple[int, float]]:
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


def _let_best_teach(uri: str, winner: Row, trials: Sequence[Planned]) -> None:
    """Let `models:/NAME@teacher` mean the best variant's first model; every trial's end has moved it."""
    for trial in trials:
        ended = read_ended(trial.run.folder)
        if trial.variant.label == winner.variant and ended is not None and ended.version:
            _, name, number = ended.version.split("/")
            try:
                tracking.set_alias(uri, name, "teacher", number)
            except ConfigError as error:
                log.warning("models:/%s@teacher is not the best variant: %s", name, error)
            return
