"""The task of a training run: from rows of data to batches with targets and weights."""

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models.denoiser import Batch, Denoiser
from pipeline.run import Run


class Task(Protocol):
    """Makes the batches of a training run; its randomness is a function of (seed, step, index in the batch)."""

    def start(self, step: int) -> None:
        """Make the random draws of a step for the whole global batch.

        Args:
            step: counted from 0.
        """

    def facts(self) -> dict[str, Any]:
        """Return facts about the task for the checkpoint's state.

        Returns:
            JSON values by name.
        """

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        """Make a micro-batch of the step that was started.

        Args:
            micro: rows of this worker.
            present: which of them count; the others have weight 0.

        Shape:
            m rows in the micro-batch.

        Returns:
            The batch, on the device of the worker.
        """


class Pretraining:
    """The task of pretraining: the model's own objective (docs/method.md, section 2).

    Args:
        run: with its manifest.
        model: whose objective is trained.
        device: of the batches.
    """

    def __init__(self, run: Run, model: Denoiser, device: torch.device):
        config, self._device = run.config, device
        self._config, self._length = config, run.manifest.length
        self._bos = run.manifest.special.bos is not None
        self._objective = Objective(config.diffusion, self._bos, model.both_groups, model.left_to_right)

    def facts(self) -> dict[str, Any]:
        """Return nothing: pretraining has no rounds."""
        return {}

    def start(self, step: int) -> None:
        """Draw times, groups and dropped classes of a step; see `Task.start`."""
        config, rows = self._config, self._config.train.batch
        self._draws = partition.draw(
            config.diffusion, seed=config.seed, step=step, shape=(rows, self._length), bos=self._bos
        )
        self._dropped = partition.draw_dropped(config.seed, step, rows, config.train.class_drop)
        self._divisor = self._objective.normaliser(self._draws.groups)

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        """Make a micro-batch of the step that was started; see `Task.batch`."""
        index = micro.index
        tokens, labels = np.where(present[:, None], micro.tokens, 0), None
        if self._config.model.classes is not None and micro.labels is not None:
            labels = np.where(self._dropped[index], self._config.model.classes, micro.labels)
        draws = self._draws.rows(index)
        return self._objective.batch(
            tokens, draws, present, divisor=self._divisor, labels=labels, device=self._device
        )
