"""Rows as image preparation leaves them: BOS, codes, a class each; small enough to make at once."""

from pathlib import Path

import numpy as np

from pipeline import storage
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
from pipeline.data.shards import encode_shard

CODES, CLASSES, SIDE = 12, 3, 4
BOS = CODES + 1  # behind the mask
LENGTH = 1 + SIDE * SIDE


def write(path: Path, rows: int = 200) -> Manifest:
    """Rows whose codes go by their class."""
    splits, rng = {}, np.random.default_rng(0)
    for name, count in (("train", rows), ("validation", 16)):
        labels = rng.integers(CLASSES, size=count)
        tokens = (labels[:, None] * 4 + rng.integers(5, size=(count, LENGTH))) % CODES
        tokens[:, 0] = BOS
        data, digest = encode_shard(tokens.astype("<u1"), labels)
        file = ShardFile(name=f"{name}-00000.parquet", rows=count, sha256=digest)
        storage.publish_bytes(str(path / file.name), data)
        splits[name] = Split(files=(file,), documents=count, tokens=tokens.size, tokens_dropped=0)
    manifest = Manifest(
        length=LENGTH,
        vocabulary=CODES,
        special=SpecialIds(eot=None, bos=BOS),
        wrap="none",
        tokenizer=TokenizerInfo(name="patch", hash="none"),
        source=SourceInfo(name="random", revision=None, fingerprint="random"),
        content={},
        content_key="random",
        splits=splits,
        documents=rows,
        documents_empty=0,
        tokens=rows * LENGTH,
        skipped=Skipped(count=0, names=()),
        classes=CLASSES,
        grid=SIDE,
    )
    storage.publish_text(str(path / MANIFEST), manifest.model_dump_json())
    return manifest
