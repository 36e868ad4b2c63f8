"""The format of prepared data: Parquet files of token rows."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, Integer, UInt

from pipeline import storage
from pipeline.data.manifest import Manifest, ShardFile, token_dtype
from pipeline.errors import DataError

Rows = tuple[np.ndarray, np.ndarray | None]  # tokens [n, L], and labels [n] or None


def encode_shard(
    tokens: UInt[np.ndarray, "n L"], labels: Integer[np.ndarray, "n"] | None = None
) -> tuple[bytes, str]:
    """A Parquet file's bytes and their SHA-256, a function of tokens and labels alone."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens.shape[1])
    columns = {"tokens": column} | ({} if labels is None else {"label": pa.array(labels.astype("<i4"))})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    return data, hashlib.sha256(data).hexdigest()


def publish_shard(name: str, path: str, work: str, make: Callable[[], Rows]) -> ShardFile:
    """Write one shard and a record of its hash; where both are there and agree, do nothing.

    Args:
        name: of the file.
        path: folder of the shards.
        work: folder of the records.
        make: gives tokens [n, L] and labels [n], or None for no labels.
    """
    target, record = storage.join(path, name), storage.join(work, f"{name}.json")
    if storage.exists(record) and storage.exists(target):
        file = ShardFile.model_validate_json(storage.read_bytes(record))
        if storage.sha256(target) == file.sha256:
            return file
    tokens, labels = make()
    data, digest = encode_shard(tokens, labels)
    storage.publish_bytes(target, data)
    file = ShardFile(name=name, rows=len(tokens), sha256=digest)
    storage.publish_text(record, file.model_dump_json())
    return file


@dataclass(frozen=True)
class _Decoded:
    """One shard in memory."""

    tokens: UInt[np.ndarray, "rows L"]
    labels: Int32[np.ndarray, "rows"] | None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.labels is None else self.labels.nbytes)


class ShardReader:
    """Rows of one split by global index; decoded shards are kept while memory allows.

    Args:
        path: folder of the shards.
        manifest: its manifest.
        split: "train" or "validation".
        cache_bytes: bound on decoded shards held; the newest one is always kept.
    """

    def __init__(self, path: str, manifest: Manifest, split: str, cache_bytes: int = 1 << 30) -> None:
        self._path = path
        self.length = manifest.length
        self._labelled = manifest.classes is not None
        self._dtype = token_dtype(manifest.ids)
        self._files = manifest.split(split).files
        self._starts = np.cumsum([0, *(file.rows for file in self._files)])
        self._cache: OrderedDict[int, _Decoded] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._verified: set[int] = set()
        self._lock = threading.Lock()  # training reads ahead in a thread

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Integer[np.ndarray, "n"]) -> UInt[np.ndarray, "n L"]:
        """Rows in the order asked for.

        Raises:
            DataError: a file is missing or differs from its SHA-256 in the manifest.
            IndexError: an index is outside the split.
        """
        out = np.empty((len(indices), self.length), dtype=self._dtype)
        with self._lock:
            for here, shard, within in self._places(indices):
                out[here] = self._decoded(shard).tokens[within]
        return out

    def labels(self, indices: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"] | None:
        """Labels of rows in the order asked for; None where rows have none.

        Raises:
            DataError: as `rows`.
            IndexError: as `rows`.
        """
        if not self._labelled:
            return None
        out = np.empty(len(indices), dtype=np.int64)
        with self._lock:
            for here, shard, within in self._places(indices):
                labels = self._decoded(shard).labels
                assert labels is not None, self._files[shard]
                out[here] = labels[within]
        return out

    def _places(self, indices: Integer[np.ndarray, "n"]) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Of each shard asked for: which of the indices are its, its number, their rows within it."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a split of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            yield here, int(shard), indices[here] - self._starts[shard]

    def _decoded(self, shard: int) -> _Decoded:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        self._cache[shard] = self._load(self._files[shard], verify=shard not in self._verified)
        self._verified.add(shard)
        while len(self._cache) > 1 and sum(rows.nbytes for rows in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return self._cache[shard]

    def _load(self, file: ShardFile, verify: bool) -> _Decoded:
        path = storage.join(self._path, file.name)
        try:
            data = storage.read_cached(path, file.sha256)
        except FileNotFoundError:
            raise DataError(f"{path}: shard is missing; remove the folder and prepare it again") from None
        if verify and (found := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise DataError(
                f"{path}: shard is damaged ({len(data)} bytes): SHA-256 {found[:12]}..., the manifest has "
                f"{file.sha256[:12]}...; remove the folder and prepare it again"
            )
        table = pq.read_table(pa.BufferReader(data))
        tokens = table.column("tokens").combine_chunks().values.to_numpy().reshape(file.rows, self.length)
        return _Decoded(tokens, table.column("label").to_numpy() if self._labelled else None)
