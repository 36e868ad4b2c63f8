"""Files by path or URL (anything fsspec opens), read with retries and written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from pipeline.errors import ConfigError, DataError
from pipeline.storage.retries import retry

COMPLETE = "_COMPLETE"  # last file of a folder on a store that cannot rename folders
_TEMPORARY = ".part-"  # how names of unfinished files begin
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_local(path: str) -> bool:
    """True for a plain path or `file://`, False for every other URL."""
    return "://" not in path or path.startswith("file://")


def resolve(path: str) -> str:
    """A local path made absolute (`~` and `file://` included); a URL unchanged."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://"))) if is_local(path) else path


def join(path: str, *parts: str) -> str:
    """`path/part/part`, for paths and URLs alike."""
    return "/".join([path[:-1] if path.endswith("://") else path.rstrip("/"), *parts])


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it.

    Raises:
        DataError: the URL's scheme is unknown or its driver is not installed.
    """
    scheme = path.split("://")[0]
    try:
        return fsspec.core.url_to_fs(resolve(path))
    except ImportError as error:
        driver = _DRIVERS.get(scheme)
        how = f"; `pip install {driver}` on every node" if driver else ""
        raise DataError(f"{path}: {scheme}:// needs a driver that is not installed{how} ({error})") from None
    except ValueError as error:
        raise DataError(f"{path}: cannot be opened: {error}") from None


def arrow(path: str) -> tuple[FileSystem | None, str]:
    """The same filesystem and path for those who write through Arrow; None: Arrow's own, of a local path.

    Arrow's driver of S3 asks Amazon for the bucket's region, whatever endpoint the environment names.
    """
    if is_local(path):
        return None, resolve(path)
    fs, inner = filesystem(path)
    return PyFileSystem(FSSpecHandler(fs)), inner


@retry
def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    with _named(path):
        fs, inner = filesystem(path)
        fs.invalidate_cache()  # another process may have written since we looked
        return fs.exists(inner)


@retry
def listing(path: str) -> list[str]:
    """Sorted names in a folder; empty if there is no such folder."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        with _named(path):
            found = fs.ls(inner, detail=False)
        names = [name.rstrip("/").rsplit("/", 1)[-1] for name in found]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and not name.startswith(_TEMPORARY))


@retry
def size(path: str) -> int:
    """Bytes of a file."""
    fs, inner = filesystem(path)
    return fs.size(inner)


@retry
def read_bytes(path: str) -> bytes:
    """A file's bytes."""
    with _named(path):
        fs, inner = filesystem(path)
        return fs.cat_file(inner)


def read_text(path: str) -> str:
    """A file's UTF-8 text."""
    return read_bytes(path).decode("utf-8")


def read_json(path: str, default: Any = None) -> Any:
    """Read a JSON file; `default` if there is no such file."""
    return json.loads(read_text(path)) if exists(path) else default


@retry
def open_read(path: str) -> IO[bytes]:
    """An open binary file; seekable."""
    fs, inner = filesystem(path)
    return open(inner, "rb") if is_local(path) else fs.open(inner, "rb")


@retry
def sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_read(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def check_writable(path: str, key: str) -> None:
    """Create the folder and write a file in it, before any time is spent on what it shall hold.

    Raises:
        ConfigError: names the config's key and the path.
    """
    probe = join(path, f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        publish_bytes(probe, b"")
        remove(probe)
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{key}: {path!r} is not a folder that can be written: {why}") from None


def publish_bytes(path: str, data: bytes) -> None:
    """Write a file whole or not at all, replacing what was there.

    Raises:
        DataError: it cannot be written; what was there before is intact.
    """
    if is_local(path):
        with _replacing(path) as part, open(part, "wb") as file:
            file.write(data)
    else:
        _put(path, lambda fs, inner: fs.pipe_file(inner, data))


def publish_text(path: str, text: str) -> None:
    """`publish_bytes` of UTF-8 text."""
    publish_bytes(path, text.encode("utf-8"))


def publish_file(local: str | Path, path: str) -> None:
    """`publish_bytes` of a local file's content, without holding it in memory."""
    if is_local(path):
        with _replacing(path) as part:
            shutil.copyfile(local, part)
    else:
        _put(path, lambda fs, inner: fs.put_file(str(local), inner))


def publish_folder(local: str | Path, path: str) -> None:
    """Copy a local folder to `path`, complete or absent, replacing what was there.

    Object stores cannot rename a folder: there, a marker file is written last (`folder_complete`).
    """
    if is_local(path):
        with _replacing(path) as part:
            shutil.copytree(local, part)
            for file in part.rglob("*"):
                _sync(file)
        return
    remove(path)
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            publish_file(file, join(path, file.relative_to(local).as_posix()))
    publish_bytes(join(path, COMPLETE), b"")


def folder_complete(path: str) -> bool:
    """Whether `publish_folder` finished writing this folder."""
    return os.path.isdir(resolve(path)) if is_local(path) else exists(join(path, COMPLETE))


def remove(path: str) -> None:
    """Remove a file or folder, if it is there."""
    if is_local(path):
        target = Path(resolve(path))
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
        return
    if exists(join(path, COMPLETE)):
        _delete(join(path, COMPLETE))  # first, so that a removal cut short never looks complete
    _delete(path)


def sweep(path: str) -> None:
    """Remove what writers that were killed left in a local folder; no other may be writing there now."""
    for part in Path(resolve(path)).glob(f"{_TEMPORARY}*") if is_local(path) else ():
        remove(str(part))


def node_folder() -> Path:
    """Where this node keeps copies of remote files, under the temporary folder (TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"partition-pipeline-{os.getuid()}"


def fetch(path: str) -> Path:
    """A local path with the content: the path itself, or a copy in this node's cache of a remote one."""
    if is_local(path):
        return Path(resolve(path))
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    files = [inner] if fs.isfile(inner) else sorted(fs.find(inner))
    if not files:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    version = hashlib.sha256("\n".join([path, *(str(fs.ukey(file)) for file in files)]).encode()).hexdigest()
    target = node_folder() / version[:32] / path.rstrip("/").rsplit("/", 1)[-1]
    if not target.exists():
        with _replacing(str(target)) as part:
            for file in files:
                copy = part if files == [inner] else part / file[len(inner) :].lstrip("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                retry(fs.get_file)(file, str(copy))
    return target


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[Path]:
    """A temporary name beside a local path; on success it takes the path's place, on failure it goes."""
    target = Path(resolve(path))
    part = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        if target.is_dir() and part.is_dir():  # a folder cannot be renamed over a full one
            old = part.with_name(f"{part.name}-old")
            os.replace(target, old)
            os.replace(part, target)
            remove(str(old))
        else:
            os.replace(part, target)
        _sync(target.parent)
    except OSError as error:
        remove(str(part))
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        remove(str(part))
        raise


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some shared filesystems cannot sync folders
            raise
    finally:
        os.close(handle)


def _put(path: str, write: Callable[[Any, str], None]) -> None:
    """One upload: object stores show an object only once it is whole."""
    fs, inner = filesystem(path)
    try:
        with _named(path):
            retry(write)(fs, inner)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Let a store's refusal name the path and what decides about access; other errors pass."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
        if is_local(path) or not refused:
            raise
        raise DataError(
            f"{path}: the store refuses access ({error}); credentials come from the environment or the node's role"
        ) from error


@retry
def _delete(path: str) -> None:
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)
