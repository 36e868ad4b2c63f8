"""The steps that the preparations of text and of images share, on Ray.

Ray Data turns every unit of the source into one intermediate file and a record of it. A shard consists of exact
ranges of these files, so any Ray task can write any shard. Both steps skip what an earlier, interrupted preparation
has finished.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import ray
import ray.data
from jaxtyping import Int64

from pipeline import storage
from pipeline.data.manifest import ShardFile, Split
from pipeline.data.shards import Rows, publish_shard
from pipeline.errors import DataError, PipelineError
from pipeline.logs import Progress

log = logging.getLogger(__name__)

Pieces = Int64[np.ndarray, "p 3"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The record of one unit of the source.

    Attributes:
        index: number of the unit.
        problems: descriptions of what cannot be read and was left out.
        fatal: the problem that ends the preparation (`data.on_error: fatal`), or "".
    """

    index: int
    problems: Sequence[str] = ()
    fatal: str = ""

    @property
    def amount(self) -> int:
        """What the unit holds, as the log counts it."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return the record as JSON, so that the type of a column of Ray Data never depends on its content."""
        return json.dumps(asdict(self))

    def publish(self, work: str) -> None:
        """Write the record, which says that the unit's file is complete.

        Args:
            work: folder of the intermediate files.
        """
        storage.publish_text(unit_path(work, self.index, "json"), self.to_json())


U = TypeVar("U", bound=Unit)


@dataclass(frozen=True)
class Shard:
    """One shard to write.

    Attributes:
        name: of its file.
        pieces: what it holds, in order: of every piece its unit, and where it starts and stops in the unit's file.
    """

    name: str
    pieces: Pieces


@dataclass(frozen=True)
class SplitPlan:
    """The content of a split, before its shards are written; see `Split` for the counts."""

    shards: Sequence[Shard]
    documents: int
    tokens: int
    tokens_dropped: int = 0

    def to_split(self, files: Mapping[str, ShardFile]) -> Split:
        """Return what the manifest says of the split.

        Args:
            files: by name, the shards that were written; those of other splits may be among them.
        """
        return Split(
            files=tuple(files[shard.name] for shard in self.shards),
            documents=self.documents,
            tokens=self.tokens,
            tokens_dropped=self.tokens_dropped,
        )


def unit_path(work: str, index: int, suffix: str) -> str:
    """Return the path of an intermediate file.

    Args:
        work: folder of the intermediate files.
        index: number of the unit.
        suffix: "json" for the record, which is written last; else that of the content.
    """
    return storage.join(work, f"unit-{index:06d}.{suffix}")


def run_units(
    inputs: Sequence[str],
    record: type[U],
    transform: Callable[[ray.data.Dataset], ray.data.Dataset],
    work: str,
    verb: str,
    amounts: str,
) -> list[U]:
    """Run all units of a source through Ray Data, except for those that are finished already.

    Args:
        inputs: by unit, what it consists of, in any encoding.
        record: type of the units' records.
        transform: turns rows of `index` and `input` into rows of `record` (JSON), having written the unit's file.
        work: folder of the intermediate files.
        verb: what is done to the units, for the log, such as "encoded".
        amounts: what `amount` of a record counts, for the log, such as "images".

    Returns:
        The records of all units, in order.

    Raises:
        DataError: a unit failed.
    """
    names = set(storage.listing(work))
    finished = [index for index in range(len(inputs)) if f"unit-{index:06d}.json" in names]
    units = [record(**json.loads(storage.read_text(unit_path(work, index, "json")))) for index in finished]
    if units:
        log.info("%d of %d units were %s before", len(units), len(inputs), verb)
    missing = sorted(set(range(len(inputs))).difference(finished))
    if missing:
        items = [{"index": index, "input": inputs[index]} for index in missing]
        dataset = transform(ray.data.from_items(items, override_num_blocks=len(items)))
        dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
        progress = Progress(verb, "units", len(missing), amounts)
        for row in dataset.iter_rows():
            unit = record(**json.loads(row["record"]))
            if unit.fatal:
                raise DataError(unit.fatal)
            units.append(unit)
            progress.add(unit.amount)
    units.sort(key=lambda unit: unit.index)
    for problem in (problem for unit in units for problem in unit.problems):
        log.warning("skipped %s", problem)
    return units


def plan_shards(split: str, pieces: Pieces, start: int, stop: int, size: int) -> list[Shard]:
    """Cut a range of a sequence of pieces into shards.

    Args:
        split: name of the split.
        pieces: the sequence, see `Shard`.
        start: where the range starts in the sequence.
        stop: where it stops.
        size: length of a shard; the last one may be shorter.
    """
    units, firsts, lasts = pieces.T
    lengths = lasts - firsts
    places = np.cumsum(lengths) - lengths
    shards = []
    for number, begin in enumerate(range(start, stop, size)):
        skipped = np.maximum(begin - places, 0)
        kept = np.minimum(min(begin + size, stop) - places, lengths)
        cut = np.stack([units, firsts + skipped, firsts + kept], axis=1)
        shards.append(Shard(f"{split}-{number:05d}.parquet", cut[skipped < kept]))
    return shards


def write_shards(
    plans: Mapping[str, SplitPlan], make: Callable[[Shard], Rows], path: str, work: str, unit: str
) -> dict[str, Split]:
    """Write the shards of all splits by Ray tasks, except for those that are there already.

    Args:
        plans: by split.
        make: returns the rows of a shard.
        path: folder of the shards.
        work: folder of the intermediate files.
        unit: what the pieces of a shard count, for the log.

    Returns:
        What the manifest says of each split.
    """
    task = ray.remote(num_cpus=1)(publish_shard)
    shards = [shard for plan in plans.values() for shard in plan.shards]
    tasks = {task.remote(shard.name, path, work, partial(make, shard)): shard for shard in shards}
    progress = Progress("wrote", "shards", len(tasks), unit)
    files: dict[str, ShardFile] = {}
    waiting = list(tasks)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        shard = tasks[done]
        try:
            files[shard.name] = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        progress.add(int((shard.pieces[:, 2] - shard.pieces[:, 1]).sum()))
    return {split: plan.to_split(files) for split, plan in plans.items()}
