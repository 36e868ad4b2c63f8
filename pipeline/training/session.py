"""What one worker's loop needs from whatever started it: Ray Train, or plain processes."""

import shutil
from pathlib import Path
from typing import Protocol

import torch


class Session(Protocol):
    """A worker's place in its group.

    Attributes:
        rank, workers: this worker's index and the size of the group.
        device: where it computes.
    """

    rank: int
    workers: int
    device: torch.device

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Move this rank's part of a checkpoint to the run's folder, in the background if possible."""


class PlainSession:
    """Processes that share a file system and have set torch.distributed up themselves."""

    def __init__(self, rank: int, workers: int, run: str):
        self.rank, self.workers, self.device = rank, workers, torch.device("cpu")
        self._run = Path(run)

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:  # noqa: ARG002
        """Copy at once, the list of files last."""
        target = self._run / name
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("files_*"))
        for listing in folder.glob("files_*"):
            shutil.copy(listing, target / listing.name)
        shutil.rmtree(folder)
