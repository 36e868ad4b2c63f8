"""What workers run in text preparation: tokenise a unit of documents, cut a shard out of the tokens.

All tokens of all units, laid end to end, are one stream; documents in it are followed by EOT. A shard is a
range of that stream, so any worker can write any shard, and what it holds does not depend on who did.
"""

import json
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import ShardFile, token_dtype
from pipeline.data.prepare.text_sources import Piece, Problem, read
from pipeline.data.shards import publish_shard
from pipeline.data.tokenizers import Tokenizer, load_tokenizer
from pipeline.errors import DataError

_DOCUMENTS = 256  # tokenised together


@dataclass(frozen=True)
class Unit:
    """What tokenising one unit of the source gave.

    Attributes:
        tokens: EOTs included.
        documents: those with any text.
        empty: documents without text, left out.
        problems: documents left out because they cannot be read.
        fatal: the one that stops the job (`data.on_error: fatal`), or "".
    """

    index: int
    tokens: int = 0
    documents: int = 0
    empty: int = 0
    problems: Sequence[str] = ()
    fatal: str = ""


@dataclass(frozen=True)
class Shard:
    """One shard to write.

    Attributes:
        start, stop: its range of the stream of all tokens.
        payload: tokens of a row that come from the stream.
        wrap_id: what is put before and after each row; None for nothing.
    """

    name: str
    start: int
    stop: int
    payload: int
    wrap_id: int | None
    dtype: str


@dataclass(frozen=True)
class SplitPlan:
    """The shards of a split, and what they are made of."""

    shards: tuple[Shard, ...]
    documents: int
    tokens: int


@lru_cache(maxsize=2)
def cached_tokenizer(spec: str) -> Tokenizer:
    """One per process: building a large one takes longer than many a unit."""
    return load_tokenizer(spec)


def unit_path(work: str, index: int, kind: str) -> str:
    """A unit's `bin` (tokens, then the documents' ends as int64) or `json` (`Unit`, written last)."""
    return storage.join(work, f"unit-{index:06d}.{kind}")


def read_unit(work: str, index: int) -> Unit:
    """The record of a unit that was tokenised."""
    return Unit(**json.loads(storage.read_text(unit_path(work, index, "json"))))


@storage.retry
def tokenise_unit(index: int, pieces: Sequence[Piece], data: TextDataConfig, work: str) -> Unit:
    """Write a unit's tokens and record. Faults of the data come back in the result."""
    tokenizer = cached_tokenizer(data.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    ends = array("q")
    texts: list[str] = []
    problems: list[str] = []
    empty = 0
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "unit"
        with local.open("wb") as file:

            def flush() -> None:
                for ids in tokenizer.encode_batch(texts):
                    file.write(np.append(ids, tokenizer.eot).astype(dtype).tobytes())
                    ends.append((ends[-1] if ends else 0) + len(ids) + 1)
                texts.clear()

            for document in (document for piece in pieces for document in read(piece, data)):
                if isinstance(document, Problem):
                    if data.on_error == "fatal":
                        hint = "data.on_error: skip counts and leaves out what cannot be read"
                        return Unit(index, fatal=f"data.source: {document} ({hint})")
                    problems.append(str(document))
                elif document:
                    texts.append(document)
                    if len(texts) == _DOCUMENTS:
                        flush()
                else:
                    empty += 1
            flush()
            file.write(np.asarray(ends, dtype="<i8").tobytes())
        storage.publish_file(local, unit_path(work, index, "bin"))
    unit = Unit(index, ends[-1] if ends else 0, len(ends), empty, tuple(problems))
    storage.publish_text(unit_path(work, index, "json"), json.dumps(asdict(unit)))
    return unit


def plan_splits(
    units: Sequence[Unit], data: TextDataConfig, tokenizer: Tokenizer, work: str
) -> dict[str, SplitPlan]:
    """Which shard holds which tokens; the last `data.validation_documents` documents are held out.

    Raises:
        DataError: no documents, too few of them, or less than a row in a split.
    """
    documents = sum(unit.documents for unit in units)
    held_out = data.validation_documents
    if not documents:
        raise DataError(f"data.source: {data.source!r} is empty: no document with any text in it")
    if held_out >= documents:
        raise DataError(
            f"data.validation_documents: {held_out} of {documents} documents would leave none to train on; "
            f"expected less than {documents}"
        )
    dtype = token_dtype(tokenizer.vocab_size)
    border = _border(units, documents - held_out, dtype, work)
    end = sum(unit.tokens for unit in units)
    wraps = data.wrap == "bos_eos"
    payload = data.length - 2 * wraps
    plans = {}
    for split, first, last, count in (
        ("train", 0, border, documents - held_out),
        ("validation", border, end, held_out),
    ):
        whole = first + (last - first) // payload * payload
        if whole == first:
            raise DataError(
                f"data.length: the {split} split has {last - first} tokens, less than one row of {payload}; "
                "expected more documents in it or shorter rows"
            )
        step = data.shard_rows * payload
        shards = (
            Shard(
                name=f"{split}-{number:05d}.parquet",
                start=start,
                stop=min(start + step, whole),
                payload=payload,
                wrap_id=tokenizer.eot if wraps else None,
                dtype=dtype.str,
            )
            for number, start in enumerate(range(first, whole, step))
        )
        plans[split] = SplitPlan(tuple(shards), count, last - first)
    return plans


def write_shard(shard: Shard, starts: Int64[np.ndarray, "edges"], path: str, work: str) -> ShardFile:
    """Write one shard, unless it is there.

    Args:
        starts: where each unit begins in the stream of all tokens, and its end.
        path: folder of the shards.
        work: folder of the units.
    """

    def make() -> tuple[UInt[np.ndarray, "n L"], None]:
        rows = _tokens(shard, starts, work).reshape(-1, shard.payload)
        if shard.wrap_id is not None:
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=shard.wrap_id)
        return rows, None

    return publish_shard(shard.name, path, work, make)


def _border(units: Sequence[Unit], document: int, dtype: np.dtype, work: str) -> int:
    """Where document number `document` begins in the stream of all tokens."""
    start = 0
    for unit in units:
        if document < unit.documents:
            break
        document -= unit.documents
        start += unit.tokens
    if not document:
        return start
    with storage.open_read(unit_path(work, unit.index, "bin")) as file:
        file.seek(unit.tokens * dtype.itemsize + (document - 1) * 8)
        return start + int(np.frombuffer(file.read(8), dtype="<i8")[0])


def _tokens(shard: Shard, starts: Int64[np.ndarray, "edges"], work: str) -> UInt[np.ndarray, "n"]:
    """The shard's range of the stream, from the units that it touches."""
    dtype = np.dtype(shard.dtype)
    first = int(np.searchsorted(starts, shard.start, side="right")) - 1
    parts = []
    for unit in range(first, int(np.searchsorted(starts, shard.stop, side="left"))):
        start = max(shard.start, int(starts[unit])) - int(starts[unit])
        stop = min(shard.stop, int(starts[unit + 1])) - int(starts[unit])
        with storage.open_read(unit_path(work, unit, "bin")) as file:
            file.seek(start * dtype.itemsize)
            parts.append(np.frombuffer(file.read((stop - start) * dtype.itemsize), dtype=dtype))
    return np.concatenate(parts)
