"""Work spread over Ray actors: answers in the order of the questions, users' mistakes raised as what they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util import ActorPool

from pipeline.errors import CapabilityError, PipelineError


@dataclass(frozen=True)
class Resources:
    """What a job's actors get.

    Attributes:
        actors: processes that work at the same time, at most.
        cpus: CPUs of each, which is also its threads.
        use_gpu: whether each has a GPU of its own.
    """

    actors: int
    cpus: int
    use_gpu: bool


def own_device() -> torch.device:
    """The GPU that this actor or task was given, else the CPU: Ray hides GPUs from nobody.

    Raises:
        CapabilityError: it was given a GPU that torch cannot use.
    """
    if not ray.is_initialized() or not ray.get_gpu_ids():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CapabilityError(
            f"a GPU is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it; "
            "expected a build of torch for GPUs, and an NVIDIA driver new enough for its CUDA"
        )
    return torch.device("cuda")


class _Actor:
    """Makes what it holds at the first call: what fails then reaches the caller like any other failure."""

    def __init__(self, kind: type, *arguments: Any):
        self._kind, self._arguments, self._held = kind, arguments, None

    def call(self, method: str, *task: Any) -> Any:
        if self._held is None:
            self._held = self._kind(*self._arguments)
        return getattr(self._held, method)(*task)


@contextmanager
def started(kind: type, arguments: Sequence[Any], resources: Resources, tasks: int) -> Iterator[list[Any]]:
    """Processes that each hold one `kind(*arguments)`, never more of them than tasks; they end with the block."""
    remote: Any = ray.remote(_Actor).options(num_cpus=resources.cpus, num_gpus=int(resources.use_gpu))
    ready = [remote.remote(kind, *arguments) for _ in range(max(1, min(resources.actors, tasks)))]
    try:
        yield ready
    finally:
        for one in ready:  # at once, since who comes next may need their CPUs and GPUs
            ray.kill(one)


def in_order(ready: list[Any], method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """`method(*task)` of every task on whichever actor is free, one at a time on each.

    As many tasks as there are actors reach each of them once.

    Raises:
        PipelineError: what an actor raised, without Ray's traceback.
    """
    pool: Any = ActorPool(ready)
    try:
        yield from pool.map(lambda one, task: one.call.remote(method, *task), tasks)
    except ray.exceptions.RayTaskError as error:
        for one in ready:  # the error's traceback holds them, and they would keep their CPUs
            ray.kill(one)
        raise error.cause if isinstance(error.cause, PipelineError) else error from None
