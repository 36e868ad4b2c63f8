"""The worker group of a run under Ray Train: start, resize, restart after a failure, and stop."""

import json
import logging
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import state
from ray.train.v2.api.config import ScalingConfig  # what ray.train gives, by the name that type checkers see
from ray.util.metrics import Gauge

from pipeline import errors, logs, storage
from pipeline.errors import PipelineError, TrainingError
from pipeline.run import Run
from pipeline.runtime.control_files import FATAL, SAVE, STOP
from pipeline.training import checkpoint
from pipeline.training.loop import train

log = logging.getLogger(__name__)

# File in the run's folder: the name under which Ray reserves resources for the run.
RESERVATION = "reservation"
# How long Ray waits for the resources of an elastic group. Its view of the nodes is up to 20 s old, so after a
# loss it may ask for resources that are gone, and only then for fewer; its default is one minute.
RESERVATION_TIMEOUT_S = 10
GROWTH_INTERVAL_S = 30.0  # between checks for nodes that have joined


def run_group(run: Run, callbacks: Sequence[ray.train.UserCallback] = ()) -> None:
    """Train with a worker group until the last step; Ray restarts it after a failure, and the loop resumes.

    Args:
        run: with resources and data.
        callbacks: further callbacks of Ray Train.

    Raises:
        PipelineError: an error in the user's input that a worker found.
        TrainingError: the workers failed more than `cluster.max_failures` times without a new checkpoint.
    """
    # The loop finds and prunes its own checkpoints, so Ray's record of an earlier start may be wrong.
    storage.remove(storage.join(run.folder, "checkpoint_manager_snapshot.json"))
    _release(run.folder)
    cluster, use_gpu, fatal = run.config.cluster, run.resources.use_gpu, storage.join(run.folder, FATAL)
    folder, name = run.folder.rsplit("/", 1)
    filesystem, folder = storage.arrow(folder)
    # Relative paths in the config are relative to the driver's folder.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    elastic = cluster.least < cluster.most
    if elastic:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(RESERVATION_TIMEOUT_S))
    storage.remove(fatal)
    trainer = _Trainer(
        _worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(cluster.least, cluster.most) if elastic else cluster.most,
            elastic_resize_monitor_interval_s=GROWTH_INTERVAL_S,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=-1),  # `BetweenGroups` counts them
            callbacks=[BetweenGroups(run.folder, cluster.max_failures), *callbacks],  # type: ignore[list-item]  # Ray takes its controller's too
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failure = error.controller_failure if isinstance(error, ray.train.ControllerError) else None
        if isinstance(failure, Stopped):
            log.warning("stopped while no worker ran; the steps after the newest checkpoint are lost")
            return
        log.error("%s", error)  # with the workers' tracebacks
        if isinstance(failure, NoProgress):
            raise TrainingError(str(failure)) from error
        raise TrainingError(f"training failed: {describe_failure(error)}") from error
    finally:
        if cause := storage.read_json(fatal):  # raise the cause that a worker found, not its consequence
            storage.remove(fatal)
            raise getattr(errors, cause["kind"])(cause["message"]) from None


def _release(folder: str) -> None:
    """Release the resources of an earlier start whose driver was killed; Ray keeps them for three minutes."""
    reservation = storage.join(folder, RESERVATION)
    if storage.exists(reservation):
        holder = f"train-{storage.read_text(reservation)}"
        coordinator = autoscaling.get_or_create_autoscaling_coordinator()
        ray.get(coordinator.cancel_request.remote(holder), timeout=60)


def describe_failure(error: ray.train.TrainingFailedError) -> str:
    """Describe why a run failed, in one line: each kind of failure once, with the first worker that had it.

    Args:
        error: raised by Ray Train.
    """
    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    if not failures:
        return " ".join(str(error).split())
    kinds: dict[str, str] = {}
    for rank, failure in sorted(failures.items()):
        failure = getattr(failure, "health_check_failure", failure)  # Ray's wrapper adds nothing
        message = (str(failure).strip().splitlines() or ["no message"])[0]
        kinds.setdefault(f"{type(failure).__name__}: {message}", f"worker {rank}")
    return "; ".join(f"{worker}: {kind}" for kind, worker in kinds.items())


class _Trainer(TorchTrainer):
    """A trainer that leaves Ctrl-C to `stoppable`; Ray's own handler would end the run without a checkpoint."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


class Stopped(Exception):
    """The user stopped the run while it had no workers that could save."""


class NoProgress(Exception):
    """The workers failed too often without a new checkpoint."""


class BetweenGroups(ControllerCallback):
    """Work of Ray's controller between two groups of workers.

    A group that grows restarts from the newest checkpoint, so one is made first and no step is lost. A run that
    waits for nodes can be stopped, since this callback checks for the request. Failures are counted here, since a new
    checkpoint sets the count back: a long run on nodes that come and go ends only where it makes no progress.

    Args:
        folder: of the run.
        max_failures: restarts without a new checkpoint in between; -1 sets no limit.
    """

    CHECKPOINT_TIMEOUT_S = 120.0

    def __init__(self, folder: str, max_failures: int):
        self._folder, self._max_failures = folder, max_failures
        self._failures = 0
        self._newest: str | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Record the name under which Ray reserves resources, for `_release`.

        Args:
            train_run_context: Ray's context of the run.
        """
        storage.publish_text(storage.join(self._folder, RESERVATION), train_run_context.run_id)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Save before a resize, count failures, and check for a stop request.

        Ray calls this repeatedly while it waits for nodes.

        Args:
            previous_state: of Ray's controller.
            current_state: of Ray's controller.

        Raises:
            Stopped: the user requested it.
            NoProgress: too many failures without a new checkpoint.
        """
        waiting = state.InitializingState | state.RestartingState | state.ReschedulingState
        if isinstance(current_state, state.ResizingState):
            self._save()
        elif isinstance(current_state, waiting):
            if isinstance(current_state, state.RestartingState) and current_state is not previous_state:
                self._count(current_state.training_failed_error)
            if type(previous_state) is type(current_state):
                time.sleep(0.5)  # Ray itself would retry without a pause
            if storage.exists(storage.join(self._folder, STOP)):
                raise Stopped

    def _count(self, error: Any) -> None:
        """Count a failure; more than `max_failures` after the same checkpoint end the run."""
        try:
            newest = checkpoint.newest(self._folder)
        except Exception as outage:  # of the storage, which must not end the run
            log.warning("could not look for a new checkpoint after a failure: %s", outage)
            return
        self._failures = self._failures + 1 if newest == self._newest else 1
        self._newest = newest
        if 0 <= self._max_failures < self._failures:
            since = "before the first checkpoint" if newest is None else f"since {newest.rpartition('/')[2]}"
            raise NoProgress(
                f"training failed {self._failures} times {since}, more than cluster.max_failures "
                f"({self._max_failures}) allows; last failure: {describe_failure(error)}"
            )

    def _save(self) -> None:
        """Request a checkpoint and wait until it is complete."""
        request = storage.join(self._folder, SAVE)
        try:
            before, deadline = checkpoint.newest(self._folder), time.monotonic() + self.CHECKPOINT_TIMEOUT_S
            storage.publish_bytes(request, b"")
            while checkpoint.newest(self._folder) == before and time.monotonic() < deadline:
                time.sleep(0.5)
            storage.remove(request)
        except Exception as error:  # an outage of the storage must not end the run: some steps are repeated
            log.warning("no checkpoint was made before the worker group changed: %s", error)


def _worker(settings: dict[str, Run]) -> None:
    """Train; the function that Ray Train runs in every worker."""
    logs.show()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train repeats every report, from every worker
    run = settings["run"]
    device = ray.train.torch.get_device()
    # Tell DeepSpeed the device: a worker without a GPU may see some, and Ray may order GPUs differently.
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ["LOCAL_RANK"] = str(device.index)
    torch.set_num_threads(run.config.cluster.cpus_per_worker)  # Ray's default is one thread
    fatal = storage.join(run.folder, FATAL)
    if storage.exists(fatal):  # no restart can help; the driver reports the reason
        return
    try:
        metrics = train(run, RaySession())
    except PipelineError as error:
        storage.publish_text(fatal, json.dumps({"kind": type(error).__name__, "message": str(error)}))
        raise
    ray.train.report(metrics)


class RaySession:
    """The session of a Ray Train worker; rank 0's metrics also appear on Ray's dashboard."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._preemption: ray.train.PreemptionInfo | None = None
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Set the newest values as metrics of Ray (Prometheus), from rank 0.

        Args:
            metrics: values by name.
            step: number of updates done.
        """
        if self.rank > 0:
            return
        for key, value in {**metrics, "train/step": step}.items():
            if key not in self._gauges:
                self._gauges[key] = Gauge("pipeline_" + key.replace("/", "_"), description=key)
            self._gauges[key].set(value)

    def settle(self) -> None:
        """Wait until Ray has uploaded every reported checkpoint."""
        ray.train.get_all_reported_checkpoints()

    def notice(self) -> str | None:
        """Ask Ray for nodes that drain because they will be preempted; all ranks get the same answer.

        Returns:
            The notice, or None if there is no new one.
        """
        earlier, self._preemption = self._preemption, ray.train.get_preemption_info()
        info = self._preemption
        if info is None or info == earlier:
            return None
        deadline = datetime.fromtimestamp(info.deadline_ms / 1000) if info.deadline_ms else None
        when = f" at {deadline:%H:%M:%S}" if deadline else ""
        return f"the nodes of workers {info.preempted_ranks} will be taken away{when}"

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Upload this rank's part of a checkpoint in the background; Ray merges the folders of all ranks.

        Args:
            folder: local folder with the part; it is removed.
            name: of the checkpoint's folder in the run's folder.
            metrics: reported with the checkpoint.
        """
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
