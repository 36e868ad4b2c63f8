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

from pipeline.errors import ConfigError, DataError, first_line
from pipeline.storage.paths import explained, filesystem, is_local, join, resolve
from pipeline.storage.retries import retry, status

COMPLETE = "_COMPLETE"  # last file of a folder on a store that cannot rename folders
TEMPORARY = ".part-"  # start of the names of unfinished files
_PROBE = 1 << 16  # bytes that show whether a disk has room
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


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
    return sorted(name for name in names if name and not name.startswith(TEMPORARY))


@retry
def sizes(path: str) -> dict[str, int]:
    """Return the bytes of all files below a folder by their path in it, from one listing.

    Raises:
        DataError: the store refuses access.
    """
    fs, inner = filesystem(path)
    with explained(path):
        fs.invalidate_cache()
        found = fs.find(inner, detail=True)
    return {name[len(inner) :].lstrip("/"): facts["size"] for name, facts in found.items()}


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


def read_json(path: str, default: Any = None, parse: Callable[[Any], Any] = lambda tree: tree) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        default: returned if there is no such file.
        parse: converts what the file holds; it may fail on a file of another form.

    Returns:
        What `parse` makes of the file's content.

    Raises:
        DataError: the file is damaged, or the store refuses access.
    """
    if not exists(path):
        return default
    text = read_bytes(path)
    try:
        return parse(json.loads(text))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({what}); restore it, or remove it to go on without it") from None


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
    probe = join(path, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        filesystem(path)  # refuses a store without a bucket, for which the probe's name would be taken
        publish_bytes(probe, bytes(_PROBE))
        remove(probe)
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{key}: {path!r} is not a folder that can be written: {why}") from None


def create(path: str, data: bytes) -> bool:
    """Write a file unless there is one already; of several callers at the same time, one succeeds.

    Object stores decide with a conditional request (`If-None-Match: *`, or `ifGenerationMatch=0`). On a store that
    does not know them, the last of several callers at the same time succeeds, and others have to read the file.

    Args:
        path: the file; missing folders are created.
        data: its content, which no other caller writes.

    Returns:
        Whether this call wrote the file.

    Raises:
        DataError: it cannot be written.
    """
    try:
        if is_local(path):
            _create_local(Path(resolve(path)), data)
        else:
            fs, inner = filesystem(path)
            with explained(path):
                retry(fs.pipe_file)(inner, data, mode="create")
    except Exception as error:
        if isinstance(error, FileExistsError) or status(error) == 412:  # precondition failed
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                return read_bytes(path) == data  # by an earlier attempt of this call, whose answer was lost
            return False
        if status(error) == 501 and not exists(path):  # a store without conditional requests
            publish_bytes(path, data)
            return True
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    return True


def _create_local(target: Path, data: bytes) -> None:
    """Write a local file that does not exist yet, and remove it if its content cannot be written."""
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = target.open("xb")
            break
        except FileNotFoundError:  # another process has removed the empty folder
            continue
    with file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            target.unlink(missing_ok=True)
            raise


def touch(path: str, data: bytes) -> None:
    """Set the modification time of a file to the present time of the store.

    Args:
        path: the file.
        data: its content, which is written again where a store knows no other way.

    Raises:
        FileNotFoundError: there is no such local file.
        DataError: it cannot be written.
    """
    if is_local(path):
        os.utime(resolve(path))  # without a time: that of the machine that holds the file
    else:
        publish_bytes(path, data)


@retry
def modified(path: str) -> float:
    """Return the modification time of a file in seconds, by the clock of the store.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store refuses access.
    """
    with explained(path):
        fs, inner = filesystem(path)
        fs.invalidate_cache()
        return fs.modified(inner).timestamp()


def present_time(folder: str) -> float:
    """Return the present time by the clock of the store, from the modification time of a new file.

    Args:
        folder: in which the file is made and removed.

    Raises:
        DataError: the folder cannot be written.
    """
    probe = join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    publish_bytes(probe, b"")
    try:
        return modified(probe)
    finally:
        remove(probe)


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
            follow_umask(part)  # a temporary folder is its owner's alone
            for file in part.rglob("*"):
                sync(file)
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


def follow_umask(path: Path) -> None:
    """Give a file or folder the permissions of a new one; some libraries make theirs for their owner alone.

    Args:
        path: a local file or folder.
    """
    probe = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    if path.is_dir():
        probe.mkdir()
    else:
        probe.touch()
    shutil.copymode(probe, path)
    remove(str(probe))


def folder_complete(path: str) -> bool:
    """Return whether `publish_folder` finished writing a folder."""
    return os.path.isdir(resolve(path)) if is_local(path) else exists(join(path, COMPLETE))


def remove(path: str, marked: bool = True) -> None:
    """Remove a file or folder if it exists.

    Args:
        path: the file or folder.
        marked: whether it may be a folder of `publish_folder`, whose marker is removed first.
    """
    if not is_local(path):
        if marked and exists(join(path, COMPLETE)):
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
    for part in Path(resolve(path)).glob(f"{TEMPORARY}*") if is_local(path) else ():
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


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[Path]:
    """Give a temporary name beside a local path, and rename it to the path if the block succeeds."""
    target = Path(resolve(path))
    part = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        _rename(part, target)
        sync(target.parent)
    except BaseException as error:
        remove(str(part))
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def _rename(part: Path, target: Path) -> None:
    """Rename a file or folder to `target`, in place of what is there; others may do the same at the same time."""
    replaced: list[Path] = []
    while True:
        try:
            os.replace(part, target)
            break
        except OSError as error:
            # A folder cannot be renamed over one that is not empty, or over a link.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not (
                part.is_dir() and target.is_symlink()
            ):
                raise
            aside = part.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                os.replace(target, aside)
                replaced.append(aside)
    for old in replaced:
        remove(str(old))


def sync(path: Path) -> None:
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


@retry
def _delete(path: str) -> None:
    """Remove a remote file or folder if it exists."""
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError), explained(path):
        fs.rm(glob.escape(inner), recursive=True)  # which would take the path for a pattern
