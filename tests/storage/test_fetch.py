"""Copies of remote files on a node: made once, by whichever process is first, and removed when nobody uses them."""

import os
import threading
import time
import uuid
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import DataError
from pipeline.storage import cache, files, retries
from tests.support.object_store import Fault, Store
from tests.support.rounds import at_once, fetched

NAMES = ["zero/a.pt", "zero/b.pt", "state.json"]


@pytest.fixture
def remote(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder in the bucket with NAMES; no faults, short waits, a node folder of its own."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 1e-3)
    monkeypatch.setattr(files, "node_folder", lambda: tmp_path / "node")
    store.faults.clear()
    store.requests.clear()
    return folder_of(NAMES)


def folder_of(names: list[str]) -> str:
    folder = f"s3://bucket/{uuid.uuid4().hex}/step"
    for name in names:
        storage.publish_bytes(f"{folder}/{name}", name.encode() * 1000)
    return folder


def copies(tmp_path: Path) -> set[str]:
    """Names of the folders that hold copies on this node."""
    return {path.name for path in (tmp_path / "node").iterdir() if not path.name.startswith(".")}


def test_processes_that_fetch_at_the_same_time_download_every_file_once(remote: str, store: Store) -> None:
    local: list[Path] = []
    threads = [threading.Thread(target=lambda: local.append(storage.fetch(remote))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(local) == 8
    assert len(set(local)) == 1
    assert [(local[0] / name).read_bytes() for name in NAMES] == [name.encode() * 1000 for name in NAMES]
    assert store.seen(r"^GET .*/(a.pt|b.pt|state.json)$") == len(NAMES)


def test_processes_fetch_without_a_fault(remote: str, tmp_path: Path) -> None:
    tasks = [(folder_of(["a.txt", *NAMES]), str(tmp_path)) for _ in range(5)]
    assert at_once(fetched, tasks, 3) == [["a.txt" * 1000] * 3] * 5


def test_a_process_gets_the_files_that_it_needs(remote: str, store: Store) -> None:
    local = storage.fetch(remote, lambda name: name != "zero/b.pt")
    assert sorted(str(file.relative_to(local)) for file in local.rglob("*.*")) == ["state.json", "zero/a.pt"]
    assert (
        storage.fetch(remote) == local
    )  # another one needs all of them, and downloads the one that is missing
    assert (local / "zero" / "b.pt").exists()
    assert store.seen(r"^GET .*/(a.pt|b.pt|state.json)$") == len(NAMES)


def test_copies_that_nobody_used_for_a_while_are_removed(remote: str, tmp_path: Path) -> None:
    first = storage.fetch(remote).parent.name
    storage.publish_bytes(f"{remote}/state.json", b"{}")
    second = storage.fetch(remote).parent.name
    assert copies(tmp_path) == {first, second}  # a process may be reading the first one
    long_ago = time.time() - 2 * cache.UNUSED_S
    os.utime(tmp_path / "node" / first, (long_ago, long_ago))
    (tmp_path / "node" / "shards").mkdir()
    os.utime(tmp_path / "node" / "shards", (long_ago, long_ago))
    storage.fetch(remote)
    assert copies(tmp_path) == {second, "shards"}
    os.utime(tmp_path / "node" / second, (long_ago, long_ago))
    assert storage.fetch(remote).parent.name == second  # its use is noted before others are removed


def test_a_copy_that_lost_a_file_is_completed(remote: str) -> None:
    local = storage.fetch(remote)
    (local / "zero" / "a.pt").unlink()
    (local / "zero" / "b.pt").write_bytes(b"cut")
    storage.fetch(remote)
    assert [(local / name).read_bytes() for name in NAMES] == [name.encode() * 1000 for name in NAMES]


def test_only_permanent_errors_end_a_run(remote: str, store: Store, tmp_path: Path) -> None:
    """A PipelineError of a worker ends the run; after any other one Ray restarts the group."""
    store.faults.append(Fault(r"^GET .*/a.pt", 500, 99))
    with pytest.raises(OSError, match="planted") as caught:
        storage.fetch(remote)
    assert not isinstance(caught.value, DataError)
    store.faults[:] = [Fault(r"^GET .*/a.pt", 403, 99)]
    with pytest.raises(DataError, match="the store refuses access"):
        storage.fetch(remote)
    store.faults.clear()
    (tmp_path / "node" / ".lock-copies").unlink()
    storage.remove(str(tmp_path / "node"))
    (tmp_path / "node").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be copied to .*/node"):
        storage.fetch(remote)
