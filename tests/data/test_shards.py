"""Shards: bytes that follow from the tokens, hashes that find damage, refusals that name every difference."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import SIZES, L, make_shards, write_ranks

from pipeline import storage
from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.shards import MANIFEST, Manifest, ShardReader, check_fits, encode_shard, token_dtype
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError


def fitting(manifest: Manifest) -> Manifest:
    """The same, as if prepared with the bytes tokenizer."""
    tokenizer = load_tokenizer("bytes")
    changes = {
        "vocabulary": tokenizer.vocab_size,
        "special": manifest.special.model_copy(update={"eot": tokenizer.eot}),
        "tokenizer": manifest.tokenizer.model_copy(update={"name": "bytes", "hash": tokenizer.hash}),
    }
    return manifest.model_copy(update=changes)


def make_config(data: dict[str, object], batch: int = 8) -> RunConfig:
    tree = {"name": "t", "data": data, "train": {"batch": batch}, "sampling": {"steps": 1}}
    return parse(tree, "test")


def test_smallest_dtype() -> None:
    assert [token_dtype(v).str for v in (2, 256, 257, 65_536, 65_537)] == ["|u1", "|u1", "<u2", "<u2", "<u4"]


def test_rows_in_any_order(tmp_path: Path) -> None:
    reader = ShardReader(str(tmp_path), make_shards(tmp_path, SIZES), "train")
    indices = np.array([176, 0, 39, 40, 0, 100])
    np.testing.assert_array_equal(reader.rows(indices), indices[:, None] + np.arange(L))
    assert reader.rows(indices).dtype == np.uint16
    assert len(reader) == 177
    assert reader.rows(np.array([], dtype=np.int64)).shape == (0, L)
    for bad in (-1, 177):
        with pytest.raises(IndexError, match="177"):
            reader.rows(np.array([bad]))


def test_memory_is_bounded(tmp_path: Path) -> None:
    one = SIZES[0] * L * 2
    reader = ShardReader(str(tmp_path), make_shards(tmp_path, SIZES), "train", cache_bytes=2 * one)
    for index in range(0, 177, 20):
        assert reader.rows(np.array([index]))[0, 0] == index
        assert sum(rows.nbytes for rows in reader._cache.values()) <= 2 * one


def test_remote_shards(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, SIZES)
    storage.publish_folder(tmp_path, "memory://remote-shards")
    reader = ShardReader("memory://remote-shards", manifest, "train")
    assert reader.rows(np.array([50]))[0, 0] == 50


def test_equal_tokens_equal_bytes() -> None:
    tokens = np.random.default_rng(0).integers(0, 257, (100, 64)).astype("<u2")
    assert encode_shard(tokens) == encode_shard(tokens.copy())
    assert encode_shard(tokens)[1] != encode_shard(tokens[::-1].copy())[1]


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, SIZES)
    file = tmp_path / "train-00001.parquet"
    whole = file.read_bytes()
    for spoilt in (whole[:-9], bytes([whole[0] ^ 1]) + whole[1:], b""):
        file.write_bytes(spoilt)
        reader = ShardReader(str(tmp_path), manifest, "train")
        assert reader.rows(np.array([0]))[0, 0] == 0  # other shards are fine
        for _ in range(2):  # no second chance
            with pytest.raises(DataError, match=r"train-00001.parquet: shard is damaged"):
                reader.rows(np.array([0, 45]))
    file.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet: shard is missing"):
        ShardReader(str(tmp_path), manifest, "train").rows(np.array([45]))
    with pytest.raises(DataError, match=r"no split 'trian'.*did you mean 'train'"):
        ShardReader(str(tmp_path), manifest, "trian")


def test_manifest_round_trip_and_damage(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, SIZES)
    with pytest.raises(DataError, match=r"no manifest.json"):
        Manifest.read(str(tmp_path))
    storage.publish_text(str(tmp_path / MANIFEST), manifest.model_dump_json())
    assert Manifest.read(str(tmp_path)) == manifest
    assert (manifest.rows("train"), manifest.rows_per_shard("train")) == (177, SIZES)
    storage.publish_text(str(tmp_path / MANIFEST), manifest.model_dump_json()[:-30])
    with pytest.raises(DataError, match=r"manifest.json: damaged"):
        Manifest.read(str(tmp_path))


def test_data_that_fits(tmp_path: Path) -> None:
    check_fits(fitting(make_shards(tmp_path, SIZES)), make_config({"length": L}))


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    ranks = write_ranks(tmp_path / "small.tiktoken")
    manifest = fitting(make_shards(tmp_path, SIZES))
    config = make_config({"length": 9, "wrap": "bos_eos", "tokenizer": ranks}, batch=184)
    with pytest.raises(DataError) as caught:
        check_fits(manifest, config)
    message = str(caught.value)
    for part in (
        "data.length: the data has 5, the config 9",
        "data.wrap: the data has 'none', the config 'bos_eos'",
        "data.tokenizer (vocabulary): the data has 257, the config 263",
        "data.tokenizer (hash): the data has 'bytes ",
        "train.batch: 184 rows, but the data has 177",
    ):
        assert part in message
