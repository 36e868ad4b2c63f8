"""A training worker's place in its group: the interface to Ray Train or to plain processes, and the hang watch."""

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

HANGS = "hangs"  # folder in the run's folder with the stacks of workers whose step did not finish


class Session(Protocol):
    """A worker's place in its group.

    Attributes:
        rank: index of this worker.
        workers: size of the group.
        device: device that this worker computes on.
    """

    rank: int
    workers: int
    device: torch.device

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Show metrics wherever this kind of session shows them.

        Args:
            metrics: values by name.
            step: number of updates done.
        """

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Move this rank's part of a checkpoint to the run's folder, in the background if possible.

        Args:
            folder: local folder with the part; it is removed.
            name: of the checkpoint's folder in the run's folder.
            metrics: reported with the checkpoint.
        """

    def settle(self) -> None:
        """Wait until everything given to `publish` is in the run's folder; all ranks call it together."""

    def notice(self) -> str | None:
        """Describe nodes that will soon be taken away; each notice is given once.

        All ranks call it together and get the same answer.

        Returns:
            The notice, or None if there is no new one.
        """


class PlainSession:
    """A session of processes that share a file system and have set up torch.distributed themselves.

    Args:
        rank: index of this worker.
        workers: size of the group.
        folder: of the run.

    Attributes:
        history: (step, metrics) of every call of `log`.
    """

    def __init__(self, rank: int, workers: int, folder: str):
        self.rank, self.workers, self.device = rank, workers, torch.device("cpu")
        self.history: list[tuple[int, dict[str, float]]] = []
        self._folder = Path(folder)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append the metrics to `history`.

        Args:
            metrics: values by name.
            step: number of updates done.
        """
        self.history.append((step, metrics))

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:  # noqa: ARG002
        """Copy this rank's part of a checkpoint to the run's folder, the list of its files last.

        Args:
            folder: local folder with the part; it is removed.
            name: of the checkpoint's folder in the run's folder.
            metrics: not used.

        Raises:
            CheckpointError: the run's folder cannot be written.
        """
        target = self._folder / name
        try:
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("files_*"))
            for listing in folder.glob("files_*"):
                shutil.copy(listing, target / listing.name)
            storage.follow_umask(target)  # the temporary folder is its owner's alone
        except OSError as error:
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first of many
            raise CheckpointError(f"{target}: the checkpoint cannot be written: {reason}") from error
        finally:
            shutil.rmtree(folder)

    def settle(self) -> None:
        """Wait until every rank has made its copies."""
        torch.distributed.barrier()

    def notice(self) -> str | None:
        """Return None: plain processes get no notices."""
        return None


class HangWatch:
    """Ends this process if a step does not finish in time, after logging the stacks of all its threads.

    Ray then restarts the group, and the loop resumes. The other workers wait in a collective operation for the
    one that hangs, so every worker has its own watch. Only the time between `begin` and `end` counts.

    Args:
        folder: of the run; the stacks are written to its `hangs/` and to the log.
        rank: of this worker, for the file's name.
        seconds: longest time of a step; None: no limit.
    """

    LINGER_S = 3.0  # time for the other workers, whose time is up as well, to write their stacks
    LAST_S = 60.0  # after this time more, the process ends even if no Python thread can run

    def __init__(self, folder: str, rank: int, seconds: float | None):
        self._folder, self._rank, self._seconds = storage.join(folder, HANGS), rank, seconds
        self._timer: threading.Timer | None = None

    def begin(self, step: int) -> None:
        """Start the time of a step.

        Args:
            step: number of updates done before it.
        """
        if self._seconds is None:
            return
        self._timer = threading.Timer(self._seconds, self._give_up, [step])
        self._timer.daemon = True
        self._timer.start()
        # A C thread, for a call that never lets Python's threads run again.
        faulthandler.dump_traceback_later(self._seconds + self.LAST_S, exit=True, file=2)

    def end(self) -> None:
        """Stop the time: the step is done, or has failed."""
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None

    def _give_up(self, step: int) -> None:
        """Write the stacks and end the process."""
        message = (
            f"worker {self._rank}: step {step + 1} has not finished in {self._seconds:g} s "
            "(cluster.hang_timeout_s); this worker ends, so that the group starts again"
        )
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        log.error("%s. Its threads:\n%s", message, stacks)
        name = f"step_{step + 1:08d}_worker_{self._rank:05d}.txt"
        try:
            storage.publish_text(storage.join(self._folder, name), f"{message}\n\n{stacks}")
        except Exception as error:  # the storage may be what hangs
            log.error("the stacks cannot be written to %s: %s", self._folder, error)
        time.sleep(self.LINGER_S)
        os._exit(1)
