"""How fast text becomes shards on one core, beside tokenisers alone, and how long training waits for its rows."""

import base64
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from os import environ
from pathlib import Path
from typing import Any

import tiktoken

from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.text import cached_tokenizer, describe, plan_splits, row_maker, tokenise_unit
from pipeline.data.prepare.text_sources import TextSource, open_source, read
from pipeline.data.reading_order import ReadingOrder, batches
from pipeline.data.shards import ShardReader, publish_shard
from pipeline.data.tokenizers import PATTERN, RANK_FILE, ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

OURS, RAW, MAP = "tokenise + pack + write", "tiktoken alone", "datasets.map"


@dataclass(frozen=True)
class Preparation:
    """Text preparation, measured on one core.

    Attributes:
        megabytes: of UTF-8 text.
        tokens: ends of documents included.
        seconds: of every form, a value a turn; datasets.map and tiktoken only tokenise, in memory.
        note: what was not measured, and why.
    """

    tokenizer: str
    megabytes: float
    tokens: int
    seconds: Mapping[str, Sequence[float]]
    note: str = ""

    def ratio(self, other: str) -> float:
        """How many times as fast ours is as another form, by the median over turns."""
        pairs = zip(self.seconds[other], self.seconds[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def rate(self, form: str) -> float:
        """Tokens a second."""
        return self.tokens / statistics.median(self.seconds[form])


def measure_preparation(
    tokenizer: str, megabytes: float, length: int, turns: int, now: Callable[[], float]
) -> Preparation:
    """Prepare the embedded corpus, over and over until it is large enough, and time all forms in turn.

    Source: documents in a .jsonl file, as users bring them; ours reads it, the others have the texts already.
    """
    with tempfile.TemporaryDirectory() as folder, _one_core():
        data = _corpus(Path(folder), tokenizer, megabytes, length)
        source, known = open_source(data), cached_tokenizer(tokenizer)
        texts = [str(text) for unit in source.units for piece in unit for text in read(piece, data)]
        forms: dict[str, Callable[[], object]] = {OURS: lambda: None}
        note = f"{known.name} has no ranks: nothing to compare with"
        if not isinstance(known, ByteTokenizer):
            note = ""
            forms |= {RAW: _tiktoken_alone(known, texts), MAP: _datasets_map(known, texts)}
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        tokens = 0
        for turn in range(turns + 1):  # the first warms up
            for form, run in forms.items():
                with tempfile.TemporaryDirectory() as into:
                    began = now()
                    if form == OURS:
                        tokens = _prepare(data, source, Path(into)).tokens
                    else:
                        run()
                    if turn:
                        seconds[form].append(now() - began)
    return Preparation(known.name, sum(len(t.encode()) for t in texts) / 1e6, tokens, seconds, note)


def data_wait(step: Callable[[], object], batch: int, length: int, steps: int) -> float:
    """Share of time in which training waits for rows, which are read ahead from shards on disk.

    Args:
        step: of training; the first one is not counted.
        batch: rows of a step.
        length: tokens of a row.
    """
    waited = total = 0.0
    rows = batch * (steps + 1) * length / 1e6 + 0.5
    with tempfile.TemporaryDirectory() as folder:
        data = _corpus(Path(folder), "bytes", rows, length)
        manifest = _prepare(data, open_source(data), Path(folder))
        reader = ShardReader(folder, manifest, "train")
        order = ReadingOrder(manifest.rows_per_shard("train"), batch, batch, data.shuffle_window, seed=0)
        waiting = batches(reader, order, 0, 0, 1, batch)
        for turn in range(steps + 1):
            began = time.perf_counter()
            next(waiting)
            got = time.perf_counter()
            step()
            if turn:
                waited += got - began
                total += time.perf_counter() - began
        waiting.close()
    return waited / total


def _corpus(folder: Path, tokenizer: str, megabytes: float, length: int) -> TextDataConfig:
    file = folder / "corpus.jsonl"
    embedded = TextDataConfig()
    topics = [str(text) for piece in open_source(embedded).units[0] for text in read(piece, embedded)]
    with file.open("w") as out:
        while out.tell() < megabytes * 1e6:
            out.writelines(json.dumps({"text": text}) + "\n" for text in topics)
    return TextDataConfig(
        source=str(file), tokenizer=tokenizer, length=length, validation_documents=8, shard_rows=1024
    )


def _prepare(data: TextDataConfig, source: TextSource, into: Path) -> Manifest:
    """What the preparation's workers do for all units and shards, one after the other in this process."""
    work = str(into / "work")
    units = [tokenise_unit(unit, data, work) for unit in enumerate(source.units)]
    make, splits = row_maker(data, work), {}
    for name, (split, shards) in plan_splits(units, data, work).items():
        files = tuple(
            publish_shard(shard.name, str(into), work, make=partial(make, shard)) for shard in shards
        )
        splits[name] = split.model_copy(update={"files": files})
    return describe(data, source, units, splits=splits)


def _tiktoken_alone(tokenizer: Tokenizer, texts: Sequence[str]) -> Callable[[], object]:
    encoding = tiktoken.Encoding(
        "alone", pat_str=PATTERN, mergeable_ranks=_ranks(tokenizer), special_tokens={}
    )
    return lambda: [encoding.encode_ordinary(text) for text in texts]


def _datasets_map(tokenizer: Tokenizer, texts: Sequence[str]) -> Callable[[], object]:
    """The fast tokenizer of the same ranks, in batches, with one process and one thread."""
    import datasets  # takes seconds, as its neighbour does
    import tokenizers

    datasets.disable_progress_bars()
    fast = tokenizers.Tokenizer(byte_level_bpe(_ranks(tokenizer)))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    data = datasets.Dataset.from_dict({"text": list(texts)})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [found.ids for found in fast.encode_batch_fast(batch["text"])]}

    return lambda: data.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)


def byte_level_bpe(ranks: Mapping[bytes, int]) -> Any:
    """The same encoding for the `tokenizers` library, which wants pairs to merge in place of ranks."""
    from tokenizers.models import BPE

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spelled(left), spelled(right))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in [_last_merge(token, rank, ranks)]
    ]
    return BPE({spelled(token): rank for token, rank in ranks.items()}, merges)


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is merged from: what merging by the smaller ranks leaves of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        least = pairs.index(min(pairs))
        parts[least : least + 2] = [parts[least] + parts[least + 1]]
    return parts[0], parts[1]


def _ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        lines = (Path(folder) / RANK_FILE).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


@contextmanager
def _one_core() -> Iterator[None]:
    """Hold the `tokenizers` library to one thread, as the other forms are."""
    before = environ.get("TOKENIZERS_PARALLELISM")
    environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del environ["TOKENIZERS_PARALLELISM"]
        else:
            environ["TOKENIZERS_PARALLELISM"] = before
