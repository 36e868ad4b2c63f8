"""A run's worker group under Ray Train: started, resized, started again after a failure, stopped; its workers."""

import json
import logging
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import ray
import ray.train
import torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2.api.config import ScalingConfig  # what ray.train gives, by the name that type checkers see
from ray.util.metrics import Gauge

from pipeline import errors, logs, storage
from pipeline.errors import PipelineError, TrainingError
from pipeline.run import Run
from pipeline.runtime.control_files import FATAL, SAVE, STOP
from pipeline.training import checkpoint
from pipeline.training.loop import train

log = logging.getLogger(__name__)

CLAIM = "claim"  # likewise: under which name Ray holds the run's places
# Seconds that Ray waits for the places of an elastic group. Its view of the nodes is up to 20 s old, so after a
# loss it may ask for places that are gone, and only then for fewer; its own minute would be spent waiting.
PLACES_S = 10
GROWTH_S = 30.0  # seconds between looks for nodes that have come


def run_group(run: Run, callbacks: Sequence[UserCallback] = ()) -> None:
    """Run the worker group to the end; Ray restarts it after a failure, and the loop resumes by itself."""
    # The loop finds its own checkpoints, and prunes them; Ray's record of an earlier start would miss those.
    storage.remove(storage.join(run.folder, "checkpoint_manager_snapshot.json"))
    _release(run.folder)
    asked, use_gpu = run.config.cluster, run.resources.use_gpu
    folder, name = run.folder.rsplit("/", 1)
    filesystem, folder = storage.arrow(folder)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in the config mean what they mean to the user
    elastic = asked.least < asked.most
    if elastic:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(PLACES_S))
    fatal = storage.join(run.folder, FATAL)
    storage.remove(fatal)
    trainer = _Trainer(
        _worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(asked.least, asked.most) if elastic else asked.most,
            elastic_resize_monitor_interval_s=GROWTH_S,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": asked.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=asked.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[Between(run.folder), *callbacks],  # type: ignore[list-item]  # Ray takes its controller's too
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if isinstance(error, ray.train.ControllerError) and isinstance(error.controller_failure, Stopped):
            log.warning("stopped while no worker ran; what was done after the newest checkpoint is not kept")
            return
        log.error("%s", error)  # with the workers' tracebacks
        raise TrainingError(
            f"training failed and used up cluster.max_failures restarts; last failure: {reason(error)}"
        ) from error
    finally:
        if storage.exists(fatal):  # a user's mistake, found by a worker: say that, not what it led to
            told = json.loads(storage.read_text(fatal))
            storage.remove(fatal)
            raise getattr(errors, told["kind"])(told["message"]) from None


def _release(run: str) -> None:
    """Give back what an earlier start of the run holds, if its driver was killed.

    Ray would keep those places for three minutes more, and an elastic group would wait for them.
    """
    claim = storage.join(run, CLAIM)
    if storage.exists(claim):
        holder = f"train-{storage.read_text(claim)}"
        ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(holder), timeout=60)


def reason(error: ray.train.TrainingFailedError) -> str:
    """What a failed run failed of, in one line: every kind of failure once, with the first worker that had it."""
    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    if not failures:
        return " ".join(str(error).split())
    kinds: dict[str, str] = {}
    for rank, failure in sorted(failures.items()):
        failure = getattr(failure, "health_check_failure", failure)  # Ray's wrapper says nothing more
        said = (str(failure).strip().splitlines() or ["no message"])[0]
        kinds.setdefault(f"{type(failure).__name__}: {said}", f"worker {rank}")
    return "; ".join(f"{worker}: {kind}" for kind, worker in kinds.items())


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to `stoppable`; Ray's own handler would end the run without a checkpoint."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


class Stopped(Exception):
    """The run was asked to stop while it had no workers that could save."""


class Between(ControllerCallback):
    """What Ray's controller does for a run between two groups of workers.

    A group that is to grow starts again from the newest checkpoint: one is made first, so no step is lost. And a
    run that waits for nodes can be stopped: nothing else would look for the request.
    """

    PATIENCE = 120.0  # seconds for that checkpoint

    def __init__(self, run: str):
        self._run = run

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Note the name for `_release`."""
        storage.publish_text(storage.join(self._run, CLAIM), train_run_context.run_id)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called by Ray whenever its state changes, and again and again while it waits for nodes."""
        if isinstance(current_state, ResizingState):
            self._save()
        elif isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
            if type(previous_state) is type(current_state):
                time.sleep(0.5)  # Ray itself would ask again at once
            if storage.exists(storage.join(self._run, STOP)):
                raise Stopped

    def _save(self) -> None:
        request = storage.join(self._run, SAVE)
        try:
            before, deadline = checkpoint.newest(self._run), time.monotonic() + self.PATIENCE
            storage.publish_bytes(request, b"")
            while checkpoint.newest(self._run) == before and time.monotonic() < deadline:
                time.sleep(0.5)
            storage.remove(request)
        except Exception as error:  # storage's troubles must not end the run: some steps are done again
            log.warning("no checkpoint before the change of the worker group: %s", error)


def _worker(settings: dict[str, Run]) -> None:
    """What Ray Train runs in every worker."""
    logs.show()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train repeats every report, from every worker
    run = settings["run"]
    device = ray.train.torch.get_device()
    # DeepSpeed must not guess: a worker without a GPU may see some, and Ray's order of them is not always its own.
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ["LOCAL_RANK"] = str(device.index)
    torch.set_num_threads(run.config.cluster.cpus_per_worker)  # Ray's default is one, whatever was asked
    fatal = storage.join(run.folder, FATAL)
    session = RaySession()
    if storage.exists(fatal):  # trying again cannot help: end quietly, the driver tells why
        return
    try:
        metrics = train(run, session)
    except PipelineError as error:
        storage.publish_text(fatal, json.dumps({"kind": type(error).__name__, "message": str(error)}))
        raise
    ray.train.report(metrics)


class RaySession:
    """A worker of Ray Train; its metrics also stand on Ray's dashboard."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._known: ray.train.PreemptionInfo | None = None
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Show the newest values as Ray's own metrics (Prometheus), from rank 0."""
        if self.rank > 0:
            return
        for key, value in {**metrics, "train/step": step}.items():
            if key not in self._gauges:
                self._gauges[key] = Gauge("pipeline_" + key.replace("/", "_"), description=key)
            self._gauges[key].set(value)

    def settle(self) -> None:
        """Wait until Ray has taken over everything that was reported."""
        ray.train.get_all_reported_checkpoints()

    def notice(self) -> str | None:
        """Ask Ray, which answers all ranks alike, for nodes that drain because they will be preempted."""
        known, self._known = self._known, ray.train.get_preemption_info()
        if self._known in (None, known):
            return None
        assert self._known is not None
        when = self._known.deadline_ms and datetime.fromtimestamp(self._known.deadline_ms / 1000)
        return f"the nodes of workers {self._known.preempted_ranks} go" + (
            f" at {when:%H:%M:%S}" if when else ""
        )

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Upload in the background; Ray merges the folders of all ranks."""
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
