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
from pipeline.data.prepare.source_files import Problem
from pipeline.errors import DataError, did_you_mean

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAR, PARQUET = (".tar",), (".parquet",)
_ROWS = 64  # of Parquet held at a time


class Ref(NamedTuple):
    """The place of one image.

    Attributes:
        path: of its file, or "digits".
        place: row of Parquet, idx or digits; byte in a tar file; 0 in a file of its own.
        size: number of bytes in a tar file, else 0.
        label: its class; -1 if it is read with the image.
        name: of the member of a tar file, else "".
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
    """Return whether a file's name ends with one of the suffixes, in upper or lower case."""
    return path.lower().endswith(suffixes)


def outside(label: object, classes: int) -> str:
    """Describe a label that is none of the classes.

    Args:
        label: as the source has it.
        classes: number of classes.
    """
    return f"label {label!r}; expected 0 to {classes - 1} (data.classes)"


def list_tar(path: str, data: ImageDataConfig) -> Iterator[Ref | Problem]:
    """List the samples of a tar file in WebDataset's layout.

    Members next to each other whose names differ only behind the first dot are one sample.

    Args:
        path: of the file.
        data: the data section of the config.

    Returns:
        The images with their labels, and in place of samples that cannot be read what is wrong with them.
    """
    try:
        with storage.open_read(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = ((*_stem(member.name), member) for member in tar if member.isfile())
            for stem, group in itertools.groupby(members, key=lambda item: item[0]):
                if not stem.rpartition("/")[2]:
                    continue  # a hidden file
                sample = {suffix: member for _, suffix, member in group}
                try:
                    image, label = _sample(sample, tar, data)
                    yield Ref(path, image.offset_data, image.size, label, image.name)
                except DataError as error:
                    yield Problem(f"{path}: {stem}", str(error))
    except (ConnectionError, TimeoutError):
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        yield Problem(path, f"cannot be read to the end: {type(error).__name__}: {error}")


def _stem(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _sample(
    sample: dict[str, tarfile.TarInfo], tar: tarfile.TarFile, data: ImageDataConfig
) -> tuple[tarfile.TarInfo, int]:
    """Return the image and the label of a sample; raise what is wrong with it."""
    suffixes = ", ".join(sample)
    image = next((sample[end[1:]] for end in IMAGES if end[1:] in sample), None)
    if image is None:
        raise DataError(f"no image among {suffixes}; expected {', '.join(end[1:] for end in IMAGES)}")
    suffix = "cls" if "cls" in sample else "json"
    try:
        file = tar.extractfile(sample[suffix])
        assert file is not None, suffix  # members are files
        text = file.read().decode("utf-8")
        label = int(text) if suffix == "cls" else json.loads(text)[data.label_field]
    except KeyError:
        expected = f"cls, or json with the field {data.label_field!r} (data.label_field)"
        raise DataError(f"no label among {suffixes}; expected {expected}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"no label in {suffix}: {error}") from None
    if not isinstance(label, int) or label < 0:
        raise DataError(outside(label, data.classes))
    return image, label


def read_tar(path: str, refs: Sequence[Ref]) -> Iterator[tuple[bytes, int]]:
    """Read images of a tar file.

    Args:
        path: of the file.
        refs: which images.

    Returns:
        The bytes and the label of each image.
    """
    with storage.open_read(path) as file:
        for ref in refs:
            file.seek(ref.place)
            yield file.read(ref.size), ref.label


def list_parquet(path: str, data: ImageDataConfig) -> Iterator[Ref | Problem]:
    """List the rows of a Parquet file; their labels are read with the images.

    Args:
        path: of the file.
        data: the data section of the config.

    Returns:
        The images, or what is wrong with the file.

    Raises:
        DataError: there is no column of a name that the config gives.
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
    """Read images of a Parquet file: only their row groups, a few rows at a time.

    Args:
        path: of the file.
        refs: which images, in ascending order of their rows.
        data: the data section of the config.

    Returns:
        The bytes and the label of each image, or what is wrong with it.
    """
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
    """Return the bytes and the label in a row; Hugging Face stores an image as its bytes and its file's name."""
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        kind = type(image).__name__
        expected = "expected the bytes of an image"
        return Problem(where, f"{data.image_field!r} (data.image_field) holds a {kind}; {expected}")
    if not isinstance(label, int) or not 0 <= label < data.classes:
        return Problem(where, outside(label, data.classes))
    return image, label
