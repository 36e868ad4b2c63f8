"""Prepared text and models as preparation and training would leave them, without either."""

from pathlib import Path

import numpy as np

from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import text
from pipeline.data.prepare.text_sources import open_source
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.models import build, model_folder
from pipeline.run import Run
from tests.support.small_manifest import small_manifest, write_shard
from tests.support.small_models import shake


def pydoc_bytes() -> bytes:
    """The embedded corpus."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()


def write_rows(config: RunConfig, rows: int = 300) -> Manifest:
    """A third of `rows` rows of the embedded corpus held out, the others for training."""
    data, path, tokenizer = config.data, Run(config).data_path, ByteTokenizer()
    assert data.kind == "text"
    tokens = np.frombuffer(pydoc_bytes()[: rows * data.length], np.uint8).reshape(rows, data.length)
    files = []
    for split, part in (("train", tokens[: rows // 3 * 2]), ("validation", tokens[rows // 3 * 2 :])):
        files.append(write_shard(path, f"{split}-00000.parquet", part.astype(np.uint16)))
    manifest = small_manifest(
        files,
        data.length,
        vocabulary=tokenizer.vocab_size,
        special={"eot": tokenizer.eot, "bos": None},
        tokenizer={"name": tokenizer.name, "hash": tokenizer.hash},
        source=open_source(data).info,
        content=text.content(data),
        documents=18,
    )
    manifest.publish(path)
    return manifest


def write_model(config: RunConfig, model: ModelConfig, into: Path, length: int | None = None) -> None:
    """A random model of bytes, trained by `config` as its files say."""
    length = length or config.data.length
    facts = model_folder.DataFacts(257, length, None, 256)
    run = config.model_copy(update={"model": model}).model_dump(mode="json")
    tensors = shake(build(model, 257, length)).state_dict()
    model_folder.write(into, model, facts, tensors, model_folder.Background({"step": 8}, run))
    ByteTokenizer().save(into)
