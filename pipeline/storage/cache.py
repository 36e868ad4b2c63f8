"""A node's copies of files in object stores, shared by all processes of the node.

`read_cached` keeps a bounded cache whose entries are named by their SHA-256. A file that changed is another entry,
and damaged content is never kept. `fetch` makes copies of models and checkpoints as files, for libraries that read
paths. Processes that want the same file wait for the one that downloads it.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from pipeline.storage.retries import retry, transient

log = logging.getLogger(__name__)

LIMIT = "PIPELINE_CACHE_GIB"  # a property of the node, hence in its environment and not in a run's config
_GIB = 50.0
_LOCKS = 64  # lock files, over which entries are spread
UNUSED_S = 3600.0  # after which a copy that `fetch` made may be removed; reading a copy takes less
_VERSION = re.compile("[0-9a-f]{32}")  # name of the folder of a copy


def read_cached(path: str, sha256: str) -> bytes:
    """Read a file; a remote one through this node's cache, where it stays until the room is needed.

    Content that does not have the expected hash is returned and not kept. Nothing is kept on a full disk.

    Args:
        path: the file.
        sha256: expected hash of its content, in hexadecimal.

    Returns:
        The content.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the limit in the environment is not a number.
    """
    if files.is_local(path):
        return files.read_bytes(path)
    folder = files.node_folder() / "shards"
    entry = folder / sha256
    if (data := _read_entry(entry)) is not None:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    with _entry_lock(folder, sha256):  # one worker downloads, the others wait
        if (data := _read_entry(entry)) is not None:
            return data
        data = files.read_bytes(path)
        if hashlib.sha256(data).hexdigest() == sha256:
            _keep(entry, data)
    return data


def _read_entry(entry: Path) -> bytes | None:
    """Read an entry if it exists; one that is removed meanwhile stays readable."""
    try:
        with entry.open("rb") as file:
            now = time.time_ns()  # finer than the kernel's own timestamps
            os.utime(file.fileno(), ns=(now, now))
            return file.read()
    except FileNotFoundError:
        return None


def _keep(entry: Path, data: bytes) -> None:
    """Make room and write an entry; a cache that cannot be written does not stop the reader."""
    part = entry.with_name(f".part-{uuid.uuid4().hex}")
    try:
        with node_lock(entry.with_name(".lock-room")):
            if _make_room(entry.parent, len(data)):
                part.write_bytes(data)
                os.replace(part, entry)
    except OSError as error:
        part.unlink(missing_ok=True)
        log.warning("%s could not be cached: %s", entry, error)


def _make_room(folder: Path, needed: int) -> bool:
    """Remove the least recently used entries until `needed` bytes fit; False if they never do."""
    for part in folder.glob(".part-*"):  # of killed writers: live ones hold the lock that this one holds
        part.unlink(missing_ok=True)
    entries = sorted(
        (s.st_mtime_ns, s.st_size, e.path) for e in os.scandir(folder) if (s := e.stat()).st_size
    )
    held = sum(size for _, size, _ in entries)
    limit = _limit(folder, held)
    if needed > limit:
        return False
    for _, size, path in entries:
        if held + needed <= limit:
            break
        os.unlink(path)
        held -= size
    return True


def _limit(folder: Path, held: int) -> float:
    """Bytes that the cache may hold: the environment's limit, else 50 GiB or half of the disk's free space."""
    limit = os.environ.get(LIMIT)
    if limit is None:
        return min(_GIB * 2**30, (shutil.disk_usage(folder).free + held) / 2)
    try:
        return float(limit) * 2**30
    except ValueError:
        raise ConfigError(f"{LIMIT}: {limit!r} in the environment; expected a number of GiB") from None


def fetch(path: str, needed: Callable[[str], bool] | None = None) -> Path:
    """Make a file or folder available locally.

    All processes of this node share one copy of a version, and each of its files is downloaded once. A copy that no
    process has fetched for an hour is removed when the next one is made.

    Args:
        path: local, or remote in any form.
        needed: tells of a file's path in the folder whether the caller reads it; None: all files are read.

    Returns:
        The path itself if it is local, else a copy of its present version in this node's cache.

    Raises:
        FileNotFoundError: there is no such remote file or folder.
        DataError: the store refuses access, or the copy cannot be written.
    """
    if files.is_local(path):
        return Path(files.resolve(path))
    version, sizes = _remote_files(path)
    node = files.node_folder()
    target = node / version / path.rstrip("/").rsplit("/", 1)[-1]
    try:
        _use(node, version)
        for name, size in sizes.items():
            copy = target / name
            if (needed is None or needed(name)) and not _complete(copy, size):
                with _entry_lock(node, hashlib.sha256(str(copy).encode()).hexdigest()):
                    if not _complete(copy, size):
                        _download(files.join(path, name) if name else path, copy)
                os.utime(node / version)
    except OSError as error:
        # A restart may find what is there by then.
        if isinstance(error, FileNotFoundError) or transient(error):
            raise
        raise DataError(f"{path}: cannot be copied to {target}: {error.strerror or error}") from error
    return target


@retry
def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read parts of a file, of a remote one without the rest.

    Args:
        path: the file.
        ranges: first byte of every part, and the byte behind its last one; parts end where the file does.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store refuses access.
    """
    fs, inner = files.filesystem(path)
    with files.explained(path):
        if files.is_local(path):
            with open(inner, "rb") as file:
                return [_read_at(file, *part) for part in ranges]
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        return fs.cat_ranges([inner] * len(ranges), starts, stops, on_error="raise")


def _read_at(file: IO[bytes], start: int, stop: int) -> bytes:
    """Read a part of an open file."""
    file.seek(start)
    return file.read(stop - start)


@retry
def _remote_files(path: str) -> tuple[str, dict[str, int]]:
    """Return the version of a remote file or folder, and the size of each of its files by their path in it."""
    fs, inner = files.filesystem(path)
    with files.explained(path):
        fs.invalidate_cache()
        found = {inner: fs.info(inner)} if fs.isfile(inner) else fs.find(inner, detail=True)
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        keys = "\n".join([path, *(str(fs.ukey(file)) for file in sorted(found))])
    version = hashlib.sha256(keys.encode()).hexdigest()[:32]
    return version, {file[len(inner) :].lstrip("/"): info["size"] for file, info in sorted(found.items())}


def _use(node: Path, version: str) -> None:
    """Mark a copy as used now, and remove those that were not used for long."""
    node.mkdir(parents=True, exist_ok=True)
    with node_lock(node / ".lock-copies"):
        (node / version).mkdir(exist_ok=True)
        os.utime(node / version)
        for other in node.iterdir():
            if _VERSION.fullmatch(other.name) and time.time() - other.stat().st_mtime > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)


def _complete(copy: Path, size: int) -> bool:
    """Return whether a file of a copy is there, whole."""
    return copy.is_file() and copy.stat().st_size == size


def _download(path: str, copy: Path) -> None:
    """Download a file completely or not at all."""
    part = copy.with_name(f"{files.TEMPORARY}{uuid.uuid4().hex}")
    fs, inner = files.filesystem(path)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with files.explained(path):
            retry(fs.get_file)(inner, str(part))
        files.sync(part)
        os.replace(part, copy)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _entry_lock(folder: Path, digest: str) -> contextlib.AbstractContextManager[None]:
    """Return the lock of an entry of a folder."""
    return node_lock(folder / f".lock-{int(digest[:8], 16) % _LOCKS}")


@contextlib.contextmanager
def node_lock(file: Path) -> Iterator[None]:
    """Exclude the other processes and threads of this node; a process that dies releases its lock.

    Args:
        file: is created, and stays.
    """
    with file.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
