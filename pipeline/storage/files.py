"""Files by path or URL (anything that fsspec opens), read with retries and written completely or not at all."""

import contextlib
import errno
import glob
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

from pipeline.config.location import check_bucket
from pipeline.errors import ConfigError, DataError, PipelineError, first_line
from pipeline.storage.retries import of_network, retry, transient

COMPLETE = "_COMPLETE"  # last file of a folder on a store that cannot rename folders
_TEMPORARY = ".part-"  # start of the names of unfinished files
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_PROBE = 1 << 16  # bytes that show whether a disk has room
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def is_local(path: str) -> bool:
    """Return whether a path is a plain path or starts with `file://`."""
    return "://" not in path or path.startswith("file://")


def resolve(path: str) -> str:
    """Make a local path absolute (`~` and `file://` included); URLs are returned unchanged."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://"))) if is_local(path) else path


def join(path: str, *parts: str) -> str:
    """Return `path/part/part`, for paths and URLs alike."""
    return "/".join([path[:-1] if path.endswith("://") else path.rstrip("/"), *parts])


def filesystem(path: str) -> tuple[Any, str]:
    """Open the fsspec filesystem of a path or URL.

    Args:
        path: file or folder, which need not exist.

    Returns:
        The filesystem, and the path inside it.

    Raises:
        DataError: the URL's scheme is unknown, its driver is not installed, or it names no bucket.
    """
    if is_local(path):  # any character may stand in a path
        return fsspec.filesystem("file"), resolve(path)
    scheme = path.split("://")[0]
    try:
        check_bucket(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        if _is_chain(path):
            return fsspec.core.url_to_fs(path)
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(path)), kind._strip_protocol(path)
    except ImportError as error:
        driver = _DRIVERS.get(scheme)
        how = f"; run `pip install {driver}` on every node" if driver else ""
        raise DataError(f"{path}: {scheme}:// needs a driver that is not installed ({error}){how}") from None
    except ValueError as error:
        raise DataError(f"{path}: cannot be opened: {error}") from None


def _is_chain(path: str) -> bool:
    """Return whether a URL goes through several filesystems, as `zip://file::s3://bucket/a.zip` does."""
    known = fsspec.available_protocols()
    return "::" in path and all("://" in part or part in known for part in path.split("::"))


def arrow(path: str) -> tuple[FileSystem | None, str]:
    """Open the filesystem of a path or URL for libraries that write through Arrow.

    Arrow's own driver of S3 asks Amazon for the bucket's region, whatever endpoint the environment names.

    Args:
        path: file or folder, which need not exist.

    Returns:
        The filesystem (None stands for Arrow's own, of local paths), and the path inside it.

    Raises:
        DataError: the URL's scheme is unknown or its driver is not installed.
    """
    if is_local(path):
        return None, resolve(path)
    fs, inner = filesystem(path)
    return PyFileSystem(FSSpecHandler(fs)), inner


@retry
def exists(path: str) -> bool:
    """Return whether there is a file or folder at a path.

    Raises:
        DataError: the store refuses access.
    """
    with explained(path):
        fs, inner = filesystem(path)
        fs.invalidate_cache()  # another process may have written since the last call
        return fs.exists(inner)


@retry
def listing(path: str) -> list[str]:
    """Return the sorted names in a folder; empty if there is no such folder.

    Raises:
        DataError: the store refuses access.
    """
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        with explained(path):
            names = [name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and not name.startswith(_TEMPORARY))


@retry
def size(path: str) -> int:
    """Return the number of bytes of a file."""
    fs, inner = filesystem(path)
    return fs.size(inner)


@retry
def read_bytes(path: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store refuses access.
    """
    with explained(path):
        fs, inner = filesystem(path)
        return fs.cat_file(inner)


def read_text(path: str) -> str:
    """Return the UTF-8 text of a file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store refuses access.
    """
    return read_bytes(path).decode("utf-8")


def read_json(path: str, default: Any = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        default: returned if there is no such file.

    Raises:
        DataError: the store refuses access.
    """
    return json.loads(read_text(path)) if exists(path) else default


@retry
def open_read(path: str) -> IO[bytes]:
    """Open a seekable binary file for reading.

    Raises:
        FileNotFoundError: there is no such file.
    """
    fs, inner = filesystem(path)
    return open(inner, "rb") if is_local(path) else fs.open(inner, "rb")


@retry
def sha256(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def check_writable(path: str, key: str) -> None:
    """Create a folder and write a file into it, before time is spent on what it will hold.

    Args:
        path: the folder.
        key: the config's key that names the folder.

    Raises:
        ConfigError: the folder cannot be written; names key and path.
    """
    probe = join(path, f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        filesystem(path)  # refuses a store without a bucket, for which the probe's name would be taken
        publish_bytes(probe, bytes(_PROBE))
        remove(probe)
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{key}: {path!r} is not a folder that can be written: {why}") from None


def publish_bytes(path: str, data: bytes) -> None:
    """Write a file completely or not at all, replacing an earlier one.

    Args:
        path: the file; missing folders are created.
        data: its content.

    Raises:
        DataError: it cannot be written; an earlier file is intact.
    """
    _publish(path, lambda fs, inner: fs.pipe_file(inner, data))


def publish_text(path: str, text: str) -> None:
    """Write a UTF-8 text file completely or not at all, replacing an earlier one.

    Args:
        path: the file; missing folders are created.
        text: its content.

    Raises:
        DataError: it cannot be written; an earlier file is intact.
    """
    publish_bytes(path, text.encode("utf-8"))


def publish_file(local: str | Path, path: str) -> None:
    """Copy a local file completely or not at all, replacing an earlier one and without holding it in memory.

    Args:
        local: the file to copy.
        path: where to; missing folders are created.

    Raises:
        DataError: it cannot be written; an earlier file is intact.
    """
    _publish(path, lambda fs, inner: fs.put_file(str(local), inner))


def publish_folder(local: str | Path, path: str) -> None:
    """Copy a local folder completely or not at all, replacing an earlier one.

    Object stores cannot rename a folder. There, a marker file is written last (see `folder_complete`), and a failed
    copy leaves an incomplete folder.

    Args:
        local: the folder to copy.
        path: where to.

    Raises:
        DataError: it cannot be written.
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


@contextlib.contextmanager
def publishing_folder(path: str) -> Iterator[Path]:
    """Give a temporary folder, which is published (see `publish_folder`) if the block succeeds.

    Args:
        path: where to.

    Returns:
        A context manager that gives the local folder, which the block makes.

    Raises:
        DataError: it cannot be written.
    """
    with scratch() as temporary:
        local = temporary / "folder"
        yield local
        publish_folder(local, path)


def folder_complete(path: str) -> bool:
    """Return whether `publish_folder` finished writing a folder."""
    return os.path.isdir(resolve(path)) if is_local(path) else exists(join(path, COMPLETE))


def remove(path: str) -> None:
    """Remove a file or folder if it exists."""
    if not is_local(path):
        if exists(join(path, COMPLETE)):
            _delete(join(path, COMPLETE))  # first, so that an interrupted removal never looks complete
        _delete(path)
        return
    target = Path(resolve(path))
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    else:
        target.unlink(missing_ok=True)


def sweep(path: str) -> None:
    """Remove what killed writers left in a folder, if it is local; no other process may be writing there."""
    for part in Path(resolve(path)).glob(f"{_TEMPORARY}*") if is_local(path) else ():
        remove(str(part))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder on this node's disk, inside the temporary folder (TMPDIR), and remove it after the block.

    Raises:
        DataError: the folder cannot be made, or the disk is full; names TMPDIR.
    """
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise DataError(_no_room(error)) from error
    with folder as path:
        try:
            yield Path(path)
        except OSError as error:
            if error.errno in _FULL or str(error.filename or "").startswith(path):
                raise DataError(_no_room(error)) from error
            raise


def _no_room(error: OSError) -> str:
    """Describe why the temporary folder cannot be used."""
    place = os.environ.get("TMPDIR") or "/tmp"
    return f"TMPDIR: {place!r} cannot hold temporary files: {error.strerror or first_line(error)}"


def node_folder() -> Path:
    """Return the folder of this node's copies of remote files, inside the temporary folder (TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"partition-pipeline-{os.getuid()}"


def fetch(path: str) -> Path:
    """Make a file or folder available locally.

    Args:
        path: local, or remote in any form.

    Returns:
        The path itself if it is local, else a copy of its present version in this node's cache.

    Raises:
        FileNotFoundError: there is no such remote file or folder.
        DataError: the copy cannot be written.
    """
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
    """Give a temporary name beside a local path, and rename it to the path if the block succeeds."""
    target = Path(resolve(path))
    part = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        if target.is_dir() and part.is_dir():  # a folder cannot be renamed over one that is not empty
            old = part.with_name(f"{part.name}-old")
            os.replace(target, old)
            os.replace(part, target)
            remove(str(old))
        else:
            os.replace(part, target)
        _sync(target.parent)
    except BaseException as error:
        remove(str(part))
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some shared filesystems cannot sync folders
            raise
    finally:
        os.close(handle)


def _publish(path: str, write: Callable[[Any, str], None]) -> None:
    """Write a file: locally under a temporary name; object stores show an object only once it is complete."""
    fs, inner = filesystem(path)
    if is_local(path):
        with _replacing(path) as part:
            write(fs, str(part))
        return
    try:
        with explained(path):
            retry(write)(fs, inner)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Name the path where a store refuses access or a name; outages and other errors pass."""
    try:
        yield
    except Exception as error:
        if is_local(path) or isinstance(error, PipelineError):
            raise
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            how = "credentials come from the environment or the node's role"
            raise DataError(f"{path}: the store refuses access ({error}); {how}") from error
        if isinstance(error, OSError) or not of_network(error) or transient(error):
            raise
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error


@retry
def _delete(path: str) -> None:
    """Remove a remote file or folder if it exists."""
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError), explained(path):
        fs.rm(glob.escape(inner), recursive=True)  # which would take the path for a pattern
