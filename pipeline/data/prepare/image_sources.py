"""Images with labels or captions: scikit-learn's digits, folders, tar and Parquet files, idx files and the hub.

A source is listed first: the place of every image and, where it can be had without the pixels, its label. Any part of
the list can then be read on its own. Sources that come sorted by class (digits, folders, idx) are listed in a fixed
random order, since training shuffles only within windows of rows. Tar and Parquet files, which are usually written
shuffled, keep their own order.
"""

import gzip
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from pipeline import storage
from pipeline.config.data import ImageDataConfig, PairDataConfig, Pictures
from pipeline.data.manifest import SourceInfo
from pipeline.data.prepare import captions, source_files, tars
from pipeline.data.prepare.source_files import HUB, Problem, SourceFile, fault_of_data, is_a
from pipeline.data.prepare.tars import Member, Sample
from pipeline.data.reading_order import permutation
from pipeline.errors import DataError, did_you_mean, first_line, kind_and_line, printable

log = logging.getLogger(__name__)

DIGITS = "digits"
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAR, PARQUET = (".tar",), (".parquet",)
IDX = ("-ubyte", "-ubyte.gz")
_KINDS = {"image files": IMAGES, "tar files": TAR, "Parquet files": PARQUET, "idx files": IDX}
_ORDER = 1  # seed of the order of sources that come sorted by class
_READERS = 8  # files listed at the same time
_ROWS = 64  # of Parquet held at a time
_CAPTIONED = "digits, a folder with data.captions, tar or Parquet files"
_NAMED = 6  # names in a message
_IDX_IMAGES = re.compile(r"images([-.])idx3-ubyte(\.gz)?$", re.IGNORECASE)
LABELS = {"cls", "json"}  # suffixes in tar files
_PARTS = {*LABELS, *(end[1:] for end in IMAGES)}

# Bytes of a file, or pixels; and the label or the caption.
RawImage = tuple[bytes | UInt8[np.ndarray, "..."], int | str]


class Ref(NamedTuple):
    """The place of one image.

    Attributes:
        path: of its file, or "digits".
        place: row of Parquet, idx or digits; byte in a tar file; 0 in a file of its own.
        size: number of bytes in a tar file, else 0.
        label: its class, or its caption; -1 if it is read with the image.
        name: of the member of a tar file, else "".
    """

    path: str
    place: int
    size: int
    label: int | str
    name: str = ""

    def __str__(self) -> str:
        if is_a(self.path, TAR):
            return f"{self.path}: {self.name}"
        if is_a(self.path, IMAGES):
            return self.path
        return f"{self.path} {'row' if is_a(self.path, PARQUET) else 'image'} {self.place}"


def _outside(label: object, classes: int) -> str:
    """Describe a label that is none of the classes."""
    return f"label {label!r}; expected 0 to {classes - 1} (data.classes)"


@dataclass(frozen=True)
class ImageSource:
    """The files of a source of images.

    Attributes:
        files: in order; one pair of images and labels for idx.
        info: what the manifest says of the source.
    """

    files: tuple[SourceFile, ...]
    info: SourceInfo

    @property
    def plan(self) -> list[list[str]]:
        """The files, which must be the same for an interrupted preparation to be continued."""
        return [[file.path, file.version] for file in self.files]


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        refs: the images in order.
        problems: what cannot be read.
        class_names: by label, where the source has them.
    """

    refs: list[Ref]
    problems: list[Problem]
    class_names: tuple[str, ...] | None


def open_images(data: Pictures) -> ImageSource:
    """List the files that `data.source` names.

    Args:
        data: the data section of the config.

    Raises:
        DataError: nothing is there, nothing that can be read, or files of several kinds.
    """
    if data.source == DIGITS:
        described = captions.describe_digits(*captions.digits()) if isinstance(data, PairDataConfig) else []
        info = source_files.describe(data, [captions.digits()[0].tobytes().hex(), *described])
        return ImageSource((SourceFile(DIGITS, "", 0, version=info.fingerprint),), info)
    if data.source.startswith(HUB):
        return _open_hub(data)
    suffixes = tuple(itertools.chain(*_KINDS.values()))
    if isinstance(data, PairDataConfig):
        suffixes = (*suffixes, f"/{data.captions}".lower())
    files = source_files.find(data.source, suffixes, DIGITS)
    kinds = [kind for kind, ends in _KINDS.items() if any(is_a(file.path, ends) for file in files)]
    if len(kinds) != 1:
        names = " and ".join(kinds)
        raise DataError(f"data.source: {names} at {data.source!r}; expected one kind of {', '.join(_KINDS)}")
    if kinds != ["image files"]:
        files = [file for file in files if is_a(file.path, _KINDS[kinds[0]])]
    if kinds == ["idx files"] and isinstance(data, PairDataConfig):
        raise DataError(f"data.source: idx files at {data.source!r} have no captions; expected {_CAPTIONED}")
    if kinds == ["idx files"]:
        files = _idx_pair(files, data.source)
    return ImageSource(tuple(files), source_files.describe(data, source_files.names_and_sizes(files)))


def list_file(path: str, data: Pictures) -> list[Ref | Problem]:
    """List the images of a tar file, all of which is read, or of a Parquet file.

    Args:
        path: of the file.
        data: the data section of the config.

    Raises:
        DataError: a column is missing.
    """
    return list(_list_tar(path, data) if is_a(path, TAR) else _list_parquet(path, data))


def list_here(paths: Sequence[str], data: Pictures) -> list[list[Ref | Problem]]:
    """List the images of several files in this process; see `list_file`.

    Args:
        paths: of the files.
        data: the data section of the config.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: list_file(path, data), paths))


def list_images(
    source: ImageSource,
    data: Pictures,
    list_files: Callable[[Sequence[str], Pictures], list[list[Ref | Problem]]] = list_here,
) -> Listing:
    """List every image of a source in order.

    Args:
        source: the files.
        data: the data section of the config.
        list_files: calls `list_file` for several files, on several nodes perhaps.

    Raises:
        DataError: a column is missing, or the number of class folders is not `data.classes`.
    """
    first = source.files[0].path
    names: tuple[str, ...] | None = None
    problems: list[Problem] = []
    if is_a(first, TAR + PARQUET):
        items = list(itertools.chain(*list_files([file.path for file in source.files], data)))
        refs = [item for item in items if isinstance(item, Ref)]
        problems = [item for item in items if isinstance(item, Problem)]
    else:
        if first == DIGITS:
            pixels, classes = captions.digits()
            texts = (
                captions.describe_digits(pixels, classes)
                if isinstance(data, PairDataConfig)
                else classes.tolist()
            )
            refs = [Ref(DIGITS, i, 0, label=label) for i, label in enumerate(texts)]
        elif is_a(first, IDX):
            refs = _list_idx(*(file.path for file in source.files))
        elif isinstance(data, PairDataConfig):
            found, problems = captions.list_captions(source.files, data)
            refs = [Ref(path, 0, 0, label=caption) for path, caption in found]
        else:
            refs, problems, names = _list_folders(source.files, data)
        refs = [refs[i] for i in permutation(len(refs), _ORDER)]
    if not isinstance(data, ImageDataConfig):
        return Listing(refs, problems, None)
    strays = {ref for ref in refs if isinstance(ref.label, int) and not -1 <= ref.label < data.classes}
    problems += [Problem(str(ref), _outside(ref.label, data.classes)) for ref in refs if ref in strays]
    return Listing([ref for ref in refs if ref not in strays], problems, names)


def read_images(refs: Sequence[Ref], data: Pictures) -> Iterator[RawImage | Problem]:
    """Read images in order.

    Args:
        refs: which images; those of one file are best next to each other, and ascend in Parquet.
        data: the data section of the config.

    Returns:
        Of every image the bytes of its file, or its pixels, and its label; or why it cannot be read.
    """
    for path, group in itertools.groupby(refs, key=lambda ref: ref.path):
        part, count = list(group), 0
        try:
            for item in _read(path, part, data):
                yield item
                count += 1
        except Exception as error:
            why = f"cannot be read: {fault_of_data(error)}"
            yield from (Problem(str(ref), why) for ref in part[count:])


def _read(path: str, refs: list[Ref], data: Pictures) -> Iterable[RawImage | Problem]:
    """Read images of one file."""
    if path == DIGITS or is_a(path, IDX):
        pixels = captions.digits()[0] if path == DIGITS else _idx(path)
        return [(pixels[ref.place], ref.label) for ref in refs]
    if is_a(path, TAR):
        return _read_tar(path, refs)
    if is_a(path, PARQUET):
        return _read_parquet(path, refs, data)
    return ((storage.read_bytes(ref.path), ref.label) for ref in refs)


def _list_folders(
    files: Sequence[SourceFile], data: ImageDataConfig
) -> tuple[list[Ref], list[Problem], tuple[str, ...]]:
    """List folders, each a class with all that lies in it; classes are numbered in the order of their names.

    A folder without images is a class only if `data.classes` counts it, so that no other folder beside the classes
    moves their labels.
    """
    if loose := next((file.path for file in files if "/" not in file.name), None):
        raise DataError(f"data.source: {loose!r} is in no class folder; expected FOLDER/CLASS/IMAGE")
    classes = [file.name.partition("/")[0] for file in files]
    root = files[0].path.removesuffix(files[0].name)
    filled = set(classes)
    empty = source_files.folders_in(root) - filled if storage.exists(data.source) else set()
    if len(filled) == data.classes and empty:
        log.info("%s: folders without images are no classes: %s", data.source, ", ".join(sorted(empty)))
        empty = set()
    names = sorted(empty | filled)
    if len(names) != data.classes:
        raise DataError(
            f"data.classes: {data.classes}, but {data.source!r} has folders of {len(filled)} classes; "
            f"expected data.classes={len(filled)}, or a glob of the class folders, which are {_some(sorted(filled))}"
        )
    labels = {name: label for label, name in enumerate(names)}
    refs = [Ref(file.path, 0, 0, label=labels[name]) for file, name in zip(files, classes, strict=True)]
    why = f"no image in this class; expected {', '.join(IMAGES)}"
    problems = [Problem(f"{root}{name}", why) for name in sorted(empty)]
    return refs, problems, tuple(map(printable, names))


def _some(names: Sequence[str]) -> str:
    """Return the first of some names, for a message."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _list_tar(path: str, data: Pictures) -> Iterator[Ref | Problem]:
    """List a tar file in WebDataset's layout: members whose names differ only behind the first dot are a sample.

    The members of a sample need not stand next to each other. A suffix that comes again begins another sample of the
    same name. Members that are no part of a sample are ignored.
    """
    samples: list[tuple[str, Sample]] = []
    fault, others = "", 0
    try:
        with storage.open_read(path) as file:
            tars.collect(file, samples, LABELS if isinstance(data, ImageDataConfig) else {*captions.TEXTS})
    except Exception as error:
        fault = fault_of_data(error)
    for stem, sample in samples:
        if not any(suffix.rpartition(".")[2] in _PARTS for suffix in sample):
            others += 1
            continue
        try:
            image, label = _sample(sample, data)
            yield Ref(path, image.start, image.size, label=label, name=image.name)
        except DataError as error:
            yield Problem(f"{path}: {stem}", str(error))
    if others:
        log.info("%s: %d members of other kinds are ignored", path, others)
    if fault:
        yield Problem(path, f"cannot be read to the end: {fault}")


def _sample(sample: Sample, data: Pictures) -> tuple[Member, int | str]:
    """Return the image and the label or caption of a sample; raise what is wrong with it."""
    image = next((sample[end[1:]] for end in IMAGES if end[1:] in sample), None)
    if not isinstance(image, Member):
        expected = ", ".join(end[1:] for end in IMAGES)
        raise DataError(f"no image among {_some(list(sample))}; expected {expected}")
    own = captions.of_sample(sample, data) if isinstance(data, PairDataConfig) else _label(sample, data)
    if image.fault:
        raise DataError(image.fault)
    return image, own


def _label(sample: Sample, data: ImageDataConfig) -> int:
    """Return the label of a sample; raise what is wrong with it."""
    suffix = "cls" if "cls" in sample else "json"
    try:
        content = sample[suffix]
        if isinstance(content, Member):
            raise DataError(f"no label in {suffix}: {content.fault}")
        text = content.decode("utf-8-sig")
        label = int(text) if suffix == "cls" else json.loads(text)[data.label_field]
    except DataError:
        raise
    except KeyError:
        expected = f"cls, or json with the field {data.label_field!r} (data.label_field)"
        raise DataError(f"no label among {_some(list(sample))}; expected {expected}") from None
    except Exception as error:  # of numbers, JSON and UTF-8, and of too much nesting
        raise DataError(f"no label in {suffix}: {first_line(error)}") from None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise DataError(_outside(label, data.classes))
    return label


def _read_tar(path: str, refs: Sequence[Ref]) -> Iterator[RawImage]:
    """Yield the bytes and the label of each image."""
    with storage.open_read(path) as file:
        for ref in refs:
            file.seek(ref.place)
            yield file.read(ref.size), ref.label


def _list_parquet(path: str, data: Pictures) -> Iterator[Ref | Problem]:
    """List the rows of a Parquet file; their labels are read with the images."""
    try:
        with storage.open_read(path) as file:
            parquet = pq.ParquetFile(file)
            names, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
    except Exception as error:
        yield Problem(path, f"cannot be read: {fault_of_data(error)}")
        return
    for key in ("image_field", data.described_by):
        if (name := getattr(data, key)) not in names:
            near = did_you_mean(name, names)
            raise DataError(f"data.{key}: no column {name!r} in {path}; columns: {', '.join(names)}{near}")
    yield from (Ref(path, row, 0, label=-1) for row in range(rows))


def _read_parquet(path: str, refs: Sequence[Ref], data: Pictures) -> Iterator[RawImage | Problem]:
    """Yield the bytes and the label of each image, whose rows ascend; only their row groups are read."""
    with storage.open_read(path) as file:
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        places = (ref.place for ref in refs)
        for group, rows in itertools.groupby(
            places, lambda row: int(np.searchsorted(starts, row, side="right")) - 1
        ):
            yield from _read_group(parquet, group, int(starts[group]), list(rows), path=path, data=data)


def _read_group(
    parquet: pq.ParquetFile, group: int, start: int, rows: list[int], *, path: str, data: Pictures
) -> Iterator[RawImage | Problem]:
    """Yield the bytes and the label of some rows of the row group that begins at row `start`.

    Of a damaged group, what is wrong with it. Cells of other rows are not decoded.
    """
    columns, count = [data.image_field, getattr(data, data.described_by)], 0
    try:
        for batch in parquet.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
            pictures, labels = (batch.column(name) for name in columns)
            while count < len(rows) and rows[count] < start + len(batch):
                row = rows[count]
                yield _cell(pictures[row - start], labels[row - start], f"{path} row {row}", data=data)
                count += 1
            if count == len(rows):
                return
            start += len(batch)
    except Exception as error:
        why = f"cannot be read: {fault_of_data(error)}"
        yield from (Problem(f"{path} row {row}", why) for row in rows[count:])


def _cell(picture: pa.Scalar, number: pa.Scalar, where: str, data: Pictures) -> RawImage | Problem:
    """Return the bytes and the label in a row; Hugging Face stores an image as its bytes and its file's name."""
    try:
        image, label = picture.as_py(), number.as_py()
    except Exception as error:  # of values that Python cannot hold, such as text that is not UTF-8
        return Problem(where, f"cannot be read: {kind_and_line(error)}")
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        found = f"{data.image_field!r} (data.image_field) holds a {type(image).__name__}"
        return Problem(where, f"{found}; expected the bytes of an image")
    if isinstance(data, PairDataConfig):
        try:
            return image, captions.checked(label, f"{data.caption_field!r} (data.caption_field)")
        except DataError as error:
            return Problem(where, str(error))
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < data.classes:
        return Problem(where, _outside(label, data.classes))
    return image, label


def _idx_pair(files: list[SourceFile], source: str) -> list[SourceFile]:
    """Return one file of images and the file of its labels: the training ones, where there are several."""
    images = [file for file in files if _IDX_IMAGES.search(file.path)]
    chosen = [file for file in images if file.path.rpartition("/")[2].lower().startswith("train")] or images
    if len(chosen) != 1:
        names = ", ".join(file.path.rpartition("/")[2] for file in chosen or files)
        raise DataError(
            f"data.source: {names} at {source!r}; expected train-images-idx3-ubyte[.gz], or one such file"
        )
    path, name = chosen[0].path, chosen[0].name
    upper = path[-1].isupper()
    stem = _IDX_IMAGES.sub(r"LABELS\1IDX1-UBYTE" if upper else r"labels\1idx1-ubyte", path)
    labels = [file for end in ("", ".gz", ".GZ") for file in source_files.list_files(stem + end)]
    if not labels:
        raise DataError(f"data.source: {path!r} without its labels; expected {stem!r} or with .gz")
    return [chosen[0], labels[0]._replace(name=labels[0].path[len(path) - len(name) :])]


def _list_idx(images: str, labels: str) -> list[Ref]:
    """List the images of an idx file with the labels of another one."""
    pixels, classes = _idx(images), _idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise DataError(
            f"{images}: {' x '.join(map(str, pixels.shape))} and {labels}: {' x '.join(map(str, classes.shape))}; "
            "expected images x rows x columns, and a label for each image"
        )
    return [Ref(images, i, 0, label=int(label)) for i, label in enumerate(classes)]


@lru_cache(maxsize=2)
def _idx(path: str) -> UInt8[np.ndarray, "..."]:
    """Read an idx file: two zeros, 8 for bytes, the number of dimensions, their sizes, the values."""
    data = storage.read_bytes(path)
    try:
        data = gzip.decompress(data) if is_a(path, (".gz",)) else data
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    rank = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    sizes = data[4 : 4 + 4 * rank]
    shape = tuple(np.frombuffer(sizes, dtype=">i4").tolist()) if len(sizes) == 4 * rank else ()
    if not shape or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(
            f"{path}: not a complete idx file: {len(data)} bytes that start with {data[:4].hex()}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _open_hub(data: Pictures) -> ImageSource:
    """List a dataset of the Hugging Face hub, its revision pinned, or a local copy, which has no revision.

    The files are read as they are, so they must be Parquet or tar files.
    """
    from datasets import load_dataset_builder  # slow to import, and other sources do without

    folder = source_files.hub_folder(data)
    revision = None if folder else source_files.pinned_revision(data)
    name = folder or data.source.removeprefix(HUB)
    try:
        splits = load_dataset_builder(name, data.subset, revision=revision).config.data_files or {}
    except Exception as error:  # errors of several libraries; the message names the subsets
        raise DataError(f"data.source: {data.source!r} cannot be opened: {first_line(error)}") from error
    if data.split not in splits:
        known = f"{', '.join(map(str, splits))}{did_you_mean(data.split, splits)}"
        raise DataError(f"data.split: no split {data.split!r} in {data.source!r}; known: {known}")
    paths = list(splits[data.split])
    if not any(all(is_a(path, ends) for path in paths) for ends in (TAR, PARQUET)):
        what = f"has files such as {paths[0]!r}; expected .parquet or .tar"
        raise DataError(f"data.source: {data.source!r} {what}")
    if folder:
        files = [file for path in paths for file in source_files.list_files(path, folder)]
        return ImageSource(tuple(files), source_files.describe(data, source_files.names_and_sizes(files)))
    files = [SourceFile(path, path, 0, version=str(revision)) for path in paths]
    return ImageSource(tuple(files), source_files.describe(data, [str(revision)], revision))
