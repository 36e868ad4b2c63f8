"""Prepared text and models as preparation and training would leave them, without either."""

from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.data.manifest import (
    MANIFEST,
    Manifest,
    ShardFile,
    Skipped,
    SourceInfo,
    SpecialIds,
    Split,
    TokenizerInfo,
)
from pipeline.data.prepare import text
from pipeline.data.prepare.text_sources import open_source
from pipeline.data.shards import encode_shard
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.models import build, model_folder
from pipeline.run import Run
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
    splits = {}
    for split, mine in (("train", tokens[: rows // 3 * 2]), ("validation", tokens[rows // 3 * 2 :])):
        shard, digest = encode_shard(mine.astype(np.uint16))
        file = ShardFile(name=f"{split}-00000.parquet", rows=len(mine), sha256=digest)
        storage.publish_bytes(f"{path}/{file.name}", shard)
        splits[split] = Split(files=(file,), documents=9, tokens=mine.size, tokens_dropped=0)
    manifest = Manifest(
        length=data.length,
        vocabulary=tokenizer.vocab_size,
        special=SpecialIds(eot=tokenizer.eot, bos=None),
        wrap="none",
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        source=SourceInfo(name="pydoc", revision=None, fingerprint=open_source(data).fingerprint),
        content=text.content(data),
        content_key="x",
        splits=splits,
        documents=18,
        documents_empty=0,
        tokens=tokens.size,
        skipped=Skipped(count=0, names=()),
    )
    storage.publish_text(f"{path}/{MANIFEST}", manifest.model_dump_json())
    return manifest


def write_model(config: RunConfig, model: ModelConfig, into: Path, length: int | None = None) -> None:
    """A random model of bytes, trained by `config` as its files say."""
    length = length or config.data.length
    facts = model_folder.DataFacts(257, length, None, 256)
    run = config.model_copy(update={"model": model}).model_dump(mode="json")
    tensors = shake(build(model, 257, length)).state_dict()
    model_folder.write(into, model, facts, tensors, model_folder.Background({"step": 8}, run))
    ByteTokenizer().save(into)
