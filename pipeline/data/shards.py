"""The format of prepared data: Parquet files of token rows, and the manifest that describes them."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Integer, UInt
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError, did_you_mean

MANIFEST = "manifest.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpecialIds(_Frozen):
    """Ids with a meaning of their own; `bos` is None where rows have no BOS."""

    eot: int | None
    bos: int | None


class TokenizerInfo(_Frozen):
    """Which tokenizer made the ids; `hash` decides, `name` is for people."""

    name: str
    hash: str


class SourceInfo(_Frozen):
    """Where the documents came from; `fingerprint` is over the names and sizes of what was read."""

    name: str
    revision: str | None
    fingerprint: str


class ShardFile(_Frozen):
    """One Parquet file."""

    name: str
    rows: int
    sha256: str


class Split(_Frozen):
    """One split; `tokens` count documents' ends too, `tokens_dropped` of them did not fill a last row."""

    files: tuple[ShardFile, ...]
    documents: int
    tokens: int
    tokens_dropped: int


class Skipped(_Frozen):
    """Documents or rests of files that could not be read (`data.on_error: skip`); names of the first ones."""

    count: int
    names: tuple[str, ...]


class Manifest(_Frozen):
    """What a folder of shards holds. Written last: a folder that has one is complete.

    Attributes:
        length: L.
        vocabulary: V, without any mask.
        content: every key of the config that determined the contents.
        content_key: SHA-256 of `content`.
    """

    length: int
    vocabulary: int
    special: SpecialIds
    wrap: str
    tokenizer: TokenizerInfo
    source: SourceInfo
    content: dict[str, Any]
    content_key: str
    splits: dict[str, Split]
    documents: int
    documents_empty: int
    tokens: int
    skipped: Skipped

    @classmethod
    def read(cls, path: str) -> "Manifest":
        """The manifest of the folder `path`.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = storage.join(path, MANIFEST)
        if not storage.exists(file):
            raise DataError(
                f"{path}: no {MANIFEST}, so no complete data; `python -m jobs.prepare CONFIG` makes it"
            )
        try:
            return cls.model_validate_json(storage.read_bytes(file))
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
                "remove the folder and prepare it again"
            ) from None

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"no split {name!r} in the data; known: {known}{did_you_mean(name, self.splits)}")
        return self.splits[name]

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return sum(file.rows for file in self.split(split).files)

    def rows_per_shard(self, split: str) -> list[int]:
        """Rows of every file of a split, in order."""
        return [file.rows for file in self.split(split).files]


def token_dtype(vocabulary: int) -> np.dtype:
    """Smallest unsigned little-endian dtype that holds 0..V-1."""
    return np.min_scalar_type(vocabulary - 1).newbyteorder("<")


def encode_shard(tokens: UInt[np.ndarray, "n L"]) -> tuple[bytes, str]:
    """A Parquet file's bytes and their SHA-256, a function of the tokens alone."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens.shape[1])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"tokens": column}), sink, compression="zstd", use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    return data, hashlib.sha256(data).hexdigest()


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
        self._dtype = token_dtype(manifest.vocabulary)
        self._files = manifest.split(split).files
        self._starts = np.cumsum([0, *(file.rows for file in self._files)])
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
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
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a split of {len(self)}")
        out = np.empty((len(indices), self.length), dtype=self._dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        with self._lock:
            for shard in np.unique(shards):
                here = shards == shard
                out[here] = self._decoded(int(shard))[indices[here] - self._starts[shard]]
        return out

    def _decoded(self, shard: int) -> UInt[np.ndarray, "rows L"]:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        self._cache[shard] = self._load(self._files[shard], verify=shard not in self._verified)
        self._verified.add(shard)
        while len(self._cache) > 1 and sum(rows.nbytes for rows in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return self._cache[shard]

    def _load(self, file: ShardFile, verify: bool) -> UInt[np.ndarray, "rows L"]:
        path = storage.join(self._path, file.name)
        try:
            data = storage.fetch(path).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: shard is missing; remove the folder and prepare it again") from None
        if verify and (found := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise DataError(
                f"{path}: shard is damaged ({len(data)} bytes): SHA-256 {found[:12]}..., the manifest has "
                f"{file.sha256[:12]}...; remove the folder and prepare it again"
            )
        column = pq.read_table(pa.BufferReader(data)).column("tokens").combine_chunks()
        return column.values.to_numpy().reshape(file.rows, self.length)


def check_fits(manifest: Manifest, config: RunConfig) -> None:
    """Refuse data that training with this config could not use.

    Raises:
        DataError: every field that differs, with the data's value and the config's.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    pairs = {
        "data.length": (manifest.length, config.data.length),
        "data.wrap": (manifest.wrap, config.data.wrap),
        "data.tokenizer (vocabulary)": (manifest.vocabulary, tokenizer.vocab_size),
        "data.tokenizer (end of text)": (manifest.special.eot, tokenizer.eot),
        "data.tokenizer (hash)": (
            f"{manifest.tokenizer.name} {manifest.tokenizer.hash[:12]}",
            f"{tokenizer.name} {tokenizer.hash[:12]}",
        ),
    }
    if manifest.tokenizer.hash == tokenizer.hash:
        del pairs["data.tokenizer (hash)"]  # the same ids under another name are welcome
    found = [
        f"{key}: the data has {has!r}, the config {wants!r}"
        for key, (has, wants) in pairs.items()
        if has != wants
    ]
    if (rows := manifest.rows("train")) < config.train.batch:
        found.append(
            f"train.batch: {config.train.batch} rows, but the data has {rows}; expected at most {rows}"
        )
    if found:
        raise DataError("the data does not fit the config:\n" + "\n".join(f"  {line}" for line in found))
