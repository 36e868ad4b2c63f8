"""Labelled images from scikit-learn's digits, class folders, tar and Parquet files, idx files and the hub.

A source is listed first: every image's place and, where it can be had without the pixels, its label. Any part of the
list can then be read on its own. Sources that come sorted by class (digits, folders, idx) are listed in a fixed
random order, since training shuffles only within windows of rows; tar and Parquet files, which are usually written
shuffled, keep their own.
"""

import gzip
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_archives import (
    IMAGES,
    PARQUET,
    TAR,
    Ref,
    is_a,
    list_parquet,
    list_tar,
    outside,
    read_parquet,
    read_tar,
)
from pipeline.data.prepare.text_sources import GLOB, HUB, Problem, digest, find, pinned, root_of
from pipeline.data.reading_order import permutation
from pipeline.errors import DataError, did_you_mean

DIGITS = "digits"
IDX = ("-ubyte", "-ubyte.gz")
_KINDS = {"image files": IMAGES, "tar files": TAR, "Parquet files": PARQUET, "idx files": IDX}
_ORDER = 1  # seed of the order of sources that come sorted by class
_READERS = 8  # files listed at the same time


@dataclass(frozen=True)
class ImageSource:
    """The files of a source.

    Attributes:
        files: (path, bytes, version) in order; one pair of images and labels for idx.
        root: the folder that names are relative to.
        revision: of a dataset on the hub, resolved.
        fingerprint: SHA-256 over names and sizes; the same for a copy elsewhere.
    """

    files: tuple[tuple[str, int, str], ...]
    root: str
    revision: str | None
    fingerprint: str

    @property
    def plan(self) -> list[list[str]]:
        """What an interrupted preparation may be taken up with."""
        return [[path, version] for path, _, version in self.files]


@dataclass(frozen=True)
class Listing:
    """All images of a source in order, what is wrong with it, and its classes by label where they have names."""

    refs: list[Ref]
    problems: list[Problem]
    class_names: tuple[str, ...] | None


def open_images(data: ImageDataConfig) -> ImageSource:
    """The files that `data.source` names.

    Raises:
        DataError: nothing is there, nothing that can be read, or files of several kinds.
    """
    if data.source == DIGITS:
        pixels = digest([_digits()[0].tobytes().hex()])
        return ImageSource(((DIGITS, 0, pixels),), "", None, pixels)
    if data.source.startswith(HUB):
        return _open_hub(data)
    suffixes = tuple(itertools.chain(*_KINDS.values()))
    root = root_of(data.source, suffixes)
    start = len(storage.join(root, ""))
    files = [file for file in find(data.source, suffixes, DIGITS) if "/." not in f"/{file[0][start:]}"]
    there = [kind for kind, ends in _KINDS.items() if any(is_a(path, ends) for path, _, _ in files)]
    if len(there) != 1:
        found = " and ".join(there) or "hidden files only"
        raise DataError(f"data.source: {found} at {data.source!r}; expected one kind of {', '.join(_KINDS)}")
    if there == ["idx files"]:
        files = _idx_pair(files, data.source)
    return ImageSource(tuple(files), root, None, digest(f"{path[start:]} {size}" for path, size, _ in files))


def list_images(source: ImageSource, data: ImageDataConfig) -> Listing:
    """Every image of the source in order.

    Raises:
        DataError: no such column; folders of another number of classes.
    """
    first = source.files[0][0]
    paths = [path for path, _, _ in source.files]
    names: tuple[str, ...] | None = None
    problems: list[Problem] = []
    if first == DIGITS:
        refs = [Ref(DIGITS, i, 0, int(label)) for i, label in enumerate(_digits()[1])]
    elif is_a(first, IDX):
        refs = _list_idx(*paths)
    elif is_a(first, TAR + PARQUET):
        one = list_tar if is_a(first, TAR) else list_parquet
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(itertools.chain(*pool.map(lambda path: list(one(path, data)), paths)))
        refs = [item for item in found if isinstance(item, Ref)]
        problems = [item for item in found if isinstance(item, Problem)]
    else:
        refs, problems, names = _list_folders(source, paths, data)
    if not is_a(first, TAR + PARQUET):
        refs = [refs[i] for i in permutation(len(refs), _ORDER)]
    within = [ref for ref in refs if -1 <= ref.label < data.classes]
    strays = (ref for ref in refs if not -1 <= ref.label < data.classes)
    problems += [Problem(str(ref), outside(ref.label, data.classes)) for ref in strays]
    return Listing(within, problems, names)


def read_images(
    refs: Sequence[Ref], data: ImageDataConfig
) -> Iterator[tuple[bytes | UInt8[np.ndarray, "..."], int] | Problem]:
    """A file's bytes or pixels, and the label, of every image in order; in their places those that are spoilt."""
    for path, group in itertools.groupby(refs, key=lambda ref: ref.path):
        part, given = list(group), 0
        try:
            for item in _read(path, part, data):
                yield item
                given += 1
        except (ConnectionError, TimeoutError):
            raise  # no fault of the data: it is read again
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            for ref in part[given:]:
                yield Problem(str(ref), f"cannot be read: {type(error).__name__}: {error}")


def _read(path: str, refs: list[Ref], data: ImageDataConfig) -> Iterable[Any]:
    if path == DIGITS:
        return [(_digits()[0][ref.place], ref.label) for ref in refs]
    if is_a(path, IDX):
        return [(_idx(path)[ref.place], ref.label) for ref in refs]
    if is_a(path, TAR):
        return read_tar(path, refs)
    if is_a(path, PARQUET):
        return read_parquet(path, refs, data)
    return ((storage.read_bytes(ref.path), ref.label) for ref in refs)


@lru_cache(maxsize=1)
def _digits() -> tuple[UInt8[np.ndarray, "n 8 8"], np.ndarray]:
    """1,797 digits of 8 x 8 in 17 shades, and which they are."""
    from sklearn.datasets import load_digits  # slow to import, and other sources do without

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _list_folders(
    source: ImageSource, paths: list[str], data: ImageDataConfig
) -> tuple[list[Ref], list[Problem], tuple[str, ...]]:
    """A folder is a class, whatever lies between it and its images; classes are numbered in order of their names."""
    start = len(storage.join(source.root, ""))
    if loose := next((path for path in paths if "/" not in path[start:]), None):
        raise DataError(f"data.source: {loose!r} is in no class folder; expected FOLDER/CLASS/IMAGE")
    classes = [path[start:].partition("/")[0] for path in paths]
    empty = _folders(source.root) - set(classes) if not GLOB.intersection(data.source) else set()
    names = tuple(sorted(empty.union(classes)))
    if len(names) < data.classes:
        raise DataError(
            f"data.classes: {data.classes}, but {data.source!r} has folders of {len(names)} classes; "
            f"expected data.classes={len(names)}"
        )
    labels = {name: label for label, name in enumerate(names)}
    refs = [Ref(path, 0, 0, labels[name]) for path, name in zip(paths, classes, strict=True)]
    expected = f"no image in this class; expected {', '.join(IMAGES)}"
    return refs, [Problem(storage.join(source.root, name), expected) for name in sorted(empty)], names


def _folders(root: str) -> set[str]:
    """Names of the folders in a folder, hidden ones left out."""
    fs, inner = storage.filesystem(root)
    infos = fs.ls(inner, detail=True)
    names = {info["name"].rstrip("/").rpartition("/")[2] for info in infos if info["type"] == "directory"}
    return {name for name in names if not name.startswith(".")}


def _idx_pair(files: list[tuple[str, int, str]], source: str) -> list[tuple[str, int, str]]:
    """One file of images and its labels: the training ones, where there are several."""
    images = [file for file in files if re.search(r"images[-.]idx3-ubyte(\.gz)?$", file[0])]
    chosen = [file for file in images if file[0].rpartition("/")[2].startswith("train")] or images
    if len(chosen) != 1:
        names = ", ".join(file[0].rpartition("/")[2] for file in chosen or files)
        raise DataError(
            f"data.source: {names} at {source!r}; expected train-images-idx3-ubyte[.gz], or one such file"
        )
    stem = re.sub(r"images([-.])idx3-ubyte(\.gz)?$", r"labels\1idx1-ubyte", chosen[0][0])
    labels = next((stem + end for end in ("", ".gz") if storage.exists(stem + end)), None)
    if labels is None:
        raise DataError(f"data.source: {chosen[0][0]!r} without its labels; expected {stem!r} or with .gz")
    fs, inner = storage.filesystem(labels)
    info = fs.info(inner)
    return [chosen[0], (labels, info["size"], digest([str(info)]))]


def _list_idx(images: str, labels: str) -> list[Ref]:
    pixels, classes = _idx(images), _idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise DataError(
            f"{images}: {' x '.join(map(str, pixels.shape))} and {labels}: {' x '.join(map(str, classes.shape))}; "
            "expected images x rows x columns, and a label for each image"
        )
    return [Ref(images, i, 0, int(label)) for i, label in enumerate(classes)]


@lru_cache(maxsize=2)
def _idx(path: str) -> UInt8[np.ndarray, "..."]:
    """An idx file: two zeros, 8 for bytes, the number of dimensions, their sizes, the values."""
    data = storage.read_bytes(path)
    try:
        data = gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    rank = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * rank], dtype=">i4").tolist())
    if not rank or len(shape) < rank or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(
            f"{path}: {len(data)} bytes that start with {data[:4].hex()} are no whole idx file of bytes"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _open_hub(data: ImageDataConfig) -> ImageSource:
    """A dataset of the Hugging Face hub, its revision pinned, or a local copy in the same layout.

    Its files are read as they are, so it must be one of Parquet or tar files.
    """
    from datasets import load_dataset_builder  # slow to import, and other sources do without

    name = data.source.removeprefix(HUB)
    fs, inner = storage.filesystem(name)
    local = storage.is_local(name) and fs.isdir(inner)
    revision = None if local else pinned(data)
    try:
        builder = load_dataset_builder(inner if local else name, data.subset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # its message names the subsets
        raise DataError(f"data.source: {data.source!r} cannot be opened: {error}") from error
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if data.split not in splits:
        near = did_you_mean(data.split, splits)
        raise DataError(
            f"data.split: no split {data.split!r} in {data.source!r}; known: {', '.join(splits)}{near}"
        )
    paths = splits[data.split]
    if not any(all(is_a(path, ends) for path in paths) for ends in (TAR, PARQUET)):
        raise DataError(
            f"data.source: {data.source!r} has files such as {paths[0]!r}; expected .parquet or .tar"
        )
    if not local:
        files = tuple((path, 0, str(revision)) for path in paths)
        return ImageSource(files, "", revision, digest([str(revision)]))
    infos = [(path, fs.info(path)) for path in paths]
    files = tuple((path, info["size"], digest([str(info)])) for path, info in infos)
    return ImageSource(files, inner, None, digest(f"{path[len(inner) :]} {size}" for path, size, _ in files))
