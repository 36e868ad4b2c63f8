"""Shards: bytes that follow from the tokens, hashes that find damage, refusals that name every difference."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import MANIFEST, Manifest, check_fits
from pipeline.data.shards import Rows, ShardReader, encode_shard, token_dtype
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.data_helpers import SIZES, L, make_shards, write_ranks
from tests.support.small_manifest import small_manifest, write_shard


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


def test_labels_stand_beside_their_rows(tmp_path: Path) -> None:
    reader = ShardReader(str(tmp_path), make_shards(tmp_path, SIZES, classes=7), "train")
    indices = np.array([176, 0, 39, 40, 0, 100])
    labels = reader.labels(indices)
    assert labels is not None
    np.testing.assert_array_equal(labels, indices % 7)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(reader.rows(indices)[:, 0], indices)
    with pytest.raises(IndexError, match="177"):
        reader.labels(np.array([177]))
    unlabelled = ShardReader(str(tmp_path / "x"), make_shards(tmp_path / "x", SIZES), "train")
    assert unlabelled.labels(indices) is None


def test_rows_of_images_hold_a_bos_behind_the_mask(tmp_path: Path) -> None:
    """256 codes fit into a byte, the BOS 257 does not."""
    tokens = np.array([[257, 255, 0]], dtype="<u2")
    file = write_shard(str(tmp_path), "train-00000.parquet", tokens, np.array([3]))
    manifest = small_manifest([file], 3, vocabulary=256, special={"eot": None, "bos": 257}, classes=7)
    reader = ShardReader(str(tmp_path), manifest, "train")
    np.testing.assert_array_equal(reader.rows(np.array([0])), tokens)
    assert reader.rows(np.array([0])).dtype == np.uint16


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
    assert encode_shard(Rows(tokens)) == encode_shard(Rows(tokens.copy()))
    assert encode_shard(Rows(tokens))[1] != encode_shard(Rows(tokens[::-1].copy()))[1]


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


def test_manifests_from_before_images_are_read(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, SIZES)
    old = manifest.model_dump(exclude={"classes", "class_names", "grid"})
    storage.publish_text(str(tmp_path / MANIFEST), json.dumps(old))
    assert Manifest.read(str(tmp_path)) == manifest


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


def test_every_difference_of_images_is_named_at_once(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, SIZES, classes=3).model_copy(
        update={"length": 17, "vocabulary": 128, "grid": 4, "content": {"tokenizer": "patch"}}
    )
    check_fits(manifest, make_config({"kind": "image", "classes": 3}))
    file = tmp_path / "vq.pt"
    file.write_bytes(b"weights")
    data = {"kind": "image", "classes": 5, "factor": 1, "tokenizer": str(file)}
    with pytest.raises(DataError) as caught:
        check_fits(manifest, make_config(data, batch=184))
    message = str(caught.value)
    for part in (
        "data.length: the data has 17, the config 65",
        "data.classes: the data has 3, the config 5",
        "data.size / data.factor: the data has 4, the config 8",
        f"data.tokenizer: the data has 'patch', the config '{hashlib.sha256(b'weights').hexdigest()}'",
        "train.batch: 184 rows, but the data has 177",
    ):
        assert part in message
    with pytest.raises(DataError, match=r"data.codes: the data has 128, the config 64"):
        check_fits(manifest, make_config({"kind": "image", "classes": 3, "codes": 64}))
    with pytest.raises(ConfigError, match=r"data.tokenizer: .*vq.tp' does not exist.*did you mean 'vq.pt'\?"):
        check_fits(manifest, make_config({**data, "tokenizer": str(tmp_path / "vq.tp")}))
