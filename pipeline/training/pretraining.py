"""What a step of training asks of the model: from rows of data to a batch with targets and weights."""

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models.denoiser import Batch, Denoiser


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

    def __init__(self, config: RunConfig, manifest: Manifest, model: Denoiser, device: torch.device):
        self._config, self._device = config, device
        self._length, self._bos = manifest.length, manifest.special.bos is not None
        self._objective = Objective(config.diffusion, self._bos, model.both_groups, model.left_to_right)

    def facts(self) -> dict[str, Any]:
        return {}

    def start(self, step: int) -> None:
        config, rows = self._config, self._config.train.batch
        self._draws = partition.draw(
            config.diffusion, seed=config.seed, step=step, shape=(rows, self._length), bos=self._bos
        )
        self._dropped = partition.draw_dropped(config.seed, step, rows, config.train.class_drop)
        self._divisor = self._objective.normaliser(self._draws.groups)

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        index = micro.index
        tokens, labels = np.where(present[:, None], micro.tokens, 0), None
        if self._config.model.classes is not None and micro.labels is not None:
            labels = np.where(self._dropped[index], self._config.model.classes, micro.labels)
        draws = self._draws.rows(index)
        return self._objective.batch(
            tokens, draws, present, divisor=self._divisor, labels=labels, device=self._device
        )
