"""Documents from the standard library, files of several kinds and Hugging Face datasets.

A source is listed as pieces (a file, a part of one, a shard of a dataset) in a fixed order, bundled into units of
work. Each piece can be read on its own, so reading is parallel and can be interrupted, and its result is always the
same.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import SourceInfo
from pipeline.data.prepare import markov, source_files
from pipeline.data.prepare.source_files import HUB, Problem, SourceFile
from pipeline.errors import DataError, did_you_mean

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
UNIT_BYTES = 16 << 20  # small files are bundled, and large ones split, to about this much
UNIT_FILES = 64


@dataclass(frozen=True)
class Piece:
    """A readable part of a source.

    Attributes:
        path: file or URL, the name of an embedded source, or "hf:NAME".
        start: first byte of a .jsonl file, first row group of Parquet, or number of a shard of a dataset.
        stop: end of the bytes or row groups (-1: the end of the file), or number of all shards of the dataset.
        version: changes when the content does.
    """

    path: str
    start: int = 0
    stop: int = -1
    version: str = ""


@dataclass(frozen=True)
class TextSource:
    """A listed source of documents.

    Attributes:
        units: the pieces in order, bundled into units of work.
        info: what the manifest says of the source.
    """

    units: tuple[tuple[Piece, ...], ...]
    info: SourceInfo

    @property
    def plan(self) -> list[list[dict[str, Any]]]:
        """The units, which must be the same for an interrupted preparation to be continued."""
        return [[asdict(piece) for piece in unit] for unit in self.units]


def open_source(data: TextDataConfig) -> TextSource:
    """List what `data.source` names.

    Args:
        data: the data section of the config.

    Raises:
        DataError: nothing is there, or nothing of a kind that can be read.
    """
    if data.source in EMBEDDED:
        return TextSource(((Piece(data.source),),), source_files.describe(data, EMBEDDED[data.source]()))
    if data.source.startswith(HUB):
        return _open_hub(data)
    files = source_files.find(data.source, SUFFIXES, *EMBEDDED)
    units: list[list[Piece]] = []
    room = 0
    for piece, weight in itertools.chain.from_iterable(map(_split, files)):
        if not units or weight > room or len(units[-1]) == UNIT_FILES:
            units.append([])
            room = UNIT_BYTES
        units[-1].append(piece)
        room -= weight
    info = source_files.describe(data, source_files.names_and_sizes(files))
    return TextSource(tuple(map(tuple, units)), info)


def read(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """Read the documents of a piece, in order.

    Args:
        piece: of `data.source`.
        data: the data section of the config.

    Returns:
        The documents, and in place of those that cannot be read what is wrong with them.
    """
    if piece.path in EMBEDDED:
        yield from EMBEDDED[piece.path]()
        return
    kind = HUB if piece.path.startswith(HUB) else Path(piece.path).suffix
    reader = {HUB: _read_hub, ".txt": _read_txt, ".parquet": _read_parquet}.get(kind, _read_jsonl)
    try:
        yield from reader(piece, data)
    except (ConnectionError, TimeoutError):
        raise  # no fault of the data: the unit is read again
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
        yield Problem(piece.path, f"cannot be read to the end: {type(error).__name__}: {error}")


def _pydoc() -> list[str]:
    """The standard library's help texts: English technical prose on every machine."""
    from pydoc_data.topics import topics  # here, since it is half a megabyte that few jobs read

    return [topics[key] for key in sorted(topics)]


EMBEDDED: dict[str, Callable[[], list[str]]] = {"pydoc": _pydoc, "markov": markov.documents}


def _split(file: SourceFile) -> Iterable[tuple[Piece, int]]:
    """Cut a large file into pieces of about UNIT_BYTES where its format allows it; with their weights in bytes."""
    piece, weight = Piece(file.path, version=file.version), UNIT_BYTES
    if file.size <= 2 * UNIT_BYTES or not file.path.endswith((".jsonl", ".parquet")):
        return [(piece, file.size)]
    edges = [*range(0, file.size, UNIT_BYTES), file.size]
    if file.path.endswith(".parquet"):
        try:
            with storage.open_read(file.path) as opened:
                groups = pq.ParquetFile(opened).num_row_groups
        except (OSError, pa.ArrowException):
            return [(piece, file.size)]  # reading it will name the fault
        edges, weight = list(range(groups + 1)), file.size // max(groups, 1)
    return [(replace(piece, start=start, stop=stop), weight) for start, stop in itertools.pairwise(edges)]


def _read_txt(piece: Piece, _: TextDataConfig) -> Iterator[str | Problem]:
    """Yield a file as one document, its line ends untouched."""
    try:
        yield storage.read_bytes(piece.path).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Problem(piece.path, f"not UTF-8: {error.reason} at byte {error.start}")


def _read_jsonl(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """Yield the lines as documents; a line belongs to the piece of the file in which it starts."""
    with storage.open_read(piece.path) as file:
        lines: Iterable[bytes] = file
        if piece.path.endswith(".gz"):
            lines = gzip.GzipFile(fileobj=file)
        elif piece.path.endswith(".zst"):
            lines = io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
        position = piece.start
        if piece.start:
            file.seek(piece.start - 1)
            position += len(file.readline()) - 1
        for number, line in enumerate(lines, 1):
            if 0 <= piece.stop <= position:
                return
            position += len(line)
            if line.strip():
                document = _parse(line, data.text_field)
                if isinstance(document, Problem):
                    document = Problem(f"{piece.path} line {_lines_before(piece) + number}", document.why)
                yield document


def _parse(line: bytes, field: str) -> str | Problem:
    """Return the document of a line; where a problem is, the caller knows."""
    try:
        return _text(json.loads(line.decode("utf-8")), field, "")
    except UnicodeDecodeError as error:
        return Problem("", f"not UTF-8: {error.reason} at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Problem("", f"not JSON: {error}")


def _text(row: Any, field: str, where: str) -> str | Problem:
    """Return the document in a field of a row."""
    if not isinstance(row, dict):
        return Problem(where, f"a {type(row).__name__}; expected an object with the field {field!r}")
    if field not in row:
        known = f"{', '.join(map(str, row))}{did_you_mean(field, row)}"
        return Problem(where, f"no field {field!r} (data.text_field); fields: {known}")
    if not isinstance(row[field], str):
        return Problem(where, f"{field!r} holds a {type(row[field]).__name__}; expected text")
    try:
        row[field].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which UTF-8 cannot
        return Problem(where, f"not UTF-8: {error.reason} at character {error.start}")
    return row[field]


def _lines_before(piece: Piece) -> int:
    """Count the lines that start before this piece of a file; needed only where a problem must be named."""
    with storage.open_read(piece.path) as file:
        head = file.read(piece.start)
    return head.count(b"\n") + (head[-1:] not in (b"", b"\n"))


def _read_parquet(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """Yield the rows as documents."""
    field = data.text_field
    with storage.open_read(piece.path) as raw:
        file = pq.ParquetFile(raw)
        if field not in file.schema_arrow.names:
            yield _text(dict.fromkeys(file.schema_arrow.names), field, piece.path)
            return
        stop = file.num_row_groups if piece.stop < 0 else piece.stop
        first = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        numbers = itertools.count(first)
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _text({field: value}, field, f"{piece.path} row {next(numbers)}")


def _open_hub(data: TextDataConfig) -> TextSource:
    """List a dataset of the Hugging Face hub, its revision pinned, or a local copy, which has no revision."""
    folder = source_files.hub_folder(data)
    revision = None if folder else source_files.pinned_revision(data)
    files = source_files.list_files(folder, folder) if folder else []
    parts = source_files.names_and_sizes(files) if folder else [str(revision)]
    version = source_files.digest(file.version for file in files) if folder else str(revision)
    try:
        shards = _load_hub(data, revision).num_shards
    except (OSError, ValueError) as error:  # what `datasets` raises; its message names splits and subsets
        raise DataError(f"data.source: {data.source!r} cannot be opened: {error}") from error
    units = tuple((Piece(data.source, shard, shards, version),) for shard in range(shards))
    return TextSource(units, source_files.describe(data, parts, revision))


def _load_hub(data: TextDataConfig, revision: str | None) -> Any:
    """Open a dataset of the hub without reading it; a local copy has no revision."""
    from datasets import load_dataset  # slow to import, and other sources do without

    folder = source_files.hub_folder(data)
    path, revision = (folder, None) if folder else (data.source.removeprefix(HUB), revision)
    return load_dataset(path, data.subset, split=data.split, revision=revision, streaming=True)


def _read_hub(piece: Piece, data: TextDataConfig) -> Iterator[str | Problem]:
    """Yield the rows of a shard of a dataset as documents."""
    where = f"{piece.path} {data.split} shard {piece.start} of {piece.stop}"
    rows = _load_hub(data, piece.version).shard(num_shards=piece.stop, index=piece.start)
    for number, row in enumerate(rows):
        yield _text(row, data.text_field, f"{where}, row {number}")
