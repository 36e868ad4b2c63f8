"""Storage: whole files or none, local and remote alike, and patience with passing errors."""

import errno
import os
import uuid
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.storage import retries


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_paths() -> None:
    assert storage.resolve("a/b") == os.path.abspath("a/b")
    assert storage.resolve("file:///a/b") == "/a/b"
    assert storage.resolve("s3://bucket/a") == "s3://bucket/a"
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("memory://", "a") == "memory://a"
    assert storage.is_local("a")
    assert not storage.is_local("gs://bucket/a")
    with pytest.raises(DataError, match="nonsense"):
        storage.read_bytes("nonsense://x")
    with pytest.raises(DataError, match=r"abfs:// needs a driver .*`pip install adlfs` on every node"):
        storage.read_bytes("abfs://container/x")


def test_files(folder: str, tmp_path: Path) -> None:
    path = storage.join(folder, "deep", "file")
    assert not storage.exists(path)
    assert storage.listing(folder) == []
    storage.publish_bytes(path, b"one")
    storage.publish_text(path, "zwölf")  # replaces
    assert storage.read_text(path) == "zwölf"
    assert storage.size(path) == 6
    with storage.open_read(path) as file:
        file.seek(2)
        assert file.read() == "ölf".encode()
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    storage.publish_file(tmp_path / "source", storage.join(folder, "copy"))
    assert storage.listing(folder) == ["copy", "deep"]
    assert storage.sha256(storage.join(folder, "copy")) == storage.sha256(str(tmp_path / "source"))
    assert storage.fetch(path).read_text(encoding="utf-8") == "zwölf"
    storage.publish_text(path, "newer")
    assert storage.fetch(path).read_text() == "newer"  # the cache knows versions
    storage.remove(folder)
    storage.remove(folder)  # nothing there: nothing to do
    assert not storage.exists(path)


def test_folders(folder: str, tmp_path: Path) -> None:
    local = tmp_path / "made"
    (local / "sub").mkdir(parents=True)
    (local / "a").write_text("1")
    (local / "sub" / "b").write_text("2")
    path = storage.join(folder, "model")
    assert not storage.folder_complete(path)
    storage.publish_folder(local, path)
    assert storage.folder_complete(path)
    (local / "a").unlink()
    storage.publish_folder(local, path)  # replaces: what is gone is gone
    copy = storage.fetch(path)
    assert (copy / "sub" / "b").read_text() == "2"
    assert not (copy / "a").exists()
    assert storage.listing(folder) == ["model"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(path, "a"))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    storage.publish_bytes(path, b"old")
    with pytest.raises(DataError, match="cannot be written"):
        storage.publish_file(tmp_path / "absent", path)
    with pytest.raises(TypeError):
        storage.publish_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_unwritable_folder_names_key_and_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "sub")
    with pytest.raises(ConfigError, match=r"cluster.storage: .*file/sub") as caught:
        storage.check_writable(path, "cluster.storage")
    assert "Not a directory" in str(caught.value)
    storage.check_writable(str(tmp_path / "new"), "cluster.storage")
    assert os.listdir(tmp_path / "new") == []


def test_sweep_removes_only_unfinished_files(tmp_path: Path) -> None:
    (tmp_path / ".part-x").write_text("")
    (tmp_path / "kept").write_text("")
    assert storage.listing(str(tmp_path)) == ["kept"]
    storage.sweep(str(tmp_path))
    assert os.listdir(tmp_path) == ["kept"]


def answered(status: int, error: OSError) -> OSError:
    """An error as s3fs raises it: of its own choice, caused by botocore's error with the status."""
    error.__cause__ = ClientError({"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ConnectionResetError("reset"), 3),
        (OSError(errno.EIO, "input/output"), 3),
        (OSError("a store's own error"), 3),
        (FileNotFoundError("gone"), 1),
        (OSError(errno.ENOSPC, "disk full"), 1),
        (OSError(errno.EREMOTEIO, "a store's internal error"), 3),
        (answered(429, OSError(errno.EINVAL, "too many requests")), 3),
        (answered(400, OSError(errno.EIO, "a code that the driver does not know")), 1),
        (answered(403, OSError(errno.EIO, "forbidden")), 1),
        (KeyError("a bug"), 1),
    ],
)
def test_retry(error: Exception, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 1e-3)
    seen: list[int] = []

    @storage.retry
    def flaky() -> str:
        seen.append(1)
        if len(seen) < 3:
            raise error
        return "done"

    if calls == 3:
        assert flaky() == "done"
    else:
        with pytest.raises(type(error)):
            flaky()
    assert len(seen) == calls


def test_answers_of_stores_are_no_fault_of_the_data() -> None:
    answer = ClientError(
        {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "GetObject"
    )
    error = OSError(errno.EBUSY, "SlowDown")
    error.__cause__ = answer
    assert storage.of_network(error)
    assert storage.of_network(answer)
    assert not storage.of_network(OSError(errno.EIO, "bad block"))
    assert not storage.of_network(ValueError("cut"))
