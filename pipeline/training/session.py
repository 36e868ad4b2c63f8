"""What one worker's loop needs from whatever started it: Ray Train, or plain processes."""

import shutil
import threading
from pathlib import Path
from typing import Protocol

import torch

from pipeline import storage
from pipeline.errors import CheckpointError

STOP = "stop"  # file in the run's folder: finish the step, save, and end


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


class StopWatch:
    """Looks for the run's stop file every second, in a thread, so that no step waits for storage."""

    def __init__(self, run: str):
        self.requested = False
        self._path = storage.join(run, STOP)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stop-watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self.requested and not self._over.wait(1.0):
            self.requested = storage.exists(self._path)

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()
