"""Rows as image preparation leaves them: BOS, codes, a class each; small enough to make at once."""

from pathlib import Path

import numpy as np

from pipeline.data.manifest import Manifest
from tests.support.small_manifest import small_manifest, write_shard

CODES, CLASSES, SIDE = 12, 3, 4
BOS = CODES + 1  # behind the mask
LENGTH = 1 + SIDE * SIDE


def write(path: Path, rows: int = 200) -> Manifest:
    """Rows whose codes go by their class."""
    files, rng = [], np.random.default_rng(0)
    for split, count in (("train", rows), ("validation", 16)):
        labels = rng.integers(CLASSES, size=count)
        tokens = (labels[:, None] * 4 + rng.integers(5, size=(count, LENGTH))) % CODES
        tokens[:, 0] = BOS
        files.append(write_shard(str(path), f"{split}-00000.parquet", tokens.astype("<u1"), labels))
    manifest = small_manifest(
        files,
        LENGTH,
        vocabulary=CODES,
        special={"eot": None, "bos": BOS},
        tokenizer={"name": "patch", "hash": "none"},
        classes=CLASSES,
        grid=SIDE,
    )
    manifest.publish(str(path))
    return manifest
