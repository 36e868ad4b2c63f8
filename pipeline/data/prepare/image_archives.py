"""Labelled images in tar and Parquet files: where each lies, and its bytes."""

import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.text_sources import Problem
from pipeline.errors import DataError, did_you_mean

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAR, PARQUET = (".tar",), (".parquet",)
_ROWS = 64  # of Parquet held at a time


class Ref(NamedTuple):
    """Where one image lies.

    Attributes:
        place: row of Parquet, idx or digits, byte in a tar file, 0 in a file of its own.
        size: bytes in a tar file, else 0.
        label: its class; -1 if it is read with the image.
        name: in a tar file.
    """

    path: str
    place: int
    size: int
    label: int
    name: str = ""

    def __str__(self) -> str:
        if is_a(self.path, TAR):
            return f"{self.path}: {self.name}"
        if is_a(self.path, IMAGES):
            return self.path
        return f"{self.path} {'row' if is_a(self.path, PARQUET) else 'image'} {self.place}"


def is_a(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends so, in whatever case."""
    return path.lower().endswith(suffixes)


def outside(label: object, classes: int) -> str:
    """What is wrong with a label that is none of the classes."""
    return f"label {label!r}; expected 0 to {classes - 1} (data.classes)"


def list_tar(path: str, data: ImageDataConfig) -> Iterator[Ref | Problem]:
    """WebDataset: members next to each other whose names differ only behind the first dot are one sample."""
    try:
        with storage.open_read(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = ((*_stem(member.name), member) for member in tar if member.isfile())
            for stem, group in itertools.groupby(members, key=lambda item: item[0]):
                if not stem.rpartition("/")[2]:
                    continue  # a hidden file
                sample = {suffix: member for _, suffix, member in group}
                yield _list_sample(path, stem, sample, tar, data)
    except (ConnectionError, TimeoutError):
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        yield Problem(path, f"cannot be read to the end: {type(error).__name__}: {error}")


def _stem(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _list_sample(
    path: str, stem: str, sample: dict[str, tarfile.TarInfo], tar: tarfile.TarFile, data: ImageDataConfig
) -> Ref | Problem:
    image = next((sample[end[1:]] for end in IMAGES if end[1:] in sample), None)
    where, there = f"{path}: {stem}", ", ".join(sample)
    if image is None:
        return Problem(where, f"no image among {there}; expected {', '.join(end[1:] for end in IMAGES)}")
    texts: dict[str, str] = {}
    try:
        texts |= {end: _text(tar, sample[end]) for end in ("cls", "json") if end in sample}
        label = int(texts["cls"]) if "cls" in texts else json.loads(texts["json"])[data.label_field]
    except KeyError:
        expected = f"cls, or json with the field {data.label_field!r} (data.label_field)"
        return Problem(where, f"no label among {there}; expected {expected}")
    except (ValueError, TypeError) as error:
        return Problem(where, f"no label in {', '.join(texts)}: {error}")
    if not isinstance(label, int) or label < 0:
        return Problem(where, outside(label, data.classes))
    return Ref(path, image.offset_data, image.size, label, image.name)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None, member.name  # it is a file
    return file.read().decode("utf-8")


def read_tar(path: str, refs: Sequence[Ref]) -> Iterator[tuple[bytes, int]]:
    """Bytes and label of each image."""
    with storage.open_read(path) as file:
        for ref in refs:
            file.seek(ref.place)
            yield file.read(ref.size), ref.label


def list_parquet(path: str, data: ImageDataConfig) -> Iterator[Ref | Problem]:
    """Every row, its label left for later.

    Raises:
        DataError: no column of the names that the config gives.
    """
    try:
        with storage.open_read(path) as file:
            parquet = pq.ParquetFile(file)
            names, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        yield Problem(path, f"cannot be read: {type(error).__name__}: {error}")
        return
    for key, name in (("image_field", data.image_field), ("label_field", data.label_field)):
        if name not in names:
            near = did_you_mean(name, names)
            raise DataError(f"data.{key}: no column {name!r} in {path}; columns: {', '.join(names)}{near}")
    yield from (Ref(path, row, 0, -1) for row in range(rows))


def read_parquet(
    path: str, refs: Sequence[Ref], data: ImageDataConfig
) -> Iterator[tuple[bytes, int] | Problem]:
    """Bytes and label of each image, whose rows ascend: only their row groups are read, a few rows at a time."""
    wanted = {ref.place for ref in refs}
    with storage.open_read(path) as file:
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = sorted({int(np.searchsorted(starts, row, side="right")) - 1 for row in wanted})
        numbers = itertools.chain.from_iterable(range(starts[g], starts[g + 1]) for g in groups)
        columns = [data.image_field, data.label_field]
        for batch in parquet.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
            images, labels = batch.column(data.image_field), batch.column(data.label_field)
            for i in range(len(batch)):
                if (number := next(numbers)) in wanted:
                    yield _cell(images[i].as_py(), labels[i].as_py(), f"{path} row {number}", data)
            if number >= refs[-1].place:
                return


def _cell(image: Any, label: Any, where: str, data: ImageDataConfig) -> tuple[bytes, int] | Problem:
    """A row of Parquet; Hugging Face stores an image as its bytes and its file's name."""
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        what = type(image).__name__
        return Problem(
            where, f"{data.image_field!r} (data.image_field) holds a {what}; expected an image's bytes"
        )
    if not isinstance(label, int) or not 0 <= label < data.classes:
        return Problem(where, outside(label, data.classes))
    return image, label
