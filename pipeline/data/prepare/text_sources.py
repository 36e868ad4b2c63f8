"""Documents from the standard library, files of several kinds and Hugging Face datasets.

A source is listed as pieces (a file, a part of one, a shard of a dataset) in a fixed order, bundled into units of
work. Each piece can be read on its own, so reading is parallel and can be interrupted, and its result is always the
same.
"""

import codecs
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import SourceInfo
from pipeline.data.prepare import exercises, markov, pydoc_questions, source_files
from pipeline.data.prepare.source_files import HUB, Problem, SourceFile, fault_of_data, is_a
from pipeline.data.templates import Exchange, Message, checked_text, exchange_of, messages_of
from pipeline.errors import DataError, did_you_mean, first_line, kind_and_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
UNIT_BYTES = 16 << 20  # small files are bundled, and large ones split, to about this much
UNIT_FILES = 64
_BLOCK = 1 << 20

T = TypeVar("T")
Document = str | Exchange
# What a reader yields: the number of a document (WHOLE: the file is one), and the function that gives its text or
# raises what is wrong with it.
Numbered = Iterator[tuple[int, Callable[[], Document]]]
WHOLE = -1


@dataclass(frozen=True)
class Piece:
    """A readable part of a source.

    Attributes:
        path: file or URL, the name of an embedded source, or "hf:NAME".
        start: first byte of a .jsonl file, first row group of Parquet, or number of a shard of a dataset.
        stop: end of the bytes or row groups (-1: the end of the file), or number of all shards of the dataset.
        split: to which it belongs, `data.split` or `data.validation_split`.
        version: changes when the content does.
    """

    path: str
    start: int = 0
    stop: int = -1
    split: str = ""
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
        DataError: nothing is there, or nothing of a kind that can be read, or there is no such split.
    """
    if data.source in EMBEDDED:
        if data.validation_split is not None:
            raise DataError(
                f"data.validation_split: {data.source!r} has no splits; expected data.validation_documents"
            )
        parts = map(str, EMBEDDED[data.source]())
        return TextSource(((Piece(data.source),),), source_files.describe(data, parts))
    if data.source.startswith(HUB):
        return _open_hub(data)
    files = source_files.find(data.source, SUFFIXES, *EMBEDDED)
    by_split = {data.split: files}
    if data.held_out == "all" and source_files.has_split(files, data.split):
        by_split = source_files.by_split(files, data.split)
        files = by_split[data.split]
    if data.validation_split is not None:
        by_split = source_files.by_split(files, data.split, data.validation_split)
        files = [file for part in by_split.values() for file in part]
    units: list[list[Piece]] = []
    for split, part in by_split.items():
        room = -1  # so that a unit belongs to one split, even behind an empty file
        for piece, weight in itertools.chain.from_iterable(map(_split, part)):
            if weight > room or len(units[-1]) == UNIT_FILES:
                units.append([])
                room = UNIT_BYTES
            units[-1].append(replace(piece, split=split))
            room -= weight
    info = source_files.describe(data, source_files.names_and_sizes(files))
    return TextSource(tuple(map(tuple, units)), info)


def read(
    piece: Piece, data: TextDataConfig, convert: Callable[[Any], T] = lambda document: document
) -> Iterator[T | Problem]:
    """Read the documents of a piece, in order; those of data with prompts are `Exchange`s.

    Args:
        piece: of `data.source`.
        data: the data section of the config.
        convert: what is made of a document; whatever it raises is a problem of that document.

    Returns:
        What `convert` makes of the documents, and in place of those that cannot be read what is wrong with them.
    """
    if piece.path in EMBEDDED:
        for document in EMBEDDED[piece.path]():
            plain = isinstance(document, str) and not data.answers
            yield convert(document if plain else document_of(document, data))
        return
    kinds = {HUB: _read_hub, ".txt": _read_txt, ".parquet": _read_parquet}
    kind = HUB if piece.path.startswith(HUB) else next((end for end in kinds if is_a(piece.path, (end,))), "")
    try:
        for number, load in kinds.get(kind, _read_jsonl)(piece, data):
            try:
                item: T | Problem = convert(load())
            except Exception as error:  # decoders and tokenizers have errors of their own
                item = Problem(_place(piece, number), _why(error))
            yield item
    except Exception as error:
        yield Problem(piece.path, f"cannot be read to the end: {fault_of_data(error)}")


def _place(piece: Piece, number: int) -> str:
    """Return where a document is."""
    if number == WHOLE:
        return piece.path
    if piece.path.startswith(HUB):
        return f"{piece.path} {piece.split} shard {piece.start} of {piece.stop}, row {number}"
    if is_a(piece.path, (".parquet",)):
        return f"{piece.path} row {number}"
    return f"{piece.path} line {_lines_before(piece) + number}"


def _why(error: Exception) -> str:
    """Return what is wrong with a document."""
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        unit = "byte" if isinstance(error, UnicodeDecodeError) else "character"
        return f"not UTF-8: {error.reason} at {unit} {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    return str(error) if isinstance(error, DataError) else kind_and_line(error)


def _pydoc() -> list[str]:
    """The standard library's help texts: English technical prose on every machine."""
    from pydoc_data.topics import topics  # here, since it is half a megabyte that few jobs read

    return [topics[key] for key in sorted(topics)]


EMBEDDED: dict[str, Callable[[], Sequence[str | dict[str, str]]]] = {
    "pydoc": _pydoc,
    "pydoc_questions": pydoc_questions.documents,
    "markov": markov.documents,
    "exercises": exercises.documents,
}


def _split(file: SourceFile) -> Iterable[tuple[Piece, int]]:
    """Cut a large file into pieces of about UNIT_BYTES where its format allows it; with their weights in bytes."""
    piece, weight = Piece(file.path, version=file.version), UNIT_BYTES
    if file.size <= 2 * UNIT_BYTES or not is_a(file.path, (".jsonl", ".parquet")):
        return [(piece, file.size)]
    edges = [*range(0, file.size, UNIT_BYTES), file.size]
    if is_a(file.path, (".parquet",)):
        try:
            with storage.open_read(file.path) as opened:
                groups = pq.ParquetFile(opened).num_row_groups
        except Exception as error:
            fault_of_data(error)
            return [(piece, file.size)]  # reading it will name the fault
        edges, weight = list(range(groups + 1)), file.size // max(groups, 1)
    return [(replace(piece, start=start, stop=stop), weight) for start, stop in itertools.pairwise(edges)]


def _read_txt(piece: Piece, data: TextDataConfig) -> Numbered:
    """Yield a file as one document, its line ends untouched."""
    decode = partial(storage.read_bytes(piece.path).decode, "utf-8-sig")
    yield WHOLE, (lambda: document_of(decode(), data)) if data.answers else decode


def _read_jsonl(piece: Piece, data: TextDataConfig) -> Numbered:
    """Yield the lines as documents; a line belongs to the piece of the file in which it starts."""
    with storage.open_read(piece.path) as file:
        lines: Iterable[bytes] = file
        if is_a(piece.path, (".gz", ".zst")) and not file.read(1):
            raise EOFError("0 bytes; expected compressed lines")  # their readers would see no line
        file.seek(0)
        if is_a(piece.path, (".gz",)):
            lines = gzip.GzipFile(fileobj=file)
        elif is_a(piece.path, (".zst",)):
            lines = io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
        position = piece.start
        if piece.start:
            file.seek(piece.start - 1)
            position += len(file.readline()) - 1
        for number, line in enumerate(lines, 1):
            if 0 <= piece.stop <= position:
                return
            position += len(line)
            if line.removeprefix(codecs.BOM_UTF8).strip():  # files with such a mark may have been joined
                yield number, partial(_parse, line, data)


def _parse(line: bytes, data: TextDataConfig) -> Document:
    """Return the document of a line."""
    try:
        return document_of(json.loads(line.decode("utf-8-sig")), data)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from None


def document_of(row: Any, data: TextDataConfig) -> Document:
    """Return the document in the fields of a row; raise what is wrong with it."""
    fields = data.fields
    if not isinstance(row, dict):
        names = " and ".join(map(repr, fields.values()))
        raise DataError(
            f"a {type(row).__name__}; expected an object with the field{'s' * (len(fields) > 1)} {names}"
        )
    for key, field in fields.items():
        if field not in row:
            known = f"{', '.join(map(str, row))}{did_you_mean(field, row)}"
            raise DataError(f"no field {field!r} (data.{key}); fields: {known}")
    if data.messages_field is not None:
        return exchange_of(messages_of(row[data.messages_field]), data.template)
    texts = [checked_text(repr(field), row[field]) for field in fields.values()]
    if not data.answers:
        return texts[0]
    return exchange_of([Message("user", texts[0]), Message("assistant", texts[1])], data.template)


def _lines_before(piece: Piece) -> int:
    """Count the lines that start before this piece of a file; needed only where a problem must be named."""
    lines, left, last = 0, piece.start, b"\n"
    with storage.open_read(piece.path) as file:
        while left and (block := file.read(min(left, _BLOCK))):
            lines, left, last = lines + block.count(b"\n"), left - len(block), block[-1:]
    return lines + (last != b"\n")


def _read_parquet(piece: Piece, data: TextDataConfig) -> Numbered:
    """Yield the rows as documents; of a group of rows that is damaged, the first row says so."""
    fields = [*data.fields.values()]
    with storage.open_read(piece.path) as raw:
        file = pq.ParquetFile(raw)
        if not {*fields} <= {*file.schema_arrow.names}:
            yield WHOLE, partial(document_of, dict.fromkeys(file.schema_arrow.names), data)
            return
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = [0, *itertools.accumulate(sizes)]
        for group in range(piece.start, len(sizes) if piece.stop < 0 else piece.stop):
            number = ends[group]
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=fields):
                    columns = [batch.column(field) for field in fields]
                    for values in zip(*columns, strict=True):
                        yield number, partial(_cells, values, fields, data)
                        number += 1
            except Exception as error:
                yield number, partial(_lost, ends[group + 1], fault_of_data(error))


def _cells(values: Sequence[pa.Scalar], fields: Sequence[str], data: TextDataConfig) -> Document:
    """Return the document in the cells of a row."""
    return document_of({field: value.as_py() for field, value in zip(fields, values, strict=True)}, data)


def _lost(end: int, fault: str) -> str:
    """Raise what is wrong with the rest of a group of rows."""
    raise DataError(f"cannot be read, nor the rows that follow in its group, up to row {end - 1}: {fault}")


def _open_hub(data: TextDataConfig) -> TextSource:
    """List a dataset of the Hugging Face hub, its revision pinned, or a local copy, which has no revision."""
    folder = source_files.hub_folder(data)
    revision = None if folder else source_files.pinned_revision(data)
    files = source_files.list_files(folder, folder) if folder else []
    parts = source_files.names_and_sizes(files) if folder else [str(revision)]
    version = source_files.digest(file.version for file in files) if folder else str(revision)
    units: list[tuple[Piece, ...]] = []
    for split in filter(None, (data.split, data.validation_split)):
        try:
            shards = _load_hub(data, split, revision).num_shards
        except Exception as error:  # errors of several libraries; their message names splits and subsets
            why = first_line(error)
            if "script" in why:  # which `datasets` ran before version 4
                why += "; expected a dataset of data files, such as a copy in Parquet"
            raise DataError(f"data.source: {data.source!r} cannot be opened: {why}") from error
        units += [(Piece(data.source, shard, shards, split, version),) for shard in range(shards)]
    return TextSource(tuple(units), source_files.describe(data, parts, revision))


def _load_hub(data: TextDataConfig, split: str, revision: str | None) -> Any:
    """Open a dataset of the hub without reading it; a local copy has no revision."""
    from datasets import load_dataset  # slow to import, and other sources do without

    folder = source_files.hub_folder(data)
    path, revision = (folder, None) if folder else (data.source.removeprefix(HUB), revision)
    return load_dataset(path, data.subset, split=split, revision=revision, streaming=True)


def _read_hub(piece: Piece, data: TextDataConfig) -> Numbered:
    """Yield the rows of a shard of a dataset as documents."""
    rows = _load_hub(data, piece.split, piece.version).shard(num_shards=piece.stop, index=piece.start)
    for number, row in enumerate(rows):
        yield number, partial(document_of, row, data)
