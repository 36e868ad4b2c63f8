"""Text preparation: documents become shards of token rows, on Ray.

1. The tokenizer is loaded, or trained on training documents, and kept beside the shards.
2. Ray Data tokenises the units of the source, each into one intermediate file.
3. The tokens of all units, one after the other, form one stream, in which every document is followed by EOT unless
   `data.end_of_text` is false. Ray tasks cut the stream into rows, or make a row of every document (`data.wrap:
   sentence`), and write the shards.

What the shards hold depends on the input and the config alone.
"""

import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from operator import methodcaller
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import TOKENIZER, Manifest, SpecialIds, Split, TokenizerInfo, hash_content
from pipeline.data.prepare import workflow
from pipeline.data.prepare.documents import answer_rows, encoder, read_ends
from pipeline.data.prepare.source_files import Problem, leave_out, reached
from pipeline.data.prepare.text_filters import text_filter
from pipeline.data.prepare.text_sources import Document, Piece, TextSource, read
from pipeline.data.reading_order import permutation
from pipeline.data.shards import Rows, token_dtype
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from pipeline.errors import DataError
from pipeline.models.batch import Roles

log = logging.getLogger(__name__)

UNIT_FORMAT = 2  # raise it when units of an interrupted preparation could not be continued
FORMAT = 1  # raise it when the same config and input would give other shards

FIT_BYTES = 64 << 20  # of the text on which a tokenizer is trained, at most
_FIT_SEED = 0

# Once per process, since building a large tokenizer takes longer than tokenising most units.
cached_tokenizer = lru_cache(maxsize=2)(load_tokenizer)


class TextUnit(workflow.Unit):
    """The record of one tokenised unit.

    Its file (`bin`) holds the tokens, then as int64 the documents' ends in tokens and in bytes. A prompt and its
    answer are a whole row without its padding; the numbers of given tokens of all rows follow.

    Attributes:
        split: of the source, to which the unit belongs.
        tokens: number of tokens, EOTs included.
        bytes: number of UTF-8 bytes of the documents.
        documents: number of documents with any text.
        empty: number of documents without text, which are left out.
        cut: number of rows whose answer is cut.
        full: number of documents that are left out because their prompt fills the row.
    """

    split: str = ""
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    empty: int = 0
    cut: int = 0
    full: int = 0

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
    shape = ("length", "wrap", "shard_rows")
    values = {key: getattr(data, key) for key in keys + shape} | {"validation_documents": data.held_out}
    # Left out where they are not set, so that data of earlier versions keeps its name.
    later = {key: getattr(data, key) for key in ("text_filter", "validation_split")}
    values |= {key: value for key, value in later.items() if value is not None}
    values |= {} if data.end_of_text else {"end_of_text": False}
    if data.answers:
        del values["text_field"]
        values |= data.fields | {"template": data.template, "answer_block": data.answer_block}
    tokenizer = data.tokenizer if data.fitted is not None else cached_tokenizer(data.tokenizer).hash
    return {**values, "tokenizer": tokenizer, "format": FORMAT}


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
    local = place_tokenizer(data, source, work)
    tokenise = partial(workflow.map_row, function=partial(tokenise_unit, data=local, work=work))
    step = methodcaller("map", tokenise)  # of a dataset
    units = workflow.run_units(source.units, TextUnit, step, work=work, verb="tokenised", amounts="tokens")
    plans = plan_splits(units, local, work)
    unit = "documents" if data.padded else "tokens"
    splits = workflow.write_shards(plans, row_maker(units, local, work), path, work=work, unit=unit)
    if data.padded:
        for name, split in splits.items():
            tokens = sum(length * rows for length, rows in enumerate(split.row_lengths))
            splits[name] = split.model_copy(update={"tokens": tokens})
    tokenizer = cached_tokenizer(local.tokenizer)
    workflow.save_tokenizer(tokenizer, storage.join(path, TOKENIZER))
    return describe(data, source, units, splits, tokenizer)


def place_tokenizer(data: TextDataConfig, source: TextSource, work: str) -> TextDataConfig:
    """Load or train the tokenizer, and keep it in a folder, where every node finds the same one.

    Args:
        data: the data section of the config.
        source: the listed source.
        work: folder of the intermediate files.

    Returns:
        The section with the folder as its tokenizer.

    Raises:
        DataError: the source is unreadable, or has no training documents to train a tokenizer on.
        ConfigError: there is no such tokenizer.
    """
    folder = storage.join(work, TOKENIZER)
    if not storage.folder_complete(folder):
        fitted = _fit(data, source) if data.fitted is not None else cached_tokenizer(data.tokenizer)
        workflow.save_tokenizer(fitted, folder)
    return data.model_copy(update={"tokenizer": folder})


def describe(
    data: TextDataConfig,
    source: TextSource,
    units: Sequence[TextUnit],
    splits: dict[str, Split],
    tokenizer: Tokenizer,
) -> Manifest:
    """Return the manifest of shards that were written.

    Args:
        data: the data section of the config.
        source: the listed source.
        units: records of all units.
        splits: the files of every split.
        tokenizer: that made the ids.
    """
    settings = content(data)
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
        rows_cut=sum(unit.cut for unit in units),
        rows_full=sum(unit.full for unit in units),
        answer_block=data.answer_block if data.answers else None,
        template=data.template,
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
    encode = encoder(data, tokenizer)
    lengths, sizes, given = array("q"), array("q"), array("q")
    empty = cut = full = 0
    with storage.scratch() as folder:
        local = folder / "unit"
        with local.open("wb") as file:
            for item in (item for piece in pieces for item in read(piece, data, encode)):
                if isinstance(item, Problem):
                    problems.append(leave_out(item, data))
                elif item.full:
                    full += 1
                elif not len(item.ids):
                    empty += 1
                else:
                    file.write(item.ids.astype(dtype).tobytes())
                    lengths.append(len(item.ids))
                    sizes.append(item.bytes)
                    given.append(item.given)
                    cut += item.cut
            file.write(np.cumsum([lengths, sizes], axis=1, dtype="<i8").tobytes())
            file.write(np.array(given if data.answers else [], "<i8").tobytes())
        storage.publish_file(local, workflow.unit_path(work, index, "bin"))
    counts = {"tokens": sum(lengths), "bytes": sum(sizes), "documents": len(lengths), "empty": empty}
    counts |= {"cut": cut, "full": full}
    return TextUnit(index=index, problems=problems, split=pieces[0].split, **counts).publish(work)


def plan_splits(units: Sequence[TextUnit], data: TextDataConfig, work: str) -> dict[str, workflow.SplitPlan]:
    """Decide which shard holds which tokens; the last documents are held out, as the config says how many.

    Args:
        units: records of all units, in order.
        data: the data section of the config.
        work: folder of the intermediate files.

    Returns:
        The plans of the splits "train" and "validation"; of "validation" alone where all documents are held out.

    Raises:
        DataError: there are no documents, too few of them, or less than a row in a split.
    """
    counts, payload = _documents(units, data), _payload(data)
    if data.padded:
        pieces = np.array([(unit.index, 0, unit.documents) for unit in units], np.int64)
        plans = workflow.plan_splits(pieces, counts[0], counts, data.shard_rows, row=1, tokens=data.length)
        sizes = {"train": 0, "validation": 0}  # rows are cut, so the bytes that they hold are not known
    else:
        border, text_border = _border(units, counts[0], data, work=work)
        pieces = np.array([(unit.index, 0, unit.tokens) for unit in units], np.int64)
        plans = workflow.plan_splits(pieces, border, counts, data.shard_rows, row=payload, tokens=1)
        sizes = {"train": text_border, "validation": sum(unit.bytes for unit in units) - text_border}
    if data.held_out == "all":
        plans.pop("train")
    plans = {
        name: plan._replace(split=plan.split.model_copy(update={"bytes": sizes[name]}))
        for name, plan in plans.items()
    }
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
    if data.answers:
        sizes = {unit.index: (unit.tokens, unit.documents) for unit in units}
        return partial(answer_rows, work=work, length=data.length, pad=special.pad, sizes=sizes, dtype=dtype)
    if data.padded:
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
            ends = read_ends(file, tokens[unit], dtype, documents=(start, stop))
            file.seek(ends[0] * dtype.itemsize)
            ids = np.frombuffer(file.read((ends[-1] - ends[0]) * dtype.itemsize), dtype)
        cuts = pairwise(ends)
        texts += [ids[begin - ends[0] : min(end - 1, begin + length - 2) - ends[0]] for begin, end in cuts]
    lengths = np.array([len(text) for text in texts]) + 2
    rows = np.full((len(texts), length), special.pad, dtype)
    rows[:, 0] = special.bos
    for row, text in zip(rows, texts, strict=True):
        row[1 : 1 + len(text)], row[1 + len(text)] = text, special.eot
    return Rows(rows, roles=Roles(np.zeros_like(lengths), lengths))


def _payload(data: TextDataConfig) -> int:
    """Tokens of a row that come from the documents."""
    return data.length - 2 * (data.wrap == "bos_eos")


def _documents(units: Sequence[TextUnit], data: TextDataConfig) -> tuple[int, int]:
    """Count the documents of training and of validation; refuse a source that has too few of them."""
    total, held_out = sum(unit.documents for unit in units), data.held_out
    if held_out is None:
        named = sum(unit.documents for unit in units if unit.split == data.validation_split)
        counts = {data.split: total - named, str(data.validation_split): named}
        for split, count in counts.items():
            if not count:
                raise DataError(f"data.source: split {split!r} of {data.source!r} has no documents with text")
        return total - named, named
    if held_out == "all":
        workflow.check_held_out(data, "documents", total, 0)
        return 0, total
    workflow.check_held_out(data, "documents", total, held_out)
    return total - held_out, held_out


def _border(units: Sequence[TextUnit], document: int, data: TextDataConfig, work: str) -> tuple[int, int]:
    """Find where a document starts in the stream of all tokens, and in that of all bytes."""
    index = int(np.searchsorted(np.cumsum([unit.documents for unit in units]), document, side="right"))
    tokens, size = sum(unit.tokens for unit in units[:index]), sum(unit.bytes for unit in units[:index])
    before = document - sum(unit.documents for unit in units[:index])
    if not before:
        return tokens, size
    dtype = token_dtype(cached_tokenizer(data.tokenizer).vocab_size)
    with storage.open_read(workflow.unit_path(work, index, "bin")) as file:
        file.seek(units[index].tokens * dtype.itemsize)
        ends = np.frombuffer(file.read(), "<i8").reshape(2, -1)[:, before - 1]
    return tokens + int(ends[0]), size + int(ends[1])


def _fit(data: TextDataConfig, source: TextSource) -> Tokenizer:
    """Train a tokenizer on training documents: on all of them, or on `FIT_BYTES` of them."""
    assert data.fitted is not None
    log.info("training a tokenizer of %d entries on up to %d MiB of text", data.fitted, FIT_BYTES >> 20)
    with reached(data.source):
        return train_bpe(data.fitted, _training_texts(data, source))


def _training_texts(data: TextDataConfig, source: TextSource) -> Iterator[str]:
    """Yield training documents, in units of the source that are drawn at random."""
    stop, rest = _training_end(data, source)
    left = FIT_BYTES
    for index in permutation(stop + (rest > 0), _FIT_SEED).tolist():
        for text in _texts(source.units[index], data)[: rest if index == stop else None]:
            yield text
            left -= len(text.encode())
            if left <= 0:
                return


def _training_end(data: TextDataConfig, source: TextSource) -> tuple[int, int]:
    """Return how many units hold training documents only, and how many such documents the next unit begins with.

    Only the units at the end are read, as many as hold what is held out.
    """
    units = source.units
    if data.held_out is None:
        return sum(unit[0].split != data.validation_split for unit in units), 0
    assert data.held_out != "all"
    left, total = data.held_out, 0
    for index in reversed(range(len(units))):
        count = len(_texts(units[index], data))
        total += count
        if left < count:
            return (index, count - left) if left else (index + 1, 0)
        left -= count
    workflow.check_held_out(data, "documents", total, data.held_out)
    return 0, 0  # not reached: nothing would be left to train on


@storage.retry
def _texts(pieces: Sequence[Piece], data: TextDataConfig) -> list[str]:
    """Read the documents of a unit that have any text."""
    clean = text_filter(data.text_filter)

    def whole(document: Document) -> str:
        return clean(document) if isinstance(document, str) else "".join(map(clean, document))

    items = [item for piece in pieces for item in read(piece, data, whole)]
    for item in items:
        if isinstance(item, Problem):
            leave_out(item, data)
    return [item for item in items if item and not isinstance(item, Problem)]
