"""Small corpora, rank files and shards that several test modules make, and jobs that are killed."""

import base64
import json
import os
import pydoc_data.topics
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.data import MixedSource, PairDataConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import prepare as preparation
from tests.support.small_manifest import small_manifest, write_shard

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"Document {i}:\nzwölf ☃ {'x' * (i * 7 % 90)}\r\n" for i in range(40)]
MERGES = [b" t", b"he", b" the", b"nd", b"in", b"ing"]
SIZES = [40, 40, 40, 40, 17]  # 177 rows: 7 batches of 24, 9 left over
L = 5


def make_shards(path: Path, sizes: list[int], classes: int | None = None) -> Manifest:
    """Shards in which row r holds r, r + 1, ... and, with classes, has the label r modulo their number."""
    files, first = [], 0
    for number, rows in enumerate(sizes):
        tokens = np.arange(first, first + rows)[:, None] + np.arange(L)
        labels = None if classes is None else tokens[:, 0] % classes
        files.append(write_shard(str(path), f"train-{number:05d}.parquet", tokens.astype("<u2"), labels))
        first += rows
    return small_manifest(files, L, vocabulary=1000, special={"eot": 999, "bos": None}, classes=classes)


def data_path(config: RunConfig) -> str:
    """Return the folder of the config's prepared data."""
    return preparation.data_path(config.data, storage.resolve(config.cluster.storage))


def ensure(config: RunConfig) -> Manifest:
    """Return the manifest of the config's data, prepared first if it is not there."""
    return preparation.ensure(config.data, data_path(config))


def prepare(config: RunConfig) -> Manifest:
    """Prepare the config's data."""
    return preparation.prepare(config.data, data_path(config))


def write_ranks(path: Path, merges: list[bytes] = MERGES) -> str:
    tokens = [bytes([b]) for b in range(256)] + merges
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return str(path)


def lines(documents: list[str] = DOCUMENTS, field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents)).encode()


def write_parquet(path: Path, documents: list[str], rows: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": documents}), path, row_group_size=rows)


def shard_bytes(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix == ".parquet"}


def run_until(config: Path, address: str, done: Callable[[], bool]) -> None:
    """Start jobs.prepare on the Ray at `address`, and kill all of it as soon as `done()`."""
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "jobs.prepare", str(config)]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 180
    try:
        while not done():
            assert job.poll() is None, job.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def write_sentences(file: Path, count: int = 300) -> list[str]:
    """Write a sentence of English a line, as the One Billion Word benchmark has them; return them."""
    words = re.sub(r"[^A-Za-z,. ]", " ", " ".join(pydoc_data.topics.topics.values())).split()
    ends = [0, *(i + 1 for i, word in enumerate(words) if word.endswith(".")), len(words)]
    texts = [" ".join(words[begin:end]) for begin, end in pairwise(ends) if 0 < end - begin < 40][:count]
    file.write_bytes(lines(texts))
    return texts


def sentences(config: RunConfig) -> RunConfig:
    """The same run on padded rows: a short sentence each, beside the run's own data."""
    folder = Path(config.data.path or "")
    file = folder.with_name("sentences.jsonl")
    if not file.exists():
        write_sentences(file)
    update = {
        "source": str(file),
        "wrap": "sentence",
        "length": 48,
        "path": str(folder.with_name("sentences")),
        "validation_documents": 40,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def answers(config: RunConfig) -> RunConfig:
    """The same run on prompts and answers of two sources, which are mixed 3 to 1."""
    folder = Path(config.data.path or "")
    names = ("answers_a", "answers_b")
    for number, file in enumerate(folder.with_name(f"{name}.jsonl") for name in names):
        words = [f"{i * 7 + number:x}" for i in range(60)]
        rows = [{"prompt": f"{number}{word}:", "answer": word[::-1] * (1 + number)} for word in words]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    update = {
        "mix": tuple(
            MixedSource(source=str(folder.with_name(f"{name}.jsonl")), weight=weight)
            for name, weight in zip(names, (3, 1), strict=True)
        ),
        "prompt_field": "prompt",
        "answer_field": "answer",
        "answer_block": 4,
        "wrap": "sentence",
        "length": 16,
        "path": str(folder.with_name("answers")),
        "validation_documents": 10,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def pairs(config: RunConfig) -> RunConfig:
    """The same run on the digits with their descriptions."""
    data = PairDataConfig(
        kind="pair",
        codes=32,
        text_tokenizer="bpe:320",
        caption_length=10,
        validation_images=20,
        streams=config.data.streams,
        shuffle_window=64,
        path=str(Path(config.data.path or "").with_name("pairs")),
    )
    return config.model_copy(update={"data": data})
