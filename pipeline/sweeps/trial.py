"""One trial of a sweep: a pretraining run that reports its metric to Ray Tune and records its reports and its end.

Ray Tune remembers nothing of an earlier start of a sweep, but a trial's folder does. A trial repeats its recorded
reports, so that the scheduler sees them again, and then ends if it had ended, or continues from its checkpoint.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.config.space import Variant
from pipeline.errors import PipelineError, StoppedError
from pipeline.run import Run
from pipeline.runtime.control_files import STOP
from pipeline.runtime.session import PlainSession
from pipeline.sweeps.report import Status
from pipeline.training import checkpoint, launch, worker_group
from pipeline.training.loop import train

log = logging.getLogger(__name__)

# Files in the trial's folder.
RECORD = "trial.json"  # how it ended
REPORTS = "reports.json"  # what it has reported to Ray Tune


@dataclass(frozen=True)
class PlannedTrial:
    """A trial: a variant with a seed, and its run."""

    variant: Variant
    seed: int
    run: Run

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.config.name

    def __str__(self) -> str:
        return f"{self.variant.label} seed {self.seed}"


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended.

    Attributes:
        status: finished, stopped by the scheduler, or failed.
        step: number of updates done.
        config: of the run, as JSON values.
        version: its registered model, models:/NAME/VERSION.
        error: message of a failed one.
    """

    status: Status
    step: int
    config: dict[str, Any]
    version: str | None = None
    error: str | None = None


def read_end(folder: str) -> TrialEnd | None:
    """Read how a trial ended.

    Args:
        folder: of the trial.

    Returns:
        The end, or None of a trial that has not ended.
    """
    return storage.read_json(storage.join(folder, RECORD), parse=lambda fields: TrialEnd(**fields))


def kept_end(run: Run) -> TrialEnd | None:
    """Read the end of a trial that a restarted sweep does not run again.

    Args:
        run: of the trial.

    Returns:
        The end, or None of a trial that failed, has not ended, or has fewer steps than its config says now.
    """
    end = read_end(run.folder)
    finished = end is not None and end.status == "finished" and end.step >= run.config.train.steps
    return end if finished or (end is not None and end.status == "stopped") else None


def read_reports(folder: str) -> list[dict[str, float]]:
    """Read what a trial has reported so far, in the order of the steps.

    Args:
        folder: of the trial.
    """
    return storage.read_json(
        storage.join(folder, REPORTS), [], lambda reports: [dict(one) for one in reports]
    )


def in_one_process(config: RunConfig, use_gpu: bool) -> bool:
    """Decide whether the trial's process is its only worker; a group of one would only cost its start.

    Args:
        config: of the trial.
        use_gpu: whether a worker gets a GPU.
    """
    return config.cluster.workers == 1 and not use_gpu and storage.is_local(config.cluster.storage)


def run_trial(run: Run, metric: str, tags: dict[str, str]) -> None:
    """Train one trial to its end, inside a function that Ray Tune runs; a failure is recorded, not raised.

    Args:
        run: with the sweep's folder as `cluster.storage`.
        metric: name of the metric that is reported.
        tags: of its MLflow run.
    """
    config, folder = run.config, run.folder
    for report in read_reports(folder):
        tune.report({**report, "folder": folder, "repeated": True})
    if kept_end(run) or _sweep_stops(config):
        return
    record = storage.join(folder, RECORD)
    storage.remove(record)
    status: Status = "failed"
    error = version = None
    try:
        version = launch.train_to_end(run, tags, partial(_train, metric)).version
        status = "finished" if _last_step(folder) >= config.train.steps else "stopped"
    except StoppedError:
        return
    except Exception as failure:  # the sweep continues; its summary names this trial
        expected = isinstance(failure, PipelineError)
        error = str(failure) if expected else f"{type(failure).__name__}: {failure}"
        log.warning("%s failed: %s", config.name, error, exc_info=None if expected else failure)
    end = TrialEnd(status, _last_step(folder), config.model_dump(mode="json"), version, error)
    storage.publish_text(record, json.dumps(asdict(end)))


def _sweep_stops(config: RunConfig) -> bool:
    """Whether the user has requested that the sweep stops."""
    return storage.exists(storage.join(config.cluster.storage, STOP))


def _last_step(folder: str) -> int:
    """Step of the trial's newest checkpoint."""
    newest = checkpoint.newest(folder)
    return checkpoint.read_state(newest).step if newest else 0


def _train(metric: str, run: Run) -> None:
    """Run the training loop in this process or in a worker group; an error if the sweep is stopped meanwhile."""
    if in_one_process(run.config, run.resources.use_gpu):
        if not dist.is_initialized():  # Ray Tune uses this process for one trial after the other
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        torch.set_num_threads(run.config.cluster.cpus_per_worker)
        train(run, _TrialSession(run.folder, metric))
    else:
        worker_group.run_group(run, [_GroupReports(run.folder, metric)])
    if _sweep_stops(run.config) and _last_step(run.folder) < run.config.train.steps:
        raise StoppedError("stopped with its sweep")


class _TrialSession(PlainSession):
    """Session of the only worker, in the process that reports to Ray Tune."""

    def __init__(self, folder: str, metric: str):
        super().__init__(0, 1, folder)
        self._metric = metric

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Save, then report, so that the trial can continue from every step that the scheduler has seen."""
        super().publish(folder, name, metrics)
        _report(str(self._folder / name), self._metric, metrics, tune.report)


class _GroupReports(TuneReportCallback):
    """Passes the reports of a worker group to Ray Tune; runs in Ray Train's controller."""

    def __init__(self, folder: str, metric: str):
        super().__init__()
        self._folder, self._metric = folder, metric

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        """Report a checkpoint of a validated step, once it is complete."""
        if checkpoint is not None:
            path = storage.join(self._folder, checkpoint.path.rstrip("/").rpartition("/")[2])
            _report(path, self._metric, metrics[0], self._training_actor_item_queue.put)


def _report(
    path: str, metric: str, metrics: dict[str, float], send: Callable[[dict[str, Any]], object]
) -> None:
    """Record and send the metric of a checkpoint's step, if the step was validated and not reported before."""
    state, folder = checkpoint.read_state(path), path.rpartition("/")[0]
    reports = read_reports(folder)
    reported = bool(reports) and reports[-1]["step"] >= state.step
    if state.validation is not None and metric in metrics and not reported:
        report = {"step": state.step, metric: metrics[metric]}
        storage.publish_text(storage.join(folder, REPORTS), json.dumps([*reports, report]))
        send({**report, "folder": folder})
