"""A node's cache of files in object stores: bounded, shared by all workers of the node, whole files or none.

Entries are named by their SHA-256, so a file that changed is another entry, and what is damaged never becomes one.
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

LIMIT = "PIPELINE_CACHE_GIB"  # a fact about nodes, hence in their environment and in no run's config
_GIB = 50.0
_LOCKS = 64  # files that readers of the same entry wait at


def read_cached(path: str, sha256: str) -> bytes:
    """A file's bytes; of a remote one from this node's cache, where it stays until room is needed.

    What does not have the SHA-256 is returned as it is, and not kept; nor is anything where the disk is full.

    Args:
        sha256: what the content's hash should be.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the limit in the environment is no number.
    """
    if files.is_local(path):
        return files.read_bytes(path)
    folder = files.node_folder() / "shards"
    entry = folder / sha256
    if (data := _entry(entry)) is not None:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".lock-{int(sha256[:8], 16) % _LOCKS}"):  # one worker downloads, the others wait
        if (data := _entry(entry)) is not None:
            return data
        data = files.read_bytes(path)
        if hashlib.sha256(data).hexdigest() == sha256:
            _keep(entry, data)
    return data


def _entry(entry: Path) -> bytes | None:
    """An entry's bytes, if it is (still) there. One that is removed while it is read stays readable."""
    try:
        with entry.open("rb") as file:
            now = time.time_ns()  # finer than the kernel's own stamps
            os.utime(file.fileno(), ns=(now, now))
            return file.read()
    except FileNotFoundError:
        return None


def _keep(entry: Path, data: bytes) -> None:
    """Make room and write an entry; a cache that cannot be written is none, and no reason to stop."""
    part = entry.with_name(f".part-{uuid.uuid4().hex}")
    try:
        with _locked(entry.with_name(".lock-room")):
            if _make_room(entry.parent, len(data)):
                part.write_bytes(data)
                os.replace(part, entry)
    except OSError as error:
        part.unlink(missing_ok=True)
        log.warning("%s is not cached: %s", entry, error)


def _make_room(folder: Path, wanted: int) -> bool:
    """Remove the entries used longest ago until `wanted` bytes fit under the limit; False if they never do."""
    for part in folder.glob(".part-*"):  # of writers that were killed: all others write under this lock
        part.unlink(missing_ok=True)
    found = sorted(
        (s.st_mtime_ns, s.st_size, e.path) for e in os.scandir(folder) if (s := e.stat()) and s.st_size
    )
    held = sum(size for _, size, _ in found)
    limit = _limit(folder, held)
    if wanted > limit:
        return False
    for _, size, path in found:
        if held + wanted <= limit:
            break
        os.unlink(path)
        held -= size
    return True


def _limit(folder: Path, held: int) -> float:
    """Bytes that the cache may have: the environment's, else 50 GiB or half of what the disk could give it."""
    written = os.environ.get(LIMIT)
    if written is None:
        return min(_GIB * 2**30, (shutil.disk_usage(folder).free + held) / 2)
    try:
        return float(written) * 2**30
    except ValueError:
        raise ConfigError(f"{LIMIT}: {written!r} in the environment; expected a number of GiB") from None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the processes and threads of this node; the lock of one that dies is free."""
    with file.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
