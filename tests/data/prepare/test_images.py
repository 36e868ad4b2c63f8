"""Image preparation on Ray: the same bytes however it is run or killed, and pictures back from shards."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml

from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest, check_fits
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import _list_in_tasks, held_out, read_pixels
from pipeline.data.shards import ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.models.vq import load_image_tokenizer
from tests.support.data_helpers import data_path, ensure, prepare, run_until, shard_bytes
from tests.support.image_helpers import CLASSES, encoded, make_images, write_folders, write_idx

UNITS = 20
GOLDEN = str(Path(__file__).parents[1] / "llamagen_vq.safetensors")  # factor 4, 64 codes


def make_tree(storage: Path, **data: object) -> dict[str, object]:
    data = {"kind": "image", "validation_images": 100, "shard_rows": 500, "codes": 64, **data}
    return {
        "name": "t",
        "data": data,
        "train": {"batch": 8},
        "sampling": {"steps": 1},
        "cluster": {"storage": str(storage)},
    }


def make_config(storage: Path, **data: object) -> RunConfig:
    return parse(make_tree(storage, **data), "test")


def rows_and_labels(config: RunConfig, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = ShardReader(data_path(config), manifest, split)
    labels = reader.labels(np.arange(len(reader)))
    assert labels is not None
    return reader.rows(np.arange(len(reader))), labels


def all_bytes(config: RunConfig) -> dict[str, bytes]:
    """Every file of the prepared data."""
    folder = Path(data_path(config))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def units_of(config: RunConfig) -> list[Path]:
    return list(Path(data_path(config)).glob("_work-*/unit-*.json"))


def test_tasks_list_files_as_one_process_does(ray_cluster: None, tmp_path: Path) -> None:
    """One of the files is no tar file."""
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(3):
                for suffix, content in (("png", b"x"), ("cls", str(i).encode())):
                    info = tarfile.TarInfo(f"{name}{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (tmp_path / "c.tar").write_bytes(b"no tar file")
    data = make_config(tmp_path, source=str(tmp_path / "*.tar"), classes=3).data
    assert data.kind == "image"
    source = open_images(data)
    listing = list_images(source, data, _list_in_tasks)
    assert [ref.label for ref in listing.refs] == [0, 1, 2, 0, 1, 2]
    assert len(listing.problems) == 1
    assert listing == list_images(source, data)


@pytest.mark.slow
def test_the_same_bytes_however_often_killed(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of four encoders, killed and finished by two, against one of one that was left alone."""
    settings = {
        "source": write_idx(tmp_path / "idx", *make_images(UNITS * 256)),
        "classes": CLASSES,
        "fit_images": 500,
        "flip": True,
        "shard_rows": 2000,
    }
    tree = make_tree(tmp_path / "killed", **settings)
    config, file = parse(tree, "test"), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**tree, "data": {**config.data.model_dump(), "encoders": 4}}))
    folder = Path(data_path(config))
    run_until(file, ray.get_runtime_context().gcs_address, lambda: len(units_of(config)) >= 3)
    assert len(units_of(config)) < UNITS, "killed too late to show anything"
    assert not shard_bytes(str(folder))
    assert not (folder / "tokenizer").exists()
    (work,) = folder.glob("_work-*")
    shutil.copytree(work / "tokenizer", tmp_path / "fitted")

    straight = make_config(tmp_path / "straight", **settings)
    manifest = ensure(straight)
    check_rows(straight, manifest)
    done = len(units_of(config))
    with caplog.at_level("INFO"):
        assert prepare(make_config(tmp_path / "killed", **settings, encoders=2)) == manifest
    assert f"{done} of {UNITS} units were encoded before" in caplog.text
    assert all_bytes(config) == all_bytes(straight)
    for part in (tmp_path / "fitted").iterdir():
        assert part.read_bytes() == (folder / "tokenizer" / part.name).read_bytes()

    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert sorted(name for name in times if not name.endswith(".parquet")) == ["manifest.json", "tokenizer"]
    assert ensure(config) == prepare(config) == manifest
    assert times == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def check_rows(config: RunConfig, manifest: Manifest) -> None:
    """Rows are BOS and the codes of the images in their order; mirrored training images follow the others."""
    images = UNITS * 256
    pixels = read_pixels(list_images(open_images(config.data), config.data).refs, config.data)
    out = held_out(np.arange(images), 100, images)
    tokenizer = load_image_tokenizer(f"{data_path(config)}/tokenizer", 2, 32, "cpu")
    assert (manifest.vocabulary, manifest.special.bos, manifest.special.eot) == (64, 65, None)
    assert (manifest.length, manifest.grid, manifest.classes) == (17, 4, CLASSES)
    assert (manifest.tokenizer.hash, manifest.documents) == (tokenizer.hash, images)
    assert manifest.rows_per_shard("train") == [2000] * 5 + [2 * (images - 100) - 10_000]
    assert manifest.splits["train"].documents == images - 100
    expected = {
        "train": np.concatenate([pixels.images[~out], pixels.images[~out, :, ::-1]]),
        "validation": pixels.images[out],
    }
    classes = {"train": np.tile(pixels.labels[~out], 2), "validation": pixels.labels[out]}
    for split, wanted in expected.items():
        rows, labels = rows_and_labels(config, manifest, split)
        assert (rows[:, 0] == 65).all()
        assert np.array_equal(rows[:, 1:], tokenizer.encode(wanted))
        assert np.array_equal(labels, classes[split])
        assert np.abs(tokenizer.decode(rows[:, 1:].astype(np.int64)) - wanted.astype(float)).mean() < 16
    check_fits(manifest, config)


def test_held_out_images_are_spread_evenly() -> None:
    for images, validation in ((1797, 100), (10, 9), (10, 1), (1_281_167, 50_000)):
        out = held_out(np.arange(images), validation, images)
        assert out.sum() == validation
        gaps = np.diff(np.flatnonzero(out))
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def spoilt_folders(folder: Path) -> tuple[str, Path]:
    """60 images of 16 x 16, one of them half a JPEG."""
    source = write_folders(folder, *make_images(60, side=16))
    broken = folder / "class_1" / "00007.jpg"
    whole = encoded(make_images(1, side=64)[0][0], "JPEG")
    broken.write_bytes(whole[: len(whole) // 2])
    broken.with_suffix(".png").unlink()
    return source, broken


SPOILT = {"size": 16, "factor": 4, "classes": CLASSES, "validation_images": 20}


def test_a_spoilt_image_is_fatal(ray_cluster: None, tmp_path: Path) -> None:
    source, broken = spoilt_folders(tmp_path / "images")
    settings = {**SPOILT, "source": source, "codes": 8, "fit_images": 2}
    config = make_config(tmp_path, **settings)
    with pytest.raises(DataError, match=rf"data.source: {broken}: OSError: .*truncated.*data.on_error: skip"):
        prepare(config)
    assert not [name for name in os.listdir(data_path(config)) if not name.startswith("_work-")]
    (tmp_path / "images" / "class_3").mkdir()
    with pytest.raises(DataError, match=r"class_3: no image in this class; expected .*data.on_error: skip"):
        prepare(make_config(tmp_path, **{**settings, "classes": 4}))


@pytest.mark.slow
def test_spoilt_images_are_skipped_and_a_network_encodes_the_others(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Codes are the network's on batches of one shape; leaving one out moves no other between the splits."""
    source, broken = spoilt_folders(tmp_path / "images")
    (tmp_path / "images" / "class_3").mkdir()
    settings = {**SPOILT, "classes": 4, "tokenizer": GOLDEN, "encode_batch": 8}
    config = make_config(tmp_path, source=source, on_error="skip", **settings)
    manifest = prepare(config)
    assert manifest.class_names == ("class_0", "class_1", "class_2", "class_3")
    assert (manifest.documents, manifest.skipped.count) == (59, 2)
    assert "class_3: no image in this class; expected .jpg" in manifest.skipped.names[0]
    assert manifest.skipped.names[1].startswith(f"{broken}: OSError: ")
    assert (manifest.vocabulary, manifest.special.bos, manifest.grid) == (64, 65, 4)

    pixels = read_pixels(list_images(open_images(config.data), config.data).refs, config.data)
    assert len(pixels.kept) == 59
    out = held_out(pixels.kept, 20, 60)
    train = int((~out).sum())
    tokenizer = load_image_tokenizer(GOLDEN, 4, 8, "cpu")
    codes = tokenizer.encode(np.concatenate([pixels.images[~out], pixels.images[out]]))
    for split, part in (("train", codes[:train]), ("validation", codes[train:])):
        assert np.array_equal(rows_and_labels(config, manifest, split)[0][:, 1:], part)
    saved = load_image_tokenizer(f"{data_path(config)}/tokenizer", 4, 8, "cpu")
    assert saved.hash == tokenizer.hash == manifest.tokenizer.hash
    check_fits(manifest, config)


@pytest.mark.slow
def test_one_encoder_and_four_write_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    one, four = (make_config(tmp_path / str(n), encoders=n) for n in (1, 4))
    assert prepare(one) == prepare(four)
    assert all_bytes(one) == all_bytes(four)


def test_refusals_before_any_image_is_encoded(ray_cluster: None, tmp_path: Path) -> None:
    source = write_idx(tmp_path / "idx", *make_images(20))
    small: dict[str, object] = {"source": source, "classes": CLASSES, "codes": 8}
    with pytest.raises(
        DataError, match=r"data.validation_images: 20 of 20 images would leave none .* less than 20"
    ):
        prepare(make_config(tmp_path, **small, validation_images=20))
    with pytest.raises(DataError, match=r"label \d; expected 0 to 0 \(data.classes\) \(data.on_error: skip"):
        prepare(make_config(tmp_path, **{**small, "classes": 1}))
    with pytest.raises(ConfigError, match=r"data.factor: 2, but a token of .* is 4 pixels .*data.factor=4"):
        prepare(make_config(tmp_path, **small, tokenizer=GOLDEN, validation_images=5))
    with pytest.raises(ConfigError, match=r"data.tokenizer: '.*llamagen_vq.pt' does not exist"):
        prepare(make_config(tmp_path, **small, tokenizer=GOLDEN.replace("safetensors", "pt")))
    with pytest.raises(ConfigError, match=r"data.codes: 5000 codes, but the images have only \d+ different"):
        prepare(make_config(tmp_path, **{**small, "codes": 5000}, validation_images=5))
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_names_follow_contents(tmp_path: Path) -> None:
    base = data_path(make_config(tmp_path))
    same = {"streams": 4, "shuffle_window": 7, "encoders": 4, "encode_batch": 7, "encode_threads": 2}
    assert base == data_path(make_config(tmp_path, **same))
    others: list[dict[str, object]] = [
        {"size": 16},
        {"factor": 4},
        {"codes": 65},
        {"flip": True},
        {"validation_images": 101},
        {"fit_images": 99},
        {"classes": 11},
        {"shard_rows": 7},
        {"source": "x"},
        {"on_error": "skip"},
        {"tokenizer": GOLDEN},
        {"tokenizer": GOLDEN, "encode_batch": 7},
    ]
    names = {data_path(make_config(tmp_path, **other)) for other in others}
    assert len(names | {base}) == len(others) + 1
    assert Path(base).name.startswith("digits-patch-8-")
    weights = tmp_path / "llamagen_vq.safetensors"
    shutil.copy(GOLDEN, weights)
    copied = data_path(make_config(tmp_path, tokenizer=str(weights)))
    assert copied == data_path(make_config(tmp_path, tokenizer=GOLDEN))  # its content counts, not its place
