"""The task of a training run: from rows of data to batches with targets and weights."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int

from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run


class Task(ABC):
    """Makes the batches of a training run; its randomness is a function of (seed, step, index in the batch).

    Args:
        run: with its manifest.
        device: of the batches.
    """

    def __init__(self, run: Run, device: torch.device):
        self._run, self._config, self._device = run, run.config, device
        self._shape = (run.config.train.batch, run.manifest.length)
        self._bos = run.manifest.special.bos is not None

    def facts(self) -> dict[str, Any]:
        """Return facts about the task for the checkpoint's state, as JSON values by name."""
        return {}

    def start(self, step: int, micros: Sequence[MicroBatch]) -> None:  # noqa: ARG002
        """Make the random draws of a step for the whole global batch; all ranks call it together.

        Args:
            step: counted from 0.
            micros: rows of this worker.
        """
        train = self._config.train
        self._step = step
        self._dropped = partition.draw_dropped(self._config.seed, step, train.batch, train.class_drop)

    @abstractmethod
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

    def _order(self, micro: MicroBatch) -> Int[np.ndarray, "m L"]:
        """Draw the orders of revelation of the rows of a micro-batch, for models with a causal encoder."""
        seed, given = [self._config.seed, self._step, 3], None if micro.roles is None else micro.roles.given
        return partition.draw_order(seed, micro.index, self._shape[1], self._bos, given)

    def _roles(self, micro: MicroBatch) -> Roles | None:
        """Return the roles of the rows of a micro-batch; for a masked model, answers end with a random block."""
        block = self._run.manifest.answer_block
        if micro.roles is None or block is None or self._config.model.kind != "mdlm":
            return micro.roles
        seed, batch = self._config.seed, self._shape[0]
        return partition.cut_answers(
            micro.roles, micro.index, seed=seed, step=self._step, batch=batch, block=block
        )

    def _total(self, counts: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Sum counts of all workers."""
        total = torch.from_numpy(counts).to(self._device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def _rows(
        self, micro: MicroBatch, present: Bool[np.ndarray, "m"]
    ) -> tuple[Int[np.ndarray, "m L"], Int[np.ndarray, "m"] | None]:
        """Return tokens, 0 in rows that do not count, and labels, some dropped, where model and data have any."""
        tokens, classes = np.where(present[:, None], micro.tokens, 0), self._config.model.classes
        if classes is None or micro.labels is None:  # text has no labels, whatever the model could read
            return tokens, None
        return tokens, np.where(self._dropped[micro.index], classes, micro.labels)


class Pretraining(Task):
    """The task of pretraining: the model's own objective (docs/method.md, section 2).

    Args:
        run: with its manifest.
        model: whose objective is trained.
        device: of the batches.
    """

    def __init__(self, run: Run, model: Denoiser, device: torch.device):
        super().__init__(run, device)
        self._causal = model.causal
        self._objective = Objective(run.config.diffusion, self._bos, model.both_groups, model.left_to_right)

    def start(self, step: int, micros: Sequence[MicroBatch]) -> None:
        """Draw times, groups and dropped classes of a step; see `Task.start`."""
        super().start(step, micros)
        config = self._config
        self._draws = partition.draw(
            config.diffusion, seed=config.seed, step=step, shape=self._shape, bos=self._bos
        )
        predicted = None
        if self._run.manifest.padded:
            pairs = [(self._roles(micro), micro.index >= 0) for micro in micros]
            own = [roles.counts(self._bos)[served] for roles, served in pairs if roles is not None]
            predicted = max(1, int(self._total(np.asarray(np.concatenate(own).sum()))))
        self._divisor = self._objective.normaliser(self._draws.groups, predicted)

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        """Make a micro-batch of the step that was started; see `Task.batch`."""
        tokens, labels = self._rows(micro, present)
        draws = self._draws.rows(micro.index)
        return self._objective.batch(
            tokens,
            draws,
            present,
            divisor=self._divisor,
            labels=labels,
            order=self._order(micro) if self._causal else None,
            roles=self._roles(micro),
            device=self._device,
        )
