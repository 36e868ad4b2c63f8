"""Text preparation: documents become shards of token rows, on Ray.

1. Ray Data tokenises the units of the source, each into one intermediate file.
2. The tokens of all units, one after the other, form one stream, in which every document is followed by EOT. Ray
   tasks cut the stream into rows, or make a row of every document (`data.wrap: sentence`), and write the shards.

What the shards hold depends on the input and the config alone.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from operator import methodcaller
from typing import IO, Any

import numpy as np

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import Manifest, SpecialIds, Split, TokenizerInfo, hash_content
from pipeline.data.prepare import workflow
from pipeline.data.prepare.source_files import Problem, leave_out, reached
from pipeline.data.prepare.text_sources import Piece, TextSource, read
from pipeline.data.shards import Rows, token_dtype
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError

FORMAT = 1  # raise it when the same config and input would give other shards

# Once per process, since building a large tokenizer takes longer than tokenising most units.
cached_tokenizer = lru_cache(maxsize=2)(load_tokenizer)


class TextUnit(workflow.Unit):
    """The record of one tokenised unit. Its file (`bin`) holds the tokens, then the documents' ends as int64.

    Attributes:
        tokens: number of tokens, EOTs included.
        documents: number of documents with any text.
        empty: number of documents without text, which are left out.
    """

    tokens: int = 0
    documents: int = 0
    empty: int = 0

    @property
    def amount(self) -> int:
        """The number of tokens."""
        return self.tokens


def content(data: TextDataConfig) -> dict[str, Any]:
    """Return every setting that determines what the shards hold, by key of the config.

    Args:
        data: the data section of the config.
    """
    keys = ("source", "text_field", "subset", "split", "revision", "on_error")
    shape = ("length", "wrap", "validation_documents", "shard_rows")
    values = {key: getattr(data, key) for key in keys + shape}
    return {**values, "tokenizer": cached_tokenizer(data.tokenizer).hash, "format": FORMAT}


def build(data: TextDataConfig, source: TextSource, path: str, work: str) -> Manifest:
    """Make the shards, except for those that an interrupted preparation has finished.

    Args:
        data: the data section of the config.
        source: the listed source.
        path: folder of the shards.
        work: folder of the intermediate files.

    Returns:
        The manifest, which is not written yet.

    Raises:
        DataError: the source is empty, unreadable or too small.
    """
    tokenise = partial(workflow.map_row, function=partial(tokenise_unit, data=data, work=work))
    step = methodcaller("map", tokenise)  # of a dataset
    units = workflow.run_units(source.units, TextUnit, step, work=work, verb="tokenised", amounts="tokens")
    plans = plan_splits(units, data, work)
    unit = "documents" if data.wrap == "sentence" else "tokens"
    splits = workflow.write_shards(plans, row_maker(units, data, work), path, work=work, unit=unit)
    if data.wrap == "sentence":
        for name, split in splits.items():
            tokens = sum(length * rows for length, rows in enumerate(split.row_lengths))
            splits[name] = split.model_copy(update={"tokens": tokens})
    return describe(data, source, units, splits=splits)


def describe(
    data: TextDataConfig, source: TextSource, units: Sequence[TextUnit], splits: dict[str, Split]
) -> Manifest:
    """Return the manifest of shards that were written.

    Args:
        data: the data section of the config.
        source: the listed source.
        units: records of all units.
        splits: the files of every split.
    """
    tokenizer, settings = cached_tokenizer(data.tokenizer), content(data)
    return Manifest(
        length=data.length,
        vocabulary=tokenizer.vocab_size,
        special=SpecialIds.of_text(data, tokenizer),
        wrap=data.wrap,
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        source=source.info,
        content=settings,
        content_key=hash_content(settings),
        splits=splits,
        documents=sum(unit.documents for unit in units),
        documents_empty=sum(unit.empty for unit in units),
        tokens=sum(unit.tokens for unit in units),
        skipped=workflow.skipped(units),
    )


def tokenise_unit(unit: tuple[int, Sequence[Piece]], data: TextDataConfig, work: str) -> TextUnit:
    """Tokenise one unit and write its file and its record.

    Args:
        unit: its number, and the parts of the source that it consists of.
        data: the data section of the config.
        work: folder of the intermediate files.

    Returns:
        The record.

    Raises:
        DataError: the source cannot be reached, or a document cannot be read, and `data.on_error` is fatal.
    """
    with reached(data.source):
        return _tokenise(*unit, data=data, work=work)


@storage.retry
def _tokenise(index: int, pieces: Sequence[Piece], data: TextDataConfig, work: str) -> TextUnit:
    """Tokenise one unit."""
    tokenizer = cached_tokenizer(data.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    problems: list[str] = []
    lengths, empty = array("q"), 0
    with storage.scratch() as folder:
        local = folder / "unit"
        with local.open("wb") as file:
            for ids in (item for piece in pieces for item in read(piece, data, tokenizer.encode)):
                if isinstance(ids, Problem):
                    problems.append(leave_out(ids, data))
                elif len(ids):
                    file.write(np.append(ids, tokenizer.eot).astype(dtype).tobytes())
                    lengths.append(len(ids) + 1)
                else:
                    empty += 1
            file.write(np.cumsum(lengths, dtype="<i8").tobytes())
        storage.publish_file(local, workflow.unit_path(work, index, "bin"))
    return TextUnit(
        index=index, problems=problems, tokens=sum(lengths), documents=len(lengths), empty=empty
    ).publish(work)


def plan_splits(units: Sequence[TextUnit], data: TextDataConfig, work: str) -> dict[str, workflow.SplitPlan]:
    """Decide which shard holds which tokens; the last `data.validation_documents` documents are held out.

    Args:
        units: records of all units, in order.
        data: the data section of the config.
        work: folder of the intermediate files.

    Returns:
        The plans of the splits "train" and "validation".

    Raises:
        DataError: there are no documents, too few of them, or less than a row in a split.
    """
    documents = sum(unit.documents for unit in units)
    workflow.check_held_out(data, "documents", documents)
    counts = (documents - data.validation_documents, data.validation_documents)
    if data.wrap == "sentence":
        pieces = np.array([(unit.index, 0, unit.documents) for unit in units], np.int64)
        return workflow.plan_splits(pieces, counts[0], counts, data.shard_rows, row=1, tokens=data.length)
    border = _border(units, counts[0], data, work=work)
    payload = _payload(data)
    pieces = np.array([(unit.index, 0, unit.tokens) for unit in units], np.int64)
    plans = workflow.plan_splits(pieces, border, counts, data.shard_rows, row=payload, tokens=1)
    for name, (split, shards) in plans.items():
        if not shards:
            raise DataError(
                f"data.length: the {name} split has {split.tokens} tokens, less than one row of {payload}; "
                "expected more documents in it or shorter rows"
            )
    return plans


def row_maker(units: Sequence[TextUnit], data: TextDataConfig, work: str) -> Callable[[workflow.Shard], Rows]:
    """Return the function that makes the rows of a shard; it needs no tokenizer.

    Args:
        units: records of all units.
        data: the data section of the config.
        work: folder of the intermediate files.
    """
    tokenizer = cached_tokenizer(data.tokenizer)
    special, dtype = SpecialIds.of_text(data, tokenizer), token_dtype(tokenizer.vocab_size)
    if data.wrap == "sentence":
        tokens = {unit.index: unit.tokens for unit in units}
        return partial(
            _padded_rows, work=work, length=data.length, special=special, tokens=tokens, dtype=dtype
        )
    return partial(_rows, work=work, payload=_payload(data), wrap_id=special.bos, dtype=dtype)


def _rows(shard: workflow.Shard, work: str, payload: int, wrap_id: int | None, dtype: np.dtype) -> Rows:
    """Read the tokens of a shard and cut them into rows, between two `wrap_id` each where that is set."""
    parts = []
    for unit, start, stop in shard.pieces.tolist():
        with storage.open_read(workflow.unit_path(work, unit, "bin")) as file:
            file.seek(start * dtype.itemsize)
            parts.append(np.frombuffer(file.read((stop - start) * dtype.itemsize), dtype))
    rows = np.concatenate(parts).reshape(-1, payload)
    if wrap_id is not None:
        rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=wrap_id)
    return Rows(rows)


def _padded_rows(
    shard: workflow.Shard,
    work: str,
    length: int,
    special: SpecialIds,
    tokens: Mapping[int, int],
    dtype: np.dtype,
) -> Rows:
    """Make a row of every document of a shard: BOS, its first tokens, EOT, padding."""
    texts = []
    for unit, start, stop in shard.pieces.tolist():
        with storage.open_read(workflow.unit_path(work, unit, "bin")) as file:
            ends = [0, *_read_ends(file, tokens[unit], dtype, documents=(start, stop))][-1 - (stop - start) :]
            file.seek(ends[0] * dtype.itemsize)
            ids = np.frombuffer(file.read((ends[-1] - ends[0]) * dtype.itemsize), dtype)
        cuts = pairwise(ends)
        texts += [ids[begin - ends[0] : min(end - 1, begin + length - 2) - ends[0]] for begin, end in cuts]
    lengths = np.array([len(text) for text in texts]) + 2
    rows = np.full((len(texts), length), special.pad, dtype)
    rows[:, 0] = special.bos
    for row, text in zip(rows, texts, strict=True):
        row[1 : 1 + len(text)], row[1 + len(text)] = text, special.eot
    return Rows(rows, lengths=lengths)


def _read_ends(file: IO[bytes], tokens: int, dtype: np.dtype, documents: tuple[int, int]) -> list[int]:
    """Read where the documents `start - 1` (if there is one) to `stop - 1` of a unit end, in tokens."""
    start, stop = max(documents[0] - 1, 0), documents[1]
    file.seek(tokens * dtype.itemsize + start * 8)
    return np.frombuffer(file.read((stop - start) * 8), "<i8").tolist()


def _payload(data: TextDataConfig) -> int:
    """Tokens of a row that come from the documents."""
    return data.length - 2 * (data.wrap == "bos_eos")


def _border(units: Sequence[TextUnit], document: int, data: TextDataConfig, work: str) -> int:
    """Find where a document starts in the stream of all tokens."""
    index = int(np.searchsorted(np.cumsum([unit.documents for unit in units]), document, side="right"))
    start = sum(unit.tokens for unit in units[:index])
    before = document - sum(unit.documents for unit in units[:index])
    if not before:
        return start
    dtype = token_dtype(cached_tokenizer(data.tokenizer).vocab_size)
    with storage.open_read(workflow.unit_path(work, index, "bin")) as file:
        return start + _read_ends(file, units[index].tokens, dtype, documents=(before, before))[0]
