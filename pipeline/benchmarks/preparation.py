"""Speed of text preparation on one core beside plain tokenisers, and how long training waits for its rows."""

import base64
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import environ
from pathlib import Path
from typing import Any

import tiktoken

from pipeline.benchmarks.roofline import clock
from pipeline.config.benchmark import BenchmarkConfig, PreparationConfig
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.text import cached_tokenizer, describe, plan_splits, row_maker, tokenise_unit
from pipeline.data.prepare.text_sources import TextSource, open_source, read
from pipeline.data.reading_order import ReadingOrder, batches
from pipeline.data.shards import ShardReader, publish_shard
from pipeline.data.tokenizers import PATTERN, RANK_FILE, BPETokenizer

PIPELINE, TIKTOKEN, DATASETS = "tokenise + pack + write", "tiktoken alone", "datasets.map"


@dataclass(frozen=True)
class PreparationSpeed:
    """Speed of text preparation on one core.

    Attributes:
        tokenizer: its name.
        megabytes: of UTF-8 text.
        tokens: ends of documents included.
        seconds: of every form, one per turn; tiktoken and datasets.map only tokenise, in memory.
        note: what was not measured, and why.
    """

    tokenizer: str
    megabytes: float
    tokens: int
    seconds: Mapping[str, Sequence[float]]
    note: str = ""

    def ratio(self, form: str) -> float:
        """Return how many times as fast as another form this pipeline is, as a median over turns."""
        pairs = zip(self.seconds[form], self.seconds[PIPELINE], strict=True)
        return statistics.median(other / pipeline for other, pipeline in pairs)

    def rate(self, form: str) -> float:
        """Return the tokens per second of a form."""
        return self.tokens / statistics.median(self.seconds[form])


def measure_preparation(settings: PreparationConfig, config: BenchmarkConfig) -> PreparationSpeed:
    """Time the preparation of a JSON Lines file, and tokenisers alone on the same texts in memory, in turn.

    Args:
        settings: tokenizer and size of the text, which repeats the embedded corpus.
        config: has the length of a row, the number of measurements of each form, and the clock.

    Returns:
        The seconds of all forms.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    # The `tokenizers` library gets one thread.
    with tempfile.TemporaryDirectory() as folder, _one_core():
        data = _corpus(Path(folder), settings.tokenizer, settings.megabytes, config.length)
        source, known = open_source(data), cached_tokenizer(settings.tokenizer)
        texts = [str(text) for unit in source.units for piece in unit for text in read(piece, data)]
        forms: dict[str, Callable[[Path], object]] = {PIPELINE: lambda into: _prepare(data, source, into)}
        note = f"{known.name} has no ranks on GPT-2's words, so there is nothing to compare with"
        if isinstance(known, BPETokenizer) and known.pattern == PATTERN:
            note, ranks = "", _ranks(known)
            forms |= {TIKTOKEN: _tiktoken_alone(ranks, texts), DATASETS: _datasets_map(ranks, texts)}
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        tokens, now = 0, clock(config.clock)
        for turn in range(config.repetitions + 1):  # the first warms up
            for form, run in forms.items():
                with tempfile.TemporaryDirectory() as into:
                    began = now()
                    result = run(Path(into))
                    if turn:
                        seconds[form].append(now() - began)
                    if isinstance(result, Manifest):
                        tokens = result.tokens
    size = sum(len(text.encode()) for text in texts) / 1e6
    return PreparationSpeed(known.name, size, tokens, seconds=seconds, note=note)


def data_wait(step: Callable[[], object], config: BenchmarkConfig) -> float:
    """Measure the share of time in which training waits for rows, which are read ahead from shards on disk.

    Args:
        step: a training step.
        config: has the rows of a step, the tokens of a row, and the number of steps, after one that is not counted.

    Returns:
        The share, from 0 to 1.
    """
    waited = total = 0.0
    batch, steps = config.batch, config.repetitions
    megabytes = batch * (steps + 1) * config.length / 1e6 + 0.5
    with tempfile.TemporaryDirectory() as folder:
        data = _corpus(Path(folder), "bytes", megabytes, config.length)
        manifest = _prepare(data, open_source(data), Path(folder))
        reader = ShardReader(folder, manifest, "train")
        order = ReadingOrder(manifest.rows_per_shard("train"), batch, batch, data.shuffle_window, seed=0)
        rows = batches(reader, order, 0, 0, 1, batch)
        for turn in range(steps + 1):
            began = time.perf_counter()
            next(rows)
            received = time.perf_counter()
            step()
            if turn:
                waited += received - began
                total += time.perf_counter() - began
        rows.close()
    return waited / total


def byte_level_bpe(ranks: Mapping[bytes, int]) -> Any:
    """Convert the ranks of tiktoken for the `tokenizers` library, which merges given pairs instead.

    Args:
        ranks: of all tokens.

    Returns:
        A model of that library that gives the same ids.
    """
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: ranks  # in place of reading a file
    return BPE(*converter.extract_vocab_merges_from_model(""))


def _corpus(folder: Path, tokenizer: str, megabytes: float, length: int) -> TextDataConfig:
    """Write a JSON Lines file that repeats the embedded corpus."""
    file, embedded = folder / "corpus.jsonl", TextDataConfig()
    topics = [str(text) for piece in open_source(embedded).units[0] for text in read(piece, embedded)]
    with file.open("w") as out:
        while out.tell() < megabytes * 1e6:
            out.writelines(json.dumps({"text": text}) + "\n" for text in topics)
    return TextDataConfig(
        source=str(file), tokenizer=tokenizer, length=length, validation_documents=8, shard_rows=1024
    )


def _prepare(data: TextDataConfig, source: TextSource, into: Path) -> Manifest:
    """Prepare all units and shards one after the other in this process."""
    work = str(into / "work")
    units = [tokenise_unit(unit, data, work) for unit in enumerate(source.units)]
    make, splits = row_maker(units, data, work), {}
    for name, (split, shards) in plan_splits(units, data, work).items():
        files = tuple(
            publish_shard(shard.name, str(into), work, make=partial(make, shard)) for shard in shards
        )
        splits[name] = split.model_copy(update={"files": files})
    return describe(data, source, units, splits, cached_tokenizer(data.tokenizer))


def _tiktoken_alone(ranks: dict[bytes, int], texts: Sequence[str]) -> Callable[[Path], object]:
    """Tokenise in memory with tiktoken."""
    encoding = tiktoken.Encoding("alone", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda _: [encoding.encode_ordinary(text) for text in texts]


def _datasets_map(ranks: dict[bytes, int], texts: Sequence[str]) -> Callable[[Path], object]:
    """Tokenise in memory with the fast tokenizer of the same ranks, in batches, in one process and one thread."""
    import datasets  # takes seconds, as does the next
    import tokenizers

    datasets.disable_progress_bars()
    fast = tokenizers.Tokenizer(byte_level_bpe(ranks))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    data = datasets.Dataset.from_dict({"text": list(texts)})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [encoding.ids for encoding in fast.encode_batch_fast(batch["text"])]}

    return lambda _: data.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)


def _ranks(tokenizer: BPETokenizer) -> dict[bytes, int]:
    """Read the ranks of all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        lines = (Path(folder) / RANK_FILE).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


@contextmanager
def _one_core() -> Iterator[None]:
    """Restrict the `tokenizers` library to one thread."""
    key = "TOKENIZERS_PARALLELISM"
    before = environ.get(key)
    environ[key] = "false"
    try:
        yield
    finally:
        del environ[key]
        if before is not None:
            environ[key] = before
