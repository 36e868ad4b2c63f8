"""What workers run in image preparation: read a unit of images, encode it, cut a shard out of the units' rows.

A split's rows are the units' rows in a fixed order, so any worker can write any shard, and what it holds does not
depend on who did. The mirrored copies of all training images follow behind all of the originals: the two of an image
are then as far from each other as can be, and hardly ever meet in a batch.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt, UInt8

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.manifest import ShardFile
from pipeline.data.prepare.image_archives import Ref
from pipeline.data.prepare.image_sources import read_images
from pipeline.data.prepare.pixels import square
from pipeline.data.prepare.text_sources import Problem
from pipeline.data.shards import publish_shard
from pipeline.errors import DataError


@dataclass(frozen=True)
class Unit:
    """What encoding one unit of the source gave; its file has training rows, their mirrored ones, held-out ones.

    Attributes:
        train: rows, mirrored ones not counted.
        validation: rows.
        problems: images left out because they cannot be read.
        fatal: the one that stops the job (`data.on_error: fatal`), or "".
    """

    index: int
    train: int = 0
    validation: int = 0
    problems: Sequence[str] = ()
    fatal: str = ""


@dataclass(frozen=True)
class Shard:
    """One shard to write: rows start..stop of a split."""

    name: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where the rows of the splits are.

    Attributes:
        pieces: by split, in order: unit, first row in its file, rows.
        bos: the id in front of every row.
        dtype: of the ids.
    """

    pieces: dict[str, Int64[np.ndarray, "p 3"]]
    bos: int
    dtype: str


@dataclass
class Pixels:
    """Images of a unit, as they go from readers to encoders."""

    images: UInt8[np.ndarray, "n S S 3"]
    labels: Int64[np.ndarray, "n"]
    kept: Int64[np.ndarray, "n"]
    problems: list[str] = field(default_factory=list)


def held_out(numbers: Int64[np.ndarray, "n"], validation: int, images: int) -> Bool[np.ndarray, "n"]:
    """Which of the images with these numbers belong to validation: so many of all, evenly spread."""
    return (numbers + 1) * validation // images > numbers * validation // images


@storage.retry
def read_pixels(refs: Sequence[Ref], data: ImageDataConfig) -> Pixels:
    """The images that can be read, cropped and resized; `kept` has their places in `refs`.

    Raises:
        DataError: one cannot be read, and `data.on_error` is fatal.
    """
    images, labels, kept, problems = [], [], [], []
    for place, (ref, item) in enumerate(zip(refs, read_images(refs, data), strict=True)):
        if not isinstance(item, Problem):
            try:
                images.append(square(item[0], data.size))
                labels.append(item[1])
                kept.append(place)
                continue
            except DataError as error:
                item = Problem(str(ref), str(error))
        if data.on_error == "fatal":
            raise refusal(item)
        problems.append(str(item))
    pixels = np.stack(images) if images else np.empty((0, data.size, data.size, 3), np.uint8)
    return Pixels(pixels, np.array(labels, np.int64), np.array(kept, np.int64), problems)


def refusal(problem: Problem) -> DataError:
    """What to raise for a fault of the source where those are fatal."""
    hint = "data.on_error: skip counts and leaves out what cannot be read"
    return DataError(f"data.source: {problem} ({hint})")


def read_unit_pixels(
    row: dict[str, Any], data: ImageDataConfig, validation: int, images: int
) -> dict[str, Any]:
    """Ray Data's first map function. Bytes and JSON, so that no column's type depends on what a unit holds.

    Args:
        row: `index`, `first` (number of the unit's first image) and `refs` (JSON).
        validation, images: how many are held out of how many.
    """
    refs = [Ref(*ref) for ref in json.loads(row["refs"])]
    index = int(row["index"])
    try:
        pixels = read_pixels(refs, data)
    except DataError as error:  # as a result, since Ray would wrap it in a page of traceback
        unit = Unit(index, fatal=str(error))
        return {"unit": json.dumps(asdict(unit)), "images": b"", "labels": b"", "held_out": b""}
    out = held_out(int(row["first"]) + pixels.kept, validation, images)
    unit = Unit(index, int((~out).sum()), int(out.sum()), pixels.problems)
    return {
        "unit": json.dumps(asdict(unit)),
        "images": pixels.images.tobytes(),
        "labels": pixels.labels.tobytes(),
        "held_out": out.tobytes(),
    }


class Encoder:
    """Ray Data's second map function, with the tokenizer in its actor.

    Args:
        tokenizer: folder that its `save` wrote.
        work: folder of the units.
    """

    def __init__(self, tokenizer: str, data: ImageDataConfig, work: str, device: str) -> None:
        import torch  # seconds, and who reads images or writes shards does without

        from pipeline.models.vq import load_image_tokenizer

        torch.set_num_threads(data.encode_threads)
        self._tokenizer = load_image_tokenizer(tokenizer, data.factor, data.encode_batch, device)
        self._data, self._work = data, work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(**json.loads(row["unit"]))
        if not unit.fatal:
            try:
                self._encode(unit, row)
            except DataError as error:
                unit = Unit(unit.index, fatal=str(error))
        return {"record": json.dumps(asdict(unit))}

    def _encode(self, unit: Unit, row: dict[str, Any]) -> None:
        side = self._data.size
        images = np.frombuffer(row["images"], np.uint8).reshape(-1, side, side, 3)
        labels = np.frombuffer(row["labels"], np.int64)
        out = np.frombuffer(row["held_out"], bool)
        order = np.concatenate([np.flatnonzero(~out), np.flatnonzero(out)])
        rows, classes = images[order], labels[order]
        if self._data.flip:
            train = unit.train
            rows = np.concatenate([rows[:train], rows[:train, :, ::-1], rows[train:]])
            classes = np.concatenate([classes[:train], classes[:train], classes[train:]])
        sink = io.BytesIO()
        np.savez(sink, codes=self._tokenizer.encode(np.ascontiguousarray(rows)).astype("<i4"), labels=classes)
        storage.publish_bytes(unit_path(self._work, unit.index, "npz"), sink.getvalue())
        storage.publish_text(unit_path(self._work, unit.index, "json"), json.dumps(asdict(unit)))


def unit_path(work: str, index: int, kind: str) -> str:
    """A unit's `npz` (codes and labels) or `json` (`Unit`, written last)."""
    return storage.join(work, f"unit-{index:06d}.{kind}")


def read_unit(work: str, index: int) -> Unit:
    """The record of a unit that was encoded."""
    return Unit(**json.loads(storage.read_text(unit_path(work, index, "json"))))


def plan_pieces(units: Sequence[Unit], flip: bool) -> dict[str, Int64[np.ndarray, "p 3"]]:
    """By split, the pieces of units that its rows are: unit, first row in its file, rows."""
    originals = [(unit.index, 0, unit.train) for unit in units]
    mirrored = [(unit.index, unit.train, unit.train) for unit in units] if flip else []
    validation = [(unit.index, (1 + flip) * unit.train, unit.validation) for unit in units]
    plans = {"train": originals + mirrored, "validation": validation}
    return {split: np.array(pieces, np.int64).reshape(-1, 3) for split, pieces in plans.items()}


def write_shard(shard: Shard, layout: Layout, path: str, work: str) -> ShardFile:
    """Write one shard, unless it is there.

    Args:
        path: folder of the shards.
        work: folder of the units.
    """

    def make() -> tuple[UInt[np.ndarray, "n L"], Int64[np.ndarray, "n"]]:
        pieces = layout.pieces[shard.split]
        starts = np.cumsum([0, *pieces[:, 2]])
        first = int(np.searchsorted(starts, shard.start, side="right")) - 1
        codes, labels = [], []
        for place in range(first, int(np.searchsorted(starts, shard.stop, side="left"))):
            unit, offset, _ = pieces[place]
            start = offset + max(shard.start - starts[place], 0)
            stop = offset + min(shard.stop, starts[place + 1]) - starts[place]
            with np.load(io.BytesIO(storage.read_bytes(unit_path(work, int(unit), "npz")))) as file:
                codes.append(file["codes"][start:stop])
                labels.append(file["labels"][start:stop])
        rows = np.concatenate(codes)
        tokens = np.full((len(rows), 1 + rows.shape[1]), layout.bos, layout.dtype)
        tokens[:, 1:] = rows
        return tokens, np.concatenate(labels)

    return publish_shard(shard.name, path, work, make)
