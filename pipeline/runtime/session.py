"""What one worker's loop needs from whatever started it: Ray Train, or plain processes."""

import faulthandler
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

import torch

from pipeline import storage
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

HANGS = "hangs"  # folder in the run's folder: what workers were doing whose step did not finish


class Session(Protocol):
    """A worker's place in its group.

    Attributes:
        rank, workers: this worker's index and the size of the group.
        device: where it computes.
    """

    rank: int
    workers: int
    device: torch.device

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Show metrics wherever this kind of session has a place for them."""

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Move this rank's part of a checkpoint to the run's folder, in the background if possible."""

    def settle(self) -> None:
        """Return once all that was given to `publish` is in the run's folder; all ranks call it together."""

    def notice(self) -> str | None:
        """What is known of nodes that will soon be taken away, once for each; all ranks call it together."""


class PlainSession:
    """Processes that share a file system and have set torch.distributed up themselves."""

    def __init__(self, rank: int, workers: int, run: str):
        self.rank, self.workers, self.device = rank, workers, torch.device("cpu")
        self.history: list[tuple[int, dict[str, float]]] = []
        self._run = Path(run)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Remember them."""
        self.history.append((step, metrics))

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:  # noqa: ARG002
        """Copy at once, the list of files last.

        Raises:
            CheckpointError: the run's folder cannot be written.
        """
        target = self._run / name
        try:
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("files_*"))
            for listing in folder.glob("files_*"):
                shutil.copy(listing, target / listing.name)
        except OSError as error:
            why = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first of many
            raise CheckpointError(f"{target}: the checkpoint cannot be written: {why}") from error
        finally:
            shutil.rmtree(folder)

    def settle(self) -> None:
        """Copies are made at once, but every rank must have made its own."""
        torch.distributed.barrier()

    def notice(self) -> str | None:
        """Nobody tells plain processes."""
        return None


class HangWatch:
    """Ends this process if a step does not finish in time, after writing down what all its threads do.

    Ray then starts the group again, and the loop resumes. The others of the group wait in a collective for the
    one that hangs, so every worker has its own watch. Only what lies between `begin` and `end` counts.

    Args:
        run: folder under whose `hangs/` the stacks are written; they also go to the log.
        rank: of this worker, for the file's name.
        seconds: that a step may take; None: any time.
    """

    LINGER = 3.0  # seconds in which the other workers, whose time is up too, can write theirs
    LAST = 60.0  # seconds after which the process ends even if nothing of Python runs in it any more

    def __init__(self, run: str, rank: int, seconds: float | None):
        self._folder, self._rank, self._seconds = storage.join(run, HANGS), rank, seconds
        self._began: float | None = None
        self._step = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="hang-watch", daemon=True)
        if seconds is not None:
            self._thread.start()

    def begin(self, step: int) -> None:
        """A step starts."""
        self._step, self._began = step, time.monotonic()
        if self._seconds is not None:  # a thread of C, for a call that never lets Python's threads run again
            faulthandler.dump_traceback_later(self._seconds + self.LAST, exit=True, file=2)

    def end(self) -> None:
        """It is done, or failed."""
        self._began = None
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(min(1.0, self._seconds / 10)):
            began = self._began
            if began is not None and time.monotonic() - began > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        what = (
            f"worker {self._rank}: step {self._step + 1} has not finished in {self._seconds:g} s "
            "(cluster.hang_timeout_s); this worker ends, so that the group starts again"
        )
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        log.error("%s. Its threads:\n%s", what, stacks)
        name = f"step_{self._step + 1:08d}_worker_{self._rank:05d}.txt"
        try:
            storage.publish_text(storage.join(self._folder, name), f"{what}\n\n{stacks}")
        except Exception as error:  # storage may be what hangs
            log.error("the stacks cannot be written to %s: %s", self._folder, error)
        time.sleep(self.LINGER)
        os._exit(1)

    def close(self) -> None:
        """End the thread."""
        self.end()
        self._over.set()
        if self._seconds is not None:
            self._thread.join()
