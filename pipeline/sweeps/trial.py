"""One trial of a sweep: a pretraining run that tells Ray Tune how it does, and remembers what it told.

Ray Tune knows nothing of an earlier start of a sweep. A trial's folder does: it repeats its reports, so that
the scheduler sees again what it saw, and then ends if it had ended, or goes on from its checkpoint.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from ray import tune
from ray.train import Checkpoint
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError, StoppedError
from pipeline.run import Run
from pipeline.runtime.control_files import STOP
from pipeline.runtime.session import PlainSession
from pipeline.training import checkpoint, launch, worker_group
from pipeline.training.loop import train

log = logging.getLogger(__name__)

RECORD = "trial.json"  # in the trial's folder: how it ended
REPORTS = "reports.json"  # and what it told Ray Tune


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Attributes:
        step: updates done.
        version: of its registered model.
        error: of a failed one.
    """

    status: Literal["finished", "stopped", "failed"]
    step: int
    config: dict[str, Any]
    version: str | None = None
    error: str | None = None

    def counts(self, config: RunConfig) -> bool:
        """Whether a sweep that is started again leaves this trial as it is."""
        return self.status == "stopped" or (self.status == "finished" and self.step >= config.train.steps)


def read_ended(folder: str) -> Ended | None:
    """The trial's end, if it has come."""
    record = storage.join(folder, RECORD)
    return Ended(**json.loads(storage.read_text(record))) if storage.exists(record) else None


def read_reports(run: str) -> list[dict[str, float]]:
    """What a trial has told so far, by step."""
    file = storage.join(run, REPORTS)
    return json.loads(storage.read_text(file)) if storage.exists(file) else []


def in_one_process(config: RunConfig, use_gpu: bool) -> bool:
    """Whether the trial's process is its only worker: a group of one would only cost its start."""
    return config.cluster.workers == 1 and not use_gpu and storage.is_local(config.cluster.storage)


def run_trial(run: Run, metric: str, tags: dict[str, str]) -> None:
    """Train one trial to its end, inside a function that Ray Tune runs; its failure is written down, not raised.

    Args:
        run: with the sweep's folder as `cluster.storage`.
        metric: what is reported, by name.
        tags: of its MLflow run.
    """
    config, folder = run.config, run.folder
    for report in read_reports(folder):
        tune.report({**report, "folder": folder, "repeated": True})
    ended = read_ended(folder)
    if (ended is not None and ended.counts(config)) or _sweep_stops(config):
        return
    record = storage.join(folder, RECORD)
    storage.remove(record)
    facts, status, error, version = config.model_dump(mode="json"), "failed", None, None
    try:
        version = launch.train_to_end(run, tags, partial(_train, metric)).version
        status = "finished" if _last_step(folder) >= config.train.steps else "stopped"
    except StoppedError:
        return
    except Exception as failure:  # the sweep goes on; its summary names this trial
        told = isinstance(failure, PipelineError)
        error = str(failure) if told else f"{type(failure).__name__}: {failure}"
        log.warning("%s failed: %s", config.name, error, exc_info=None if told else failure)
    ended = Ended(status, _last_step(folder), facts, version, error)  # type: ignore[arg-type]
    storage.publish_text(record, json.dumps(asdict(ended)))


def _sweep_stops(config: RunConfig) -> bool:
    return storage.exists(storage.join(config.cluster.storage, STOP))


def _last_step(run: str) -> int:
    newest = checkpoint.newest(run)
    return checkpoint.read_state(newest).step if newest else 0


def _train(metric: str, run: Run) -> None:
    """The loop, in this process or in a worker group; ended early by the user, the trial is to go on another time."""
    if in_one_process(run.config, run.resources.use_gpu):
        _train_here(metric, run)
    else:
        worker_group.run_group(run, [_GroupReports(run.folder, metric)])
    if _sweep_stops(run.config) and _last_step(run.folder) < run.config.train.steps:
        raise StoppedError("stopped with its sweep")


def _train_here(metric: str, run: Run) -> None:
    """Ray Tune uses this process for one trial after the other."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    torch.set_num_threads(run.config.cluster.cpus_per_worker)
    train(run, _TrialSession(run.folder, metric))


class _TrialSession(PlainSession):
    """The only worker, in the process that reports."""

    def __init__(self, run: str, metric: str):
        super().__init__(0, 1, run)
        self._metric = metric

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Save, then report, so that what the scheduler has seen can be gone back to."""
        super().publish(folder, name, metrics)
        report = _report(str(self._folder), name, self._metric, metrics)
        if report is not None:
            tune.report(report)


class _GroupReports(TuneReportCallback):
    """Takes reports of a worker group to Ray Tune; runs in Ray Train's controller."""

    def __init__(self, run: str, metric: str):
        super().__init__()
        self._folder, self._metric = run, metric

    def after_report(
        self,
        run_context: TrainRunContext,  # noqa: ARG002
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Report a checkpoint of a judged step, once it is whole."""
        if checkpoint is None:
            return
        name = checkpoint.path.rstrip("/").rpartition("/")[2]
        report = _report(self._folder, name, self._metric, metrics[0])
        if report is not None:
            self._training_actor_item_queue.put(report)


def _report(run: str, name: str, metric: str, metrics: dict[str, float]) -> dict[str, Any] | None:
    """What to tell of a saved step, which is remembered; None of one that was not judged, or told before."""
    state = checkpoint.read_state(storage.join(run, name))
    if state.validation is None or metric not in metrics:
        return None
    told = read_reports(run)
    if told and told[-1]["step"] >= state.step:
        return None
    report = {"step": state.step, metric: metrics[metric]}
    storage.publish_text(storage.join(run, REPORTS), json.dumps([*told, report]))
    return {**report, "folder": run}
