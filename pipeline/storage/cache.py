"""A node's cache of files in object stores: bounded, and shared by all workers of the node.

Entries are named by their SHA-256. A file that changed is another entry, and damaged content is never kept.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage import files

log = logging.getLogger(__name__)

LIMIT = "PIPELINE_CACHE_GIB"  # a property of the node, hence in its environment and not in a run's config
_GIB = 50.0
_LOCKS = 64  # lock files, over which entries are spread


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
    with _lock(folder / f".lock-{int(sha256[:8], 16) % _LOCKS}"):  # one worker downloads, the others wait
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
        with _lock(entry.with_name(".lock-room")):
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


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Exclude the other processes and threads of this node; a process that dies releases its lock."""
    with file.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
