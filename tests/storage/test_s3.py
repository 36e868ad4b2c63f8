"""Storage over the real S3 protocol: whole or absent, patient with what passes, a bounded cache on every node."""

import hashlib
import json
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.manifest import MANIFEST, Manifest
from pipeline.data.shards import Rows, ShardReader, publish_shard
from pipeline.errors import ConfigError, DataError
from pipeline.storage import cache, files, retries
from pipeline.training import checkpoint
from tests.support.object_store import Fault, Store
from tests.support.small_manifest import small_manifest

ROWS, LENGTH = 200, 8


@pytest.fixture
def folder(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh place in the bucket; no faults, short waits, a cache of its own."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 1e-3)
    monkeypatch.setattr(files, "node_folder", lambda: tmp_path / "node")
    store.faults.clear()
    store.requests.clear()
    return f"s3://bucket/{uuid.uuid4().hex}"


def shards(folder: str, count: int) -> Manifest:
    """Shards of known rows, made as preparing makes them: the manifest last."""
    rows = np.arange(count * ROWS * LENGTH, dtype="<u2").reshape(count, ROWS, LENGTH)
    made = tuple(
        publish_shard(f"train-{i:05d}.parquet", folder, f"{folder}/work", lambda i=i: Rows(rows[i]))
        for i in range(count)
    )
    manifest = small_manifest(made, LENGTH)
    storage.publish_text(storage.join(folder, MANIFEST), manifest.model_dump_json())
    return manifest


def finished_checkpoint(local: Path, step: int) -> Path:
    """A folder with what makes a checkpoint complete: one rank's files, their list, the state."""
    state = {"step": step, "epoch": 0, "workers": 1, "config": {}, "run_id": None, "samples": []}
    (local / "zero").mkdir(parents=True)
    (local / "zero" / "rank0.pt").write_bytes(bytes(step % 256 for _ in range(100_000)))
    (local / "state.json").write_text(json.dumps(state))
    names = ["state.json", "zero/rank0.pt"]
    facts = {
        n: [(local / n).stat().st_size, hashlib.sha256((local / n).read_bytes()).hexdigest()] for n in names
    }
    (local / "files_00000.json").write_text(json.dumps({"workers": 1, "step": step, "files": facts}))
    return local


def test_files_and_folders(folder: str, tmp_path: Path) -> None:
    path = storage.join(folder, "deep", "file")
    assert not storage.exists(path)
    assert storage.listing(folder) == []
    storage.publish_bytes(path, b"one")
    storage.publish_text(path, "zwölf")
    assert (storage.read_text(path), storage.size(path)) == ("zwölf", 6)
    storage.check_writable(folder, "cluster.storage")
    made = finished_checkpoint(tmp_path / "made", 1)
    target = storage.join(folder, "model")
    storage.publish_folder(made, target)
    assert storage.folder_complete(target)
    (made / "state.json").unlink()
    storage.publish_folder(made, target)  # replaces: what is gone is gone
    assert storage.listing(target) == [storage.COMPLETE, "files_00000.json", "zero"]
    assert (storage.fetch(target) / "zero" / "rank0.pt").stat().st_size == 100_000
    storage.remove(folder)
    assert storage.listing(folder) == []


@pytest.mark.parametrize(("answer", "times"), [(500, 3), (503, 3), (0, 2)])
def test_an_upload_survives_transient_errors(folder: str, store: Store, answer: int, times: int) -> None:
    """A 500, a SlowDown and a broken connection, each in the middle of the body."""
    path = storage.join(folder, "file")
    data = np.random.default_rng(0).bytes(300_000)
    store.faults.append(Fault(r"^PUT .*/file", answer, times))
    storage.publish_bytes(path, data)
    assert store.faults[0].times == 0
    assert storage.read_bytes(path) == data
    store.faults.append(Fault(r"^(GET|HEAD) .*/file", answer, times))
    assert storage.read_bytes(path) == data
    assert storage.exists(path)


def test_waits_are_longer_where_the_store_is_overloaded(
    folder: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(retries, "FIRST_WAIT", 1.0)
    store.faults += [Fault(r"^PUT .*/a$", 500, 1), Fault(r"^PUT .*/b$", 503, 6)]
    storage.publish_bytes(storage.join(folder, "a"), b"")
    ((after_500,), waits[:]) = (waits, [])  # one wait
    storage.publish_bytes(storage.join(folder, "b"), b"")
    assert 0.5 <= after_500 <= 1.5
    assert waits
    assert 2.0 <= waits[0] <= 6.0  # the driver itself has tried five times before


def test_permanent_errors_are_raised_at_once(folder: str, store: Store) -> None:
    path = storage.join(folder, "file")
    store.faults.append(Fault(r"^PUT .*/file", 403, 9))
    with pytest.raises(DataError, match=rf"{path}: the store refuses access .*credentials"):
        storage.publish_bytes(path, b"x")
    assert store.seen("^PUT .*/file") == 1
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)
    assert store.seen("^HEAD .*/file$") == 1
    with pytest.raises(ConfigError, match=r"cluster.storage: .*s3://no-such-bucket"):
        storage.check_writable("s3://no-such-bucket/runs", "cluster.storage")


def test_a_folder_whose_upload_breaks_off_is_not_there(folder: str, store: Store, tmp_path: Path) -> None:
    target = storage.join(folder, "model")
    made = finished_checkpoint(tmp_path / "made", 7)
    storage.publish_folder(made, target)
    store.faults.append(Fault(r"^PUT .*/rank0.pt", 500, 99))
    with pytest.raises(DataError, match=r"model/zero/rank0.pt: cannot be written"):
        storage.publish_folder(made, target)
    assert not storage.folder_complete(target)  # neither the new one nor, any more, the old one
    assert storage.listing(storage.join(target, "zero")) == []
    store.faults.clear()
    storage.publish_folder(made, target)
    assert storage.folder_complete(target)


def test_resume_takes_the_newest_checkpoint_that_is_whole(folder: str, store: Store, tmp_path: Path) -> None:
    for step in (10, 20):
        storage.publish_folder(finished_checkpoint(tmp_path / str(step), step), f"{folder}/step_{step:08d}")
    store.faults.append(Fault(r"^PUT .*step_00000030/zero", 500, 99))
    with pytest.raises(DataError):
        storage.publish_folder(finished_checkpoint(tmp_path / "30", 30), f"{folder}/step_00000030")
    store.faults.clear()
    assert checkpoint.steps(folder) == [10, 20, 30]
    assert checkpoint.newest(folder) == f"{folder}/step_00000020"
    store.faults.append(Fault(r"step_00000020", 500, 3))  # that it did not answer does not make it damaged
    assert checkpoint.latest(folder) == f"{folder}/step_00000020"
    assert checkpoint.steps(folder) == [10, 20, 30]  # reading removes nothing
    checkpoint.remove_after(folder, 20)
    assert checkpoint.steps(folder) == [10, 20]
    assert checkpoint.read_state(f"{folder}/step_00000020").step == 20


def test_shards_come_back_and_only_once_to_a_node(folder: str, store: Store) -> None:
    manifest = shards(folder, 3)
    assert Manifest.read(folder) == manifest
    rows = np.array([599, 0, 200, 401])
    results: list[np.ndarray] = []

    def read() -> None:
        results.append(ShardReader(folder, manifest, "train").rows(rows))

    readers = [threading.Thread(target=read) for _ in range(4)]  # as the workers of a node
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, rows[:, None] * LENGTH + np.arange(LENGTH))
    assert store.seen(r"^GET .*\.parquet$") == 3
    storage.publish_bytes(f"{folder}/train-00001.parquet", b"damaged")
    read()  # the node still has what the manifest means
    broken = manifest.splits["train"].files[1].model_copy(update={"sha256": "0" * 64})
    split = manifest.splits["train"].model_copy(update={"files": (broken,)})
    reader = ShardReader(folder, manifest.model_copy(update={"splits": {"train": split}}), "train")
    with pytest.raises(DataError, match="shard is damaged"):
        reader.rows(np.array([0]))


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(
    folder: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: name.encode() * 100_000 for name in "abcd"}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    for name, data in contents.items():
        storage.publish_bytes(f"{folder}/{name}", data)
    monkeypatch.setenv(cache.LIMIT, str(250_000 / 2**30))
    place = tmp_path / "node" / "shards"

    def read(name: str) -> int:
        """Downloads that reading took."""
        before = store.seen(f"^GET .*/{name}$")
        assert storage.read_cached(f"{folder}/{name}", digests[name]) == contents[name]
        kept = sum(file.stat().st_size for file in place.iterdir())
        assert kept <= 250_000
        return store.seen(f"^GET .*/{name}$") - before

    assert [read(name) for name in "ab"] == [1, 1]
    assert read("a") == 0
    (place / ".part-killed").write_bytes(b"x" * 100_000)  # of a writer that was killed
    assert read("c") == 1  # b goes: a was used since
    assert [read(name) for name in "ac"] == [0, 0]
    assert read("b") == 1
    monkeypatch.setenv(cache.LIMIT, "0.00001")
    assert [read(name) for name in "dd"] == [1, 1]  # too large for any place: read, not kept
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(ConfigError, match=r"PIPELINE_CACHE_GIB: 'much'"):
        storage.read_cached(f"{folder}/d", digests["d"])
