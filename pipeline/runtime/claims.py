"""Claims of folders: one job at a time works in a folder, and a job that died does not block the next one.

A claim is a file `.claims/NNNNNN.json` in the folder. It says who owns it, and its owner renews it every `BEAT_S`
seconds. A job takes a folder by writing the file with the next number, which only one of several jobs can do, and
checks afterwards that no other claim has appeared. The owner removes its file at the end.

A claim of a process of the same machine is over when that process is gone. Of another machine nothing is known but
the modification time of the claim, which is compared with the present time of the store and never with a local clock:
the claim is over when `MISSED_BEATS` renewals are missing. An owner that finds a claim of a higher number has been
taken for dead, and ends at once.
"""

import json
import logging
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from pipeline import storage
from pipeline.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FOLDER = ".claims"  # in the claimed folder
BEAT_S = 15.0  # between two renewals
MISSED_BEATS = 3
POLL_S = 2.0  # between two looks at a claim that is not over
_held: set[str] = set()  # tokens of the claims of this process
_NAME = re.compile(r"(\d{6})\.json")

Verb = Literal["trained", "prepared", "evaluated", "made", "run"]


@dataclass(frozen=True)
class Owner:
    """Owner of a claim.

    Attributes:
        host: name of its machine.
        pid: of its process.
        place: boot, namespace of processes, and user, in which `pid` has a meaning.
        started: when its process started; a later process with the same pid has another one.
        since: when it took the claim, for messages.
        verb: what it does with the folder, for messages.
        token: differs between all claims.
    """

    host: str
    pid: int
    place: str
    started: str
    since: str
    verb: Verb
    token: str

    def __str__(self) -> str:
        return f"{self.verb} by {self.host}:{self.pid} since {self.since}"


@contextmanager
def held(folder: str, key: str, what: str, verb: Verb, wait: bool = False) -> Iterator[None]:
    """Own a folder for the time of the block.

    Args:
        folder: is created if it is missing.
        key: of the config that names the folder.
        what: stands in the folder, for messages, such as "run 'a'".
        verb: what is done with it, for messages.
        wait: for the end of the job that owns the folder now; False: refuse.

    Raises:
        ConfigError: another job owns the folder, or the folder cannot be written.
    """
    try:
        claim = _take(storage.join(folder, FOLDER), what, verb, wait)
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{key}: {folder!r} is not a folder that can be written: {why}") from None
    claim.start()
    try:
        yield
    finally:
        claim.release()


def _take(folder: str, what: str, verb: Verb, wait: bool) -> "_Claim":
    """Take the claims folder of a folder once no other job owns it."""
    place, started = _place(), _process(os.getpid())
    assert started is not None
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    owner = Owner(socket.gethostname(), os.getpid(), place, started, since, verb, uuid.uuid4().hex)
    times: dict[str, float] = {}  # modification times of claims when they were first seen
    told = False
    while True:
        names = _names(folder)
        states = {name: _state(folder, name, place, times) for name in names}
        holder = next((_read(folder, name) for name in names if states[name] != "over"), None)
        if all(state == "over" for state in states.values()):
            number = int(_NAME.fullmatch(names[-1])[1]) + 1 if names else 1  # type: ignore[index]
            claim = _Claim(folder, number, owner)
            _held.add(owner.token)
            if storage.create(claim.path, claim.data):
                if not claim.lost() and {*_names(folder)} <= {*names, claim.name}:
                    for name in names:
                        storage.remove(storage.join(folder, name))
                    return claim
                storage.remove(claim.path)  # another job took it, and did not know of this one
            time.sleep(random.SystemRandom().uniform(0, 0.2))
            continue
        if "alive" in states.values() and not wait:
            raise ConfigError(
                f"{what} is being {holder or 'used by another job'}; wait until it ends, or choose another name"
            )
        if not told:
            owned = f"{what} is being {holder or 'claimed by another job'}"
            log.info("%s; waiting %s", owned, "until it ends" if wait else "to see whether it is still alive")
            told = True
        time.sleep(POLL_S)


def _names(folder: str) -> list[str]:
    """Names of all claims, the highest number last."""
    return [name for name in storage.listing(folder) if _NAME.fullmatch(name)]


def _read(folder: str, name: str) -> Owner | None:
    """Read the owner of a claim; None: it was removed, or is still being written."""
    try:
        return Owner(**json.loads(storage.read_bytes(storage.join(folder, name))))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _state(
    folder: str, name: str, place: str, times: dict[str, float]
) -> Literal["over", "alive", "unknown"]:
    """Judge a claim: by its process on the same machine, else by its renewals."""
    # Reading comes first: on shared filesystems, opening a file makes its times those of the server.
    path, owner = storage.join(folder, name), _read(folder, name)
    if owner is not None and owner.place == place:
        if owner.pid == os.getpid() and owner.token not in _held:
            return "over"  # it could not be removed at its end
        return "alive" if _process(owner.pid) == owner.started else "over"
    try:
        time_now, renewed = storage.present_time(folder), storage.modified(path)
    except FileNotFoundError:
        return "over"
    except DataError as error:
        # The owner removes the empty folder at its end.
        if isinstance(error.__cause__, FileNotFoundError):
            return "unknown"
        raise
    before = times.setdefault(name, renewed)
    if time_now - renewed > MISSED_BEATS * BEAT_S:
        return "over"
    return "alive" if renewed != before else "unknown"


def _place() -> str:
    """Describe where a pid has a meaning: the boot of this machine, the namespace of processes, and the user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f} {os.getuid()}"


def _process(pid: int) -> str | None:
    """Return when a process started, by a clock that is never set; None if it has ended."""
    try:
        process, stat = psutil.Process(pid), Path(f"/proc/{pid}/stat")
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return (
            stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else f"{process.create_time()}"
        )
    except (psutil.NoSuchProcess, OSError):
        return None


class _Claim:
    """A claim of this process, which a thread renews.

    Args:
        folder: of the claims.
        number: of this one.
        owner: this process.
    """

    def __init__(self, folder: str, number: int, owner: Owner):
        self._folder, self._number = folder, number
        self.name, self.data = f"{number:06d}.json", json.dumps(asdict(owner)).encode()
        self.path = storage.join(folder, self.name)
        self._token, self._ended = owner.token, threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)

    def start(self) -> None:
        """Start to renew the claim."""
        self._thread.start()

    def release(self) -> None:
        """End the claim."""
        self._ended.set()
        self._thread.join()
        _held.discard(self._token)
        try:
            storage.remove(self.path)
        except Exception as error:  # the next job finds that this process has ended
            log.warning("%s could not be removed: %s", self.path, error)
        if storage.is_local(self._folder):
            with suppress(OSError):  # another job is about to take the folder
                os.rmdir(self._folder)

    def _renew(self) -> None:
        """Run the thread."""
        while not self._ended.wait(BEAT_S):
            try:
                if self.lost():
                    storage.remove(self.path)
                    log.error(
                        "%s: another job has taken over, since this one did not answer for %g s; it ends now",
                        self._folder,
                        MISSED_BEATS * BEAT_S,
                    )
                    os._exit(1)  # nothing may be written any more, not even that the run has ended
                storage.touch(self.path, self.data)
            except FileNotFoundError:  # somebody has removed it by hand
                storage.create(self.path, self.data)
            except Exception as error:  # an outage of the storage passes
                log.warning("%s could not be renewed; retrying: %s", self.path, error)

    def lost(self) -> bool:
        """Return whether another job owns the folder, by a higher number or, on some stores, by the same one."""
        if any(name > self.name for name in _names(self._folder)):
            return True
        try:
            return storage.read_bytes(self.path) != self.data
        except FileNotFoundError:
            return False
