"""What a run does when it is told that its group will change: it saves, and goes on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState

from pipeline import storage
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.errors import CapabilityError
from pipeline.run import Run
from pipeline.runtime.actors import Resources
from pipeline.runtime.control_files import SAVE, STOP, Requests
from pipeline.runtime.ray_cluster import available_resources, places
from pipeline.runtime.session import PlainSession
from pipeline.training import checkpoint, worker_group
from tests.support import observed
from tests.support.observed import Seen, quick
from tests.support.workers import Workers


def told(rank: int, workers: int, config: RunConfig, file: bool) -> Seen:
    """Train with a request to save in the run's folder, or with a notice of Ray's from the start."""
    with pytest.MonkeyPatch.context() as patch:
        if file:
            patch.setattr(Requests, "INTERVAL_S", 0.01)
        else:
            patch.setattr(Requests, "NOTICE_INTERVAL_S", 0.0)
            notices = ["the nodes of workers [1] go"]
            patch.setattr(PlainSession, "notice", lambda self: notices.pop() if notices else None)
        return observed.train_one(rank, workers, config)


@pytest.mark.parametrize("file", [True, False], ids=["asked by a file", "told by Ray"])
def test_one_checkpoint_more_and_the_same_run(
    run_storage: Path, groups: dict[int, Workers], file: bool
) -> None:
    config = quick(run_storage, f"told-{file}", 0.1, steps=12, checkpoint_every=100, keep=5)
    run = Run(config).folder
    request = storage.join(run, SAVE)
    if file:
        storage.publish_bytes(request, b"")
    first = groups[2](told, config, file)
    early, last = checkpoint.steps(run)
    assert early < last == 12
    assert not storage.exists(request)
    assert [seen.error for seen in first] == [None, None]
    why = "the group of workers is about to change" if file else "the nodes of workers [1] go"
    assert f"step {early}: {why}; saving before that" in first[0].log
    # One worker goes on from there, as after the loss of the other.
    storage.remove(storage.join(run, checkpoint.name_of(12)))
    second = groups[1](observed.train_one, config)[0]
    assert list(second.losses) == list(range(early + 1, 13))
    for step, loss in second.losses.items():
        assert loss == pytest.approx(first[0].losses[step], rel=1e-5)


def test_fewest_workers_must_fit_and_the_most_need_not(run_storage: Path, ray_cluster: None) -> None:
    def elastic(least: int, most: int) -> ClusterConfig:
        config = quick(run_storage, "bounds")
        workers = {"min": least, "max": most}
        return config.model_validate(config.model_dump() | {"cluster": {"workers": workers}}).cluster

    assert available_resources(elastic(2, 4)) == Resources(2, 1, False)
    assert available_resources(elastic(1, 4)) == Resources(2, 1, False)
    assert available_resources(elastic(1, 1)) == Resources(1, 1, False)
    with pytest.raises(CapabilityError, match="3 workers of 1 CPUs, the cluster has room for 2"):
        available_resources(elastic(3, 4))


def test_a_worker_has_its_cpus_and_its_gpu_on_one_node() -> None:
    def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}

    nodes = [node(4), node(16, 4), node(16, 4), node(64, 8, alive=False)]
    assert places(nodes, 6, use_gpu=True) == 4
    assert places(nodes, 4, use_gpu=True) == 8
    assert places(nodes, 2, use_gpu=True) == 8
    assert places(nodes, 3, use_gpu=False) == 1 + 5 + 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU that there is")
def test_a_machine_with_one_gpu(run_storage: Path) -> None:
    """Ray takes our word that there is one; torch does not."""
    found = subprocess.run(
        [sys.executable, "-c", ONE_GPU, quick(run_storage, "one-gpu").model_dump_json()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = found.stdout.splitlines()
    assert lines[:3] == ["True 1", "False 2", "cpu"], found.stdout + found.stderr[-3000:]
    assert lines[3].startswith("a GPU is there, but torch")
    assert "1 GPUs for 2 workers: CPUs are used (cluster.accelerator: auto)" in found.stderr


ONE_GPU = """
import sys, ray
from pipeline import logs
from pipeline.config.schema import RunConfig
from pipeline.errors import CapabilityError
from pipeline.runtime.actors import own_device
from pipeline.runtime.ray_cluster import available_resources
logs.show()
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="error")
config = RunConfig.model_validate_json(sys.argv[1])
for workers in (1, 2):
    one = config.cluster.model_copy(update={"workers": workers})
    found = available_resources(one)
    print(found.use_gpu, found.actors)
alone, given = ray.remote(own_device).remote(), ray.remote(num_gpus=1)(own_device).remote()
print(ray.get(alone))
try:
    ray.get(given)
except ray.exceptions.RayTaskError as error:
    assert isinstance(error.cause, CapabilityError)
    print(error.cause)
"""


def test_gpus_where_there_are_none(run_storage: Path, ray_cluster: None) -> None:
    config = quick(run_storage, "no-gpus")
    asked = config.cluster.model_copy(update={"workers": 1, "accelerator": "gpu"})
    with pytest.raises(CapabilityError, match=r" 0 GPUs\); expected cluster\.accelerator=cpu$"):
        available_resources(asked)


def test_reason_of_a_failed_run_is_one_line() -> None:
    lost = "Connection closed by peer"
    failures = {2: OSError(f"{lost}\nmore"), 0: ValueError("a\nb"), 1: OSError(lost)}
    error = ray.train.WorkerGroupError("many\nlines", failures)
    assert worker_group.describe_failure(error) == f"worker 0: ValueError: a; worker 1: OSError: {lost}"
    error = ray.train.ControllerError(RuntimeError("no\nplace"))
    assert worker_group.describe_failure(error) == "Training failed due to controller error: no place"


def test_run_that_waits_for_nodes_can_be_stopped(tmp_path: Path) -> None:
    between = worker_group.BetweenGroups(str(tmp_path), 3)
    waiting = RestartingState(training_failed_error=ray.train.ControllerError(RuntimeError("no place")))
    between.after_controller_state_update(RunningState(), waiting)
    between.after_controller_state_update(waiting, waiting)
    (tmp_path / STOP).touch()
    between.after_controller_state_update(waiting, RunningState())  # workers look for themselves
    with pytest.raises(worker_group.Stopped):
        between.after_controller_state_update(waiting, waiting)


def test_failures_are_counted_from_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty with a checkpoint between each two of them are none too many; three of one checkpoint are."""
    steps: list[str] = []
    monkeypatch.setattr(worker_group.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(worker_group.checkpoint, "newest", lambda folder: steps[-1] if steps else None)
    between = worker_group.BetweenGroups(str(tmp_path), 2)

    def fail() -> None:
        lost = RestartingState(ray.train.WorkerGroupError("lost", {1: OSError("gone")}))
        between.after_controller_state_update(RunningState(), lost)
        between.after_controller_state_update(lost, lost)  # it waits for nodes

    for step in range(20):
        steps.append(f"{tmp_path}/step_{step:08}")
        fail()
    fail()
    says = (
        r"training failed 3 times since step_00000019, .*max_failures \(2\) allows; .*worker 1: OSError: gone"
    )
    with pytest.raises(worker_group.NoProgress, match=says):
        fail()
    unlimited = worker_group.BetweenGroups(str(tmp_path), -1)
    lost = RestartingState(ray.train.ControllerError(RuntimeError("no place")))
    for _ in range(9):
        unlimited.after_controller_state_update(RunningState(), lost)
