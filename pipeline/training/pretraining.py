"""The task of a training run: from rows of data to batches with targets and weights."""

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.objective import next_token_batch, normaliser, training_batch
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
        self._config, self._model, self._device = run.config, model, device
        self._length, self._bos = run.manifest.length, run.manifest.special.bos is not None

    def facts(self) -> dict[str, Any]:
        """Return nothing: pretraining has no rounds."""
        return {}

    def start(self, step: int) -> None:
        """Draw times, groups and dropped classes of a step; see `Task.start`."""
        config, diffusion = self._config, self._config.diffusion
        rows = config.train.batch
        self._t, self._groups = partition.draw(
            config.seed, step, rows, self._length, diffusion.eps, self._bos, diffusion.schedule
        )
        self._dropped = partition.draw_dropped(config.seed, step, rows, config.train.class_drop)
        self._divisor = normaliser(self._groups, diffusion, self._model.both_groups, self._bos)

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        """Make a micro-batch of the step that was started; see `Task.batch`."""
        index, train = micro.index, self._config.train
        tokens, labels = np.where(present[:, None], micro.tokens, 0), None
        if self._config.model.classes is not None and micro.labels is not None:
            labels = np.where(self._dropped[index], self._config.model.classes, micro.labels)
        if self._model.left_to_right:
            return next_token_batch(tokens, present, train.batch, self._bos, self._device, labels)
        return training_batch(
            tokens,
            self._t[index],
            self._groups[index],
            present,
            self._config.diffusion,
            self._model.both_groups,
            self._divisor,
            self._bos,
            self._device,
            labels,
        )
