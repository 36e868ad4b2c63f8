"""What the preparations of text and of images share: units through Ray Data, shards by Ray tasks, progress."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import ray
import ray.data

from pipeline.data.manifest import ShardFile, SpecialIds, Split, TokenizerInfo
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

S = TypeVar("S", bound="_Range")


class _Range(Protocol):
    """Part of a split that becomes one file."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class PreparationResult:
    """What a preparation made, and what the manifest says of it beside source and config.

    Attributes:
        problems: what could not be read and was left out.
    """

    vocabulary: int
    special: SpecialIds
    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    documents: int
    empty: int
    tokens: int
    problems: tuple[str, ...]
    wrap: str = "none"
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    grid: int | None = None


def start_ray() -> None:
    """Join the Ray that is there, or start one on this machine."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)


def run_units(
    items: list[dict[str, Any]], *stages: Callable[[ray.data.Dataset], ray.data.Dataset]
) -> Iterator[Any]:
    """Run rows through Ray Data, one a block, yielding the `record` (JSON) of each as it comes."""
    if not items:
        return
    units: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for stage in stages:
        units = stage(units)
    units.context.enable_progress_bars = units.context.print_on_execution_start = False  # we log our own
    for row in units.iter_rows():
        yield json.loads(row["record"])


def run_shards(
    shards: list[S], write: Callable[..., ShardFile], shared: Any, path: str, work: str, unit: str
) -> Mapping[str, ShardFile]:
    """`write(shard, shared, path, work)` of every shard as a Ray task; files by name.

    Args:
        shared: what all tasks read, sent once.
        unit: what `start` and `stop` of a shard count, for the log.
    """
    task = ray.remote(num_cpus=1)(write)
    sent = ray.put(shared)
    tasks = {task.remote(shard, sent, path, work): shard for shard in shards}
    progress = Progress("wrote", "shards", len(tasks), unit)
    waiting = list(tasks)
    files: dict[str, ShardFile] = {}
    while waiting:
        done, waiting = ray.wait(waiting)
        shard = tasks[done[0]]
        try:
            files[shard.name] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        progress.add(shard.stop - shard.start)
    return files


class Progress:
    """A log line now and then: how many of how many, amount and amount/s, time left.

    Args:
        verb, what: as in "wrote 3 of 5 shards".
        total: how many there are.
        unit: of the amounts, as in "tokens".
        interval: seconds between lines; the last one always comes.
    """

    def __init__(self, verb: str, what: str, total: int, unit: str, interval: float = 5.0) -> None:
        self._verb, self._what, self._total, self._unit, self._interval = verb, what, total, unit, interval
        self._count = self._amount = 0
        self._begin = self._shown = time.monotonic()

    def add(self, amount: int) -> None:
        """One more is done, which held `amount`."""
        self._count += 1
        self._amount += amount
        now = time.monotonic()
        if now - self._shown < self._interval and self._count < self._total:
            return
        self._shown = now
        seconds = max(now - self._begin, 1e-9)
        log.info(
            "%s %d of %d %s, %d %s, %.0f %s/s, %.0f s left",
            self._verb,
            self._count,
            self._total,
            self._what,
            self._amount,
            self._unit,
            self._amount / seconds,
            self._unit,
            seconds / self._count * (self._total - self._count),
        )
