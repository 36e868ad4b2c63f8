"""Work spread over Ray actors: results come in the order of the tasks, and our own errors are raised as they are."""

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
    """What the actors or workers of a job get.

    Attributes:
        actors: largest number of processes that work at the same time.
        cpus: CPUs of each, which is also its number of threads.
        use_gpu: whether each has a GPU of its own.
    """

    actors: int
    cpus: int
    use_gpu: bool


def own_device() -> torch.device:
    """Return the GPU that Ray gave this actor or task, or the CPU; a process may see GPUs that are not its own.

    Raises:
        CapabilityError: Ray gave it a GPU that torch cannot use.
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
    """Holds an object made at the first call, so that a failure of its constructor reaches the caller."""

    def __init__(self, kind: type, *arguments: Any):
        self._kind, self._arguments, self._object = kind, arguments, None

    def call(self, method: str, *task: Any) -> Any:
        if self._object is None:
            self._object = self._kind(*self._arguments)
        return getattr(self._object, method)(*task)


@contextmanager
def started(kind: type, arguments: Sequence[Any], resources: Resources, tasks: int) -> Iterator[list[Any]]:
    """Start actors that each hold one `kind(*arguments)`; they end with the block.

    Args:
        kind: class of the held object.
        arguments: of its constructor.
        resources: how many actors, and what each gets.
        tasks: number of tasks; no more actors than tasks are started.

    Returns:
        A context manager that gives the actors, for `in_order`.
    """
    remote: Any = ray.remote(_Actor).options(num_cpus=resources.cpus, num_gpus=int(resources.use_gpu))
    actors = [remote.remote(kind, *arguments) for _ in range(max(1, min(resources.actors, tasks)))]
    try:
        yield actors
    finally:
        # Also while a traceback holds them, since the next user may need their CPUs and GPUs.
        for actor in actors:
            ray.kill(actor)


def in_order(actors: list[Any], method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Call `method(*task)` for every task on whichever actor is free, one call at a time on each.

    If there are as many tasks as actors, every actor gets one.

    Args:
        actors: from `started`.
        method: name of the held objects' method.
        tasks: arguments of every call.

    Returns:
        An iterator over the results, in the order of the tasks.

    Raises:
        PipelineError: raised by an actor; given without Ray's traceback.
    """
    pool: Any = ActorPool(actors)
    try:
        yield from pool.map(lambda actor, task: actor.call.remote(method, *task), tasks)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, PipelineError) else error from None
