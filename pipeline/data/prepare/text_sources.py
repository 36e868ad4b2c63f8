"""Documents from the standard library, files of several kinds and Hugging Face datasets.

A source lists *pieces* (a file, a part of one, a shard of a dataset) in a fixed order, bundled into *units*
of work; each can be read on its own, so reading is parallel and restartable, and its result the same.
"""

import gzip
import hashlib
import io
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.data.prepare import markov
from pipeline.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
UNIT_BYTES = 16 << 20  # small files are bundled, and large ones split, to about this much
UNIT_FILES = 64
GLOB = frozenset("*?[")
HUB = "hf:"


@dataclass(frozen=True)
class Piece:
    """A readable part of a source.

    Attributes:
        path: file or URL, the name of an embedded source, or "hf:NAME".
        start, stop: bytes of a .jsonl file, row groups of Parquet, shard `start` of `stop` of a dataset;
            stop -1 means to the end.
        version: changes when the content does.
    """

    path: str
    start: int = 0
    stop: int = -1
    version: str = ""


@dataclass(frozen=True)
class Problem:
    """A document, or the rest of a file, that cannot be read."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        units: the pieces in order, bundled for work.
        revision: of a dataset on the hub, resolved.
        fingerprint: SHA-256 over names and sizes; the same for a copy elsewhere.
    """

    units: tuple[tuple[Piece, ...], ...]
    revision: str | None
    fingerprint: str

    @property
    def plan(self) -> list[list[dict[str, Any]]]:
        """What an interrupted preparation may be taken up with: the same units of the same content."""
        return [[asdict(piece) for piece in unit] for unit in self.units]


def open_source(data: TextDataConfig) -> Source:
    """List what `data.source` names.

    Raises:
        DataError: nothing is there, or nothing of a kind that can be read.
    """
    if data.source in EMBEDDED:
        return Source(((Piece(data.source),),), None, digest(EMBEDDED[data.source]()))
    if data.source.startswith(HUB):
        return _open_hub(data)
    files = find(data.source, SUFFIXES, *EMBEDDED)
    units: list[list[Piece]] = []
    room = count = 0
    for path, size, version in files:
        for piece, weight in _split(Piece(path, version=version), size):
            if not units or weight > room or count == UNIT_FILES:
                units.append([])
                room, count = UNIT_BYTES, 0
            units[-1].append(piece)
            room, count = room - weight, count + 1
    root = len(storage.join(root_of(data.source, SUFFIXES), ""))
    fingerprint = digest(f"{path[root:]} {size}" for path, size, _ in files)
    return Source(tuple(map(tuple, units)), None, fingerprint)


def read(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """The documents of a piece, in order, and in their places those that cannot be read."""
    if piece.path in EMBEDDED:
        yield from EMBEDDED[piece.path]()
        return
    try:
        if piece.path.startswith(HUB):
            documents = _read_hub(piece, data)
        elif piece.path.endswith(".txt"):
            documents = _read_txt(piece)
        elif piece.path.endswith(".parquet"):
            documents = _read_parquet(piece, data.text_field)
        else:
            documents = _read_jsonl(piece, data.text_field)
        for document in documents:
            yield _encodable(document, piece.path) if isinstance(document, str) else document
    except (ConnectionError, TimeoutError):
        raise  # no fault of the data: the unit is read again
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
        yield Problem(piece.path, f"cannot be read to the end: {type(error).__name__}: {error}")


def _pydoc() -> list[str]:
    """The standard library's help texts: English technical prose on every machine."""
    from pydoc_data.topics import topics  # here, since it is half a megabyte that few jobs read

    return [topics[key] for key in sorted(topics)]


EMBEDDED: dict[str, Callable[[], list[str]]] = {"pydoc": _pydoc, "markov": markov.documents}


def root_of(source: str, suffixes: tuple[str, ...]) -> str:
    """The folder that names are given relative to, spelled as `find` spells files."""
    path = storage.resolve(source)
    wild = min((path.index(c) for c in GLOB if c in path), default=None)
    if wild is not None:
        root = path[:wild].rpartition("/")[0]
    else:
        root = path.rpartition("/")[0] if path.lower().endswith(suffixes) else path.rstrip("/")
    fs, inner = storage.filesystem(root)
    return root if storage.is_local(root) else fs.unstrip_protocol(inner)


def find(source: str, suffixes: tuple[str, ...], *embedded: str) -> list[tuple[str, int, str]]:
    """(path, bytes, version) of every readable file, sorted by path.

    Args:
        source: a file, a folder with all that lies in it, or a glob.
        suffixes: of what can be read, in lower case.
        embedded: sources that are no files, for the message.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    fs, inner = storage.filesystem(source)
    if GLOB.intersection(inner):
        items = fs.glob(inner, detail=True)
    else:
        items = {inner: fs.info(inner)} if fs.exists(inner) else {}
    there: dict[str, dict[str, Any]] = {}
    for name, info in items.items():
        there |= fs.find(name, detail=True) if info["type"] == "directory" else {name: info}
    if not there:
        beside = storage.listing(source.rstrip("/").rpartition("/")[0] or ".")
        near = did_you_mean(source.rstrip("/").rpartition("/")[2], [*beside, *embedded])
        raise DataError(f"data.source: nothing at {source!r}{near}")
    readable = sorted(name for name in there if name.lower().endswith(suffixes))
    if not readable:
        raise DataError(
            f"data.source: no file to read among {len(there)} at {source!r}, such as {min(there)!r}; "
            f"expected {', '.join(suffixes)}"
        )
    if other := len(there) - len(readable):
        log.info("%s: %d files of other kinds are left alone", source, other)
    paths = [name if storage.is_local(source) else fs.unstrip_protocol(name) for name in readable]
    infos = [there[name] for name in readable]
    return [(path, info["size"], digest([str(info)])) for path, info in zip(paths, infos, strict=True)]


def _split(piece: Piece, size: int) -> Iterable[tuple[Piece, int]]:
    """Parts of about UNIT_BYTES of a large file, where its format allows, and their weights in bytes."""
    if size <= 2 * UNIT_BYTES or not piece.path.endswith((".jsonl", ".parquet")):
        return [(piece, size)]
    if piece.path.endswith(".jsonl"):
        edges = [*range(0, size, UNIT_BYTES), size]
    else:
        try:
            with storage.open_read(piece.path) as file:
                groups = pq.ParquetFile(file).num_row_groups
        except (OSError, pa.ArrowException):
            return [(piece, size)]  # reading it will name the fault
        edges = list(range(groups + 1))
        size = size // max(groups, 1)
    return [
        (Piece(piece.path, start, stop, piece.version), UNIT_BYTES if piece.path.endswith(".jsonl") else size)
        for start, stop in itertools.pairwise(edges)
    ]


def _read_txt(piece: Piece) -> Iterator[str | Problem]:
    """A file is a document, newlines untouched."""
    try:
        yield storage.read_bytes(piece.path).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Problem(piece.path, f"not UTF-8: {error.reason} at byte {error.start}")


def _read_jsonl(piece: Piece, field: str) -> Iterator[str | Problem]:
    """A line is a document. A line belongs to the part of the file in which it starts."""
    with storage.open_read(piece.path) as file:
        lines = _lines(file, piece.path)
        place = piece.start
        if piece.start:
            file.seek(piece.start - 1)
            place += len(file.readline()) - 1
        for number, line in enumerate(lines, 1):
            if 0 <= piece.stop <= place:
                return
            place += len(line)
            if line.strip():
                document = _parse(line, field)
                if isinstance(document, str):
                    yield document
                else:
                    yield Problem(f"{piece.path} line {_lines_before(piece) + number}", document.why)


def _lines(file: Any, path: str) -> Iterable[bytes]:
    if path.endswith(".gz"):
        return gzip.open(file)
    if path.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
    return file


def _parse(line: bytes, field: str) -> str | Problem:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem("", f"not UTF-8: {error.reason} at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Problem("", f"not JSON: {error}")
    if not isinstance(row, dict):
        return Problem("", f"a {type(row).__name__}; expected an object with the field {field!r}")
    return _text(row, field)


def _text(row: dict[str, Any], field: str) -> str | Problem:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if field in row:
        return Problem("", f"{field!r} holds a {type(value).__name__}; expected text")
    known = ", ".join(map(str, row))
    return Problem("", f"no field {field!r} (data.text_field); fields: {known}{did_you_mean(field, row)}")


def _lines_before(piece: Piece) -> int:
    """Lines that start before this part of a file; read only when a fault must be named."""
    if not piece.start:
        return 0
    with storage.open_read(piece.path) as file:
        head = file.read(piece.start)
    return head.count(b"\n") + (not head.endswith(b"\n"))


def _read_parquet(piece: Piece, field: str) -> Iterator[str | Problem]:
    """A row is a document."""
    with storage.open_read(piece.path) as raw:
        file = pq.ParquetFile(raw)
        if field not in file.schema_arrow.names:
            row = dict.fromkeys(file.schema_arrow.names)
            yield Problem(piece.path, _text(row, field).why)  # type: ignore[union-attr]
            return
        stop = file.num_row_groups if piece.stop < 0 else piece.stop
        number = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                document = _text({field: value}, field)
                yield (
                    document
                    if isinstance(document, str)
                    else Problem(f"{piece.path} row {number}", document.why)
                )
                number += 1


def _encodable(text: str, where: str) -> str | Problem:
    """JSON can spell half of a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(where, f"a document is not UTF-8: {error.reason} at character {error.start}")
    return text


def _open_hub(data: TextDataConfig) -> Source:
    """A dataset of the Hugging Face hub, its revision pinned, or a local copy in the same layout."""
    name = data.source.removeprefix(HUB)
    fs, inner = storage.filesystem(name)
    if storage.is_local(name) and fs.isdir(inner):
        revision = None
        files = [f"{path[len(inner) :]} {fs.size(path)}" for path in sorted(fs.find(inner))]
        version = digest(fs.ukey(path) for path in sorted(fs.find(inner)))
    else:
        revision = pinned(data)
        files, version = [str(revision)], str(revision)
    try:
        shards = _load_hub(name, data, revision).num_shards
    except (
        OSError,
        ValueError,
    ) as error:  # datasets' errors are either; its message names splits and subsets
        raise DataError(f"data.source: {data.source!r} cannot be opened: {error}") from error
    units = tuple((Piece(HUB + name, shard, shards, version),) for shard in range(shards))
    return Source(units, revision, digest(files))


def pinned(data: AnyDataConfig) -> str | None:
    """The commit of a hub dataset that `data.revision` means now.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi  # slow to import, and other sources do without

    try:
        return HfApi().dataset_info(data.source.removeprefix(HUB), revision=data.revision).sha
    except Exception as error:  # several libraries' errors, which have no base of their own
        raise DataError(f"data.source: {data.source!r} cannot be had: {error}") from error


def _load_hub(name: str, data: TextDataConfig, revision: str | None) -> Any:
    from datasets import load_dataset  # slow to import, and other sources do without

    path = storage.resolve(name) if revision is None else name
    return load_dataset(path, data.subset, split=data.split, revision=revision, streaming=True)


def _read_hub(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """A row is a document."""
    name = piece.path.removeprefix(HUB)
    local = storage.is_local(name) and storage.exists(name)
    rows = _load_hub(name, data, None if local else piece.version)
    for number, row in enumerate(rows.shard(num_shards=piece.stop, index=piece.start)):
        document = _text(row, data.text_field)
        where = f"{piece.path} {data.split} shard {piece.start} of {piece.stop}, row {number}"
        yield document if isinstance(document, str) else Problem(where, document.why)


def digest(parts: Iterable[str]) -> str:
    """SHA-256 over texts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode("utf-8") + b"\0")
    return total.hexdigest()
