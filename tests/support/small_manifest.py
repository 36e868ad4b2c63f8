"""The shards and the manifest of data that tests make themselves, without a preparation."""

from collections.abc import Sequence

import numpy as np

from pipeline import storage
from pipeline.data.manifest import Manifest, ShardFile
from pipeline.data.shards import Rows, encode_shard
from pipeline.models.batch import Roles


def write_shard(
    folder: str,
    name: str,
    tokens: np.ndarray,
    labels: np.ndarray | None = None,
    roles: Roles | None = None,
) -> ShardFile:
    """Write one shard.

    Args:
        folder: path or URL.
        name: of the file: its split, "-" and its number.
        tokens: [n, L].
        labels: [n], or None.
        roles: of the rows, or None.
    """
    data, digest = encode_shard(Rows(tokens, labels, roles))
    storage.publish_bytes(storage.join(folder, name), data)
    return ShardFile(name=name, rows=len(tokens), sha256=digest)


def small_manifest(files: Sequence[ShardFile] = (), length: int = 8, **fields: object) -> Manifest:
    """Return the manifest of shards; what is not given has a value that means nothing.

    Args:
        files: the shards of all splits, in order.
        length: L.
        fields: of the manifest, in place of what follows from the files.
    """
    by_split: dict[str, list[ShardFile]] = {"train": []}
    for file in files:
        by_split.setdefault(file.name.partition("-")[0], []).append(file)
    rows = {split: sum(file.rows for file in part) for split, part in by_split.items()}
    splits = {
        split: {
            "files": part,
            "documents": rows[split],
            "tokens": rows[split] * length,
            "tokens_dropped": 0,
        }
        for split, part in by_split.items()
    }
    defaults = {
        "length": length,
        "vocabulary": 60_000,
        "special": {"eot": None, "bos": None},
        "wrap": "none",
        "tokenizer": {"name": "t", "hash": "t"},
        "source": {"name": "s", "revision": None, "fingerprint": "f"},
        "content": {},
        "content_key": "k",
        "splits": splits,
        "documents": sum(rows.values()),
        "documents_empty": 0,
        "tokens": sum(rows.values()) * length,
        "skipped": {"count": 0, "names": ()},
    }
    return Manifest.model_validate({**defaults, **fields})
