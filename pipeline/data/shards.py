"""The format of prepared data: Parquet files of token rows."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, Integer, UInt

from pipeline import storage
from pipeline.data.manifest import Manifest, ShardFile
from pipeline.errors import DataError
from pipeline.models.batch import Roles


class Rows(NamedTuple):
    """Rows of a shard.

    Attributes:
        tokens: the rows.
        labels: their classes; None: rows have none.
        roles: their given tokens and padding; None: rows have neither.
    """

    tokens: UInt[np.ndarray, "n L"]
    labels: Integer[np.ndarray, "n"] | None = None
    roles: Roles | None = None

    def take(self, chosen: Integer[np.ndarray, "m"] | slice) -> "Rows":
        """Select rows.

        Args:
            chosen: indices, or a slice.
        """
        tokens, labels, roles = self
        return Rows(
            tokens[chosen],
            None if labels is None else labels[chosen],
            None if roles is None else roles.rows(chosen),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Rows"]) -> "Rows":
        """Join rows that have the same fields.

        Args:
            parts: one after the other.
        """
        tokens, labels, roles = zip(*parts, strict=True)
        return cls(
            np.concatenate(tokens),
            None if labels[0] is None else np.concatenate(labels),
            None if roles[0] is None else Roles.concatenate(roles),
        )


def token_dtype(ids: int) -> np.dtype:
    """Return the smallest unsigned little-endian dtype that holds 0..ids-1.

    Args:
        ids: number of ids.
    """
    return np.min_scalar_type(ids - 1).newbyteorder("<")


def encode_shard(rows: Rows) -> tuple[bytes, str]:
    """Encode rows as a Parquet file, whose bytes depend on the rows alone.

    Args:
        rows: with their labels and roles, where they have any.

    Returns:
        The bytes and their SHA-256.
    """
    tokens, labels, roles = rows
    columns = {"tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens.shape[1])}
    given, lengths = (None, None) if roles is None else (roles.given, roles.lengths)
    counts = {"label": labels, "given": given, "length": lengths}
    columns |= {name: pa.array(values.astype("<i4")) for name, values in counts.items() if values is not None}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    return data, hashlib.sha256(data).hexdigest()


def publish_shard(name: str, path: str, work: str, make: Callable[[], Rows]) -> ShardFile:
    """Write one shard and a record of its hash; if both exist and agree, do nothing.

    Args:
        name: of the file.
        path: folder of the shards.
        work: folder of the records.
        make: returns the rows.

    Returns:
        What the manifest says of the shard.
    """
    target, record = storage.join(path, name), storage.join(work, f"{name}.json")
    if storage.exists(record) and storage.exists(target):
        file = ShardFile.model_validate_json(storage.read_bytes(record))
        if storage.sha256(target) == file.sha256:
            return file
    rows = make()
    data, digest = encode_shard(rows)
    storage.publish_bytes(target, data)
    histogram = None if rows.roles is None else tuple(np.bincount(rows.roles.lengths).tolist())
    file = ShardFile(name=name, rows=len(rows.tokens), sha256=digest, row_lengths=histogram)
    storage.publish_text(record, file.model_dump_json())
    return file


class ShardReader:
    """Reads rows of one split by their index; decoded shards are kept while memory allows.

    Args:
        path: folder of the shards.
        manifest: its manifest.
        split: "train" or "validation".
        cache_bytes: bound on decoded shards held; the newest one is always kept.
    """

    def __init__(self, path: str, manifest: Manifest, split: str, cache_bytes: int = 1 << 30) -> None:
        self._path, self._manifest = path, manifest
        self.length = manifest.length
        self._labelled, self._padded = manifest.classes is not None, manifest.padded
        self._dtype = token_dtype(manifest.ids)
        self._files = manifest.split(split).files
        self._starts = np.cumsum([0, *(file.rows for file in self._files)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._limit = cache_bytes
        self._verified: set[int] = set()
        self._lock = threading.Lock()  # training reads ahead in a thread

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Integer[np.ndarray, "n"]) -> Rows:
        """Read rows with all that belongs to them, in any order.

        Args:
            indices: of the rows in the split.

        Returns:
            The rows in the order of the indices.

        Raises:
            DataError: as `rows`.
            IndexError: as `rows`.
        """
        return Rows(self.rows(indices), self.labels(indices), self.roles(indices))

    def rows(self, indices: Integer[np.ndarray, "n"]) -> UInt[np.ndarray, "n L"]:
        """Read rows in any order.

        Args:
            indices: of the rows in the split.

        Returns:
            The rows in the order of the indices.

        Raises:
            DataError: a file is missing or differs from its SHA-256 in the manifest.
            IndexError: an index is outside the split.
        """
        return self._gather("tokens", indices, np.empty((len(indices), self.length), self._dtype))

    def labels(self, indices: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"] | None:
        """Read the labels of rows in any order.

        Args:
            indices: of the rows in the split.

        Returns:
            The labels in the order of the indices; None where rows have none.

        Raises:
            DataError: as `rows`.
            IndexError: as `rows`.
        """
        return self._gather("label", indices, np.empty(len(indices), np.int64)) if self._labelled else None

    def roles(self, indices: Integer[np.ndarray, "n"]) -> Roles | None:
        """Read how many tokens of rows are given and how many are real, in any order.

        Args:
            indices: of the rows in the split.

        Returns:
            The numbers in the order of the indices; None where rows have neither given tokens nor padding.

        Raises:
            DataError: as `rows`.
            IndexError: as `rows`.
        """
        if not self._padded:
            return None
        names = ("given", "length")
        return Roles(*(self._gather(name, indices, np.empty(len(indices), np.int64)) for name in names))

    def _gather(self, name: str, indices: Integer[np.ndarray, "n"], out: np.ndarray) -> np.ndarray:
        """Fill `out` with the values of rows in a column."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a split of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        with self._lock:
            for shard in np.unique(shards).tolist():
                column = self._shard(shard).column(name).chunk(0)
                values = column.values if name == "tokens" else column
                chosen = shards == shard
                rows = indices[chosen] - self._starts[shard]
                out[chosen] = values.to_numpy().reshape(-1, *out.shape[1:])[rows]
        return out

    def _shard(self, number: int) -> pa.Table:
        """Return a decoded shard, from memory if it is kept there."""
        if number not in self._cache:
            self._cache[number] = self._load(self._files[number], verify=number not in self._verified)
            self._verified.add(number)
        self._cache.move_to_end(number)
        while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > self._limit:
            self._cache.popitem(last=False)
        return self._cache[number]

    def _load(self, file: ShardFile, verify: bool) -> pa.Table:
        """Read and decode a shard, with its hash compared to the manifest's if `verify` is set."""
        path = self._manifest.shard_path(self._path, file)
        try:
            data = storage.read_cached(path, file.sha256)
        except FileNotFoundError:
            raise DataError(f"{path}: shard is missing; remove the folder and prepare it again") from None
        if verify and (actual := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise DataError(
                f"{path}: shard is damaged ({len(data)} bytes): SHA-256 {actual[:12]}..., the manifest has "
                f"{file.sha256[:12]}...; remove the folder and prepare it again"
            )
        return pq.read_table(pa.BufferReader(data)).combine_chunks()
