"""What a step of training asks of the model: from rows of data to a batch with targets and weights."""

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
    """What the loop trains for; everything random in it is a function of (seed, step, index in the batch)."""

    def start(self, step: int) -> None:
        """Draw what concerns the whole global batch of a step."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint should say about the task."""

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        """A micro-batch of that step; rows that are not present weigh nothing."""


class Pretraining:
    """The models' own objectives on rows of data."""

    def __init__(self, run: Run, model: Denoiser, device: torch.device):
        self._config, self._model, self._device = run.config, model, device
        self._length, self._bos = run.manifest.length, run.manifest.special.bos is not None

    def facts(self) -> dict[str, Any]:
        return {}

    def start(self, step: int) -> None:
        config, diffusion = self._config, self._config.diffusion
        rows = config.train.batch
        self._t, self._groups = partition.draw(
            config.seed, step, rows, self._length, diffusion.eps, self._bos, diffusion.schedule
        )
        self._dropped = partition.draw_dropped(config.seed, step, rows, config.train.class_drop)
        self._divisor = normaliser(self._groups, diffusion, self._model.both_groups, self._bos)

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
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
