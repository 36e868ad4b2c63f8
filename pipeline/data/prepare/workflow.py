"""The steps that the preparations of text and of images share, on Ray.

Ray Data turns every unit of the source into one intermediate file and a record of it. A shard consists of exact
ranges of these files, so any Ray task can write any shard. Both steps skip what an earlier, interrupted preparation
has finished.
"""

import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
import ray
import ray.data
from jaxtyping import Int64
from pydantic import BaseModel

from pipeline import storage
from pipeline.config.data import AnyDataConfig
from pipeline.data.manifest import ShardFile, Skipped, Split
from pipeline.data.shards import Rows, publish_shard
from pipeline.data.tokenizers import PairTokenizer, Tokenizer
from pipeline.errors import DataError, PipelineError
from pipeline.logs import Progress

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer

log = logging.getLogger(__name__)

_SPLITS = ("train", "validation")
_NAMES = 1000  # descriptions of what was skipped that a manifest keeps

Pieces = Int64[np.ndarray, "p 3"]


class Unit(BaseModel, ABC):
    """The record of one unit of the source; keys that earlier versions wrote are ignored.

    Attributes:
        index: number of the unit.
        problems: descriptions of what cannot be read and was left out.
    """

    index: int
    problems: Sequence[str] = ()

    @property
    @abstractmethod
    def amount(self) -> int:
        """What the unit holds, as the log counts it."""

    def publish(self, work: str) -> Self:
        """Write the record, which says that the unit's file is complete, and return it.

        Args:
            work: folder of the intermediate files.
        """
        storage.publish_text(unit_path(work, self.index, "json"), self.model_dump_json())
        return self


U = TypeVar("U", bound=Unit)


class Shard(NamedTuple):
    """One shard to write.

    Attributes:
        name: of its file.
        pieces: what it holds, in order: of every piece its unit, and where it starts and stops in the unit's file.
    """

    name: str
    pieces: Pieces


class SplitPlan(NamedTuple):
    """The content of a split, before its shards are written.

    Attributes:
        split: what the manifest says of the split, the files left out.
        shards: to write, in order.
    """

    split: Split
    shards: list[Shard]


def unit_path(work: str, index: int, suffix: str) -> str:
    """Return the path of an intermediate file.

    Args:
        work: folder of the intermediate files.
        index: number of the unit.
        suffix: "json" for the record, which is written last; else that of the content.
    """
    return storage.join(work, f"unit-{index:06d}.{suffix}")


def map_row(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Call a function on the pickled value of a row, for Ray Data.

    Errors of users are passed on in place of the result, since Ray would wrap them in a page of traceback.

    Args:
        row: with the column `value`.
        function: of the value.

    Returns:
        A row with the pickled result.
    """
    value = pickle.loads(row["value"])
    if not isinstance(value, PipelineError):
        try:
            value = function(value)
        except PipelineError as error:
            value = error
    return {"value": pickle.dumps(value)}


def run_units(
    inputs: Sequence[Any],
    record: type[U],
    transform: Callable[[ray.data.Dataset], ray.data.Dataset],
    work: str,
    verb: str,
    amounts: str,
) -> list[U]:
    """Run all units of a source through Ray Data, except for those that are finished already.

    Args:
        inputs: by unit, what it consists of.
        record: type of the units' records.
        transform: applies `map_row` with functions that lead from (index, input) to the record of a unit.
        work: folder of the intermediate files.
        verb: what is done to the units, for the log, such as "encoded".
        amounts: what `amount` of a record counts, for the log, such as "images".

    Returns:
        The records of all units, in order.

    Raises:
        PipelineError: a unit failed.
    """
    names = [name for name in storage.listing(work) if name.startswith("unit-") and name.endswith(".json")]
    units = [record.model_validate_json(storage.read_bytes(storage.join(work, name))) for name in names]
    units = [unit for unit in units if unit.index < len(inputs)]
    finished = {unit.index for unit in units}
    if units:
        log.info("%d of %d units were %s before", len(units), len(inputs), verb)
    items = [{"value": pickle.dumps(unit)} for unit in enumerate(inputs) if unit[0] not in finished]
    if items:
        dataset = transform(ray.data.from_items(items, override_num_blocks=len(items)))
        dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
        progress = Progress(verb, "units", len(items), amounts)
        for row in dataset.iter_rows():
            unit = pickle.loads(row["value"])
            if isinstance(unit, PipelineError):
                raise unit
            units.append(unit)
            progress.add(unit.amount)
    units.sort(key=lambda unit: unit.index)
    for problem in (problem for unit in units for problem in unit.problems):
        log.warning("skipped %s", problem)
    return units


def save_tokenizer(tokenizer: "Tokenizer | ImageTokenizer | PairTokenizer", folder: str) -> None:
    """Write a tokenizer to a folder, whole or not at all.

    Args:
        tokenizer: of text, of images or of both.
        folder: path or URL.
    """
    with storage.scratch() as scratch:
        tokenizer.save(local := scratch / "tokenizer")
        storage.publish_folder(local, folder)


def check_held_out(data: AnyDataConfig, items: str, total: int, held_out: int) -> None:
    """Refuse a source that is empty, or of which nothing would be left to train on.

    Args:
        data: the data section of the config.
        items: "documents" or "images".
        total: number of items of the source.
        held_out: how many of them are held out.

    Raises:
        DataError: there are not more items than are held out.
    """
    if not total:
        raise DataError(f"data.source: {data.source!r} is empty: it has no {items} that can be used")
    if held_out >= total:
        what = f"{held_out} of {total} {items} would leave none to train on; expected less than {total}"
        raise DataError(f"data.validation_{items}: {what}")


def skipped(units: Sequence[Unit], *others: str) -> Skipped:
    """Return what the manifest says of what was left out.

    Args:
        units: records of all units.
        others: descriptions of what was left out before.
    """
    problems = [*others, *(problem for unit in units for problem in unit.problems)]
    return Skipped(count=len(problems), names=tuple(problems[:_NAMES]))


def plan_splits(
    pieces: Pieces, border: int, documents: tuple[int, int], shard_rows: int, row: int, tokens: int
) -> dict[str, SplitPlan]:
    """Cut a sequence of pieces into the shards of "train" and "validation".

    Args:
        pieces: the sequence, see `Shard`.
        border: where validation starts in the sequence.
        documents: number of documents or images in each split.
        shard_rows: rows of a shard; the last one of a split may have fewer.
        row: length of a row in the sequence; what does not fill a last row of a split is left out.
        tokens: number of tokens for each unit of length of the sequence.

    Returns:
        The plans of both splits; one that has less than a row has no shards.
    """
    units, firsts, lasts = pieces.T
    lengths = lasts - firsts
    places = np.cumsum(lengths) - lengths
    plans, size, ends = {}, shard_rows * row, (border, int(lengths.sum()))
    for name, start, end, count in zip(_SPLITS, (0, border), ends, documents, strict=True):
        stop = end - (end - start) % row
        shards = []
        for number, begin in enumerate(range(start, stop, size)):
            before = np.maximum(begin - places, 0)
            until = np.minimum(min(begin + size, stop) - places, lengths)
            cut = np.stack([units, firsts + before, firsts + until], axis=1)
            shards.append(Shard(f"{name}-{number:05d}.parquet", cut[before < until]))
        amounts = {"tokens": (end - start) * tokens, "tokens_dropped": (end - stop) * tokens}
        plans[name] = SplitPlan(Split(files=(), documents=count, **amounts), shards)
    return plans


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
    task: Any = ray.remote(num_cpus=1)(publish_shard)
    shards = [shard for plan in plans.values() for shard in plan.shards]
    tasks = {task.remote(shard.name, path, work, make=partial(make, shard)): shard for shard in shards}
    progress = Progress("wrote", "shards", len(tasks), unit)
    files: dict[str, ShardFile] = {}
    waiting = list(tasks)
    while waiting:  # as they end, so that a failure ends the others at once
        (done,), waiting = ray.wait(waiting)
        shard = tasks[done]
        try:
            files[shard.name] = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        progress.add(int((shard.pieces[:, 2] - shard.pieces[:, 1]).sum()))
    return {
        name: plan.split.model_copy(update={"files": tuple(files[shard.name] for shard in plan.shards)})
        for name, plan in plans.items()
    }
