"""The task of a training run: from rows of data to batches with targets and weights."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int

from pipeline.config.schema import DiffusionConfig
from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import StepDraws
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run


@dataclass(frozen=True)
class Prepared:
    """A micro-batch, made while the step before it is trained on.

    Attributes:
        index: place of each row in the global batch; -1 for missing ones, whose weight is 0.
        batch: on the host.
        roll_out: what a distillation's teacher is given beside the batch.
        sent: recorded behind the copies to the GPU; None: the device is none.
    """

    index: Int[np.ndarray, "m"]
    batch: Batch
    roll_out: Any = None
    sent: torch.cuda.Event | None = None


class Task(ABC):
    """Makes the batches of a training run; its randomness is a function of (seed, step, index in the batch).

    `prepare` runs in the thread that reads ahead, on all ranks for the same steps. What it sums over the ranks goes
    through a process group of its own, so that it cannot mix with the collectives of the step in progress.

    Args:
        run: with its manifest.
        model: that is trained.
        device: that computes on the batches.
        sums: whether `prepare` sums anything over the ranks.
    """

    def __init__(self, run: Run, model: Denoiser, device: torch.device, sums: bool):
        self._run, self._config, self._model, self._device = run, run.config, model, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shape = (run.config.train.batch, run.manifest.length)
        self._bos = run.manifest.special.bos is not None
        self._group: Any = dist.new_group(backend="gloo") if sums else None

    def close(self) -> None:
        """Release the process group, after the last `prepare`."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def facts(self) -> dict[str, Any]:
        """Return facts about the task for the checkpoint's state, as JSON values by name."""
        return {}

    @abstractmethod
    def prepare(self, step: int, micros: Sequence[MicroBatch], skipped: Collection[int]) -> list[Prepared]:
        """Make the micro-batches of a step, and send them to the device.

        Args:
            step: counted from 0.
            micros: rows of this worker.
            skipped: places in the global batch that have weight 0.
        """

    def reads_weights(self, step: int) -> bool:  # noqa: ARG002
        """Return whether `start` of a step reads the weights or their average, which must then be those before it.

        Args:
            step: counted from 0.
        """
        return False

    def start(self, step: int) -> None:  # noqa: B027
        """Get ready for a step; all ranks call it together.

        Args:
            step: counted from 0.
        """

    def batch(self, prepared: Prepared) -> Batch:
        """Complete a micro-batch of the step that was started.

        Args:
            prepared: from `prepare`.

        Returns:
            The batch.
        """
        if prepared.sent is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(prepared.sent)
            for tensor in prepared.batch.on_device:
                tensor.record_stream(stream)  # made for another stream, it must outlive its use in this one
        return prepared.batch

    def _ahead(self, index: Int[np.ndarray, "m"], batch: Batch, roll_out: Any = None) -> Prepared:
        """Let the model prepare a batch; on a GPU its copies run beside what the GPU computes."""
        with torch.cuda.stream(self._copies):  # does nothing without a stream
            self._model.prepare(batch)
        return Prepared(index, batch, roll_out, self._copies.record_event() if self._copies else None)

    def _sum(self, counts: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Sum numbers over all ranks."""
        total = torch.from_numpy(np.asarray(counts, dtype=np.int64))
        dist.all_reduce(total, group=self._group)
        return total.numpy()

    def _with_roles(self, step: int, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Set the roles of a step's rows.

        For a masked model, answers end with a random block. Of a caption and its image, either may be given; an
        autoregressive model learns both, from left to right.
        """
        manifest, kind = self._run.manifest, self._config.model.kind
        block, caption, (batch, length) = manifest.answer_block, manifest.caption, self._shape
        seed = self._config.seed

        def roles(micro: MicroBatch) -> Roles | None:
            places = self._places(micro)
            if caption is not None and kind != "ar":
                own = {"caption": caption, "length": length}
                return partition.draw_given(places, seed=seed, step=step, batch=batch, **own)
            if micro.roles is None or block is None or kind != "mdlm":
                return micro.roles
            return partition.cut_answers(micro.roles, places, seed=seed, step=step, batch=batch, block=block)

        return [replace(micro, roles=roles(micro)) for micro in micros]

    def _places(self, micro: MicroBatch) -> Int[np.ndarray, "m"]:
        """Return the places in the global batch whose draws rows get; missing rows get those of the last one."""
        return micro.index % self._shape[0]

    def _draw(
        self, config: DiffusionConfig, step: int, micro: MicroBatch, least: float | None = None
    ) -> StepDraws:
        """Draw times and groups of the rows of a micro-batch."""
        return partition.draw(
            config,
            seed=self._config.seed,
            step=step,
            shape=self._shape,
            bos=self._bos,
            least=least,
            rows=self._places(micro),
        )

    def _order(self, step: int, micro: MicroBatch) -> Int[np.ndarray, "m L"]:
        """Draw the orders of revelation of the rows of a micro-batch, for models with a causal encoder."""
        seed = [self._config.seed, step, 3]
        given = None if micro.roles is None else micro.roles.known(self._shape[1])
        return partition.draw_order(seed, self._places(micro), self._shape[1], self._bos, given)

    def _rows(
        self, step: int, micro: MicroBatch, present: Bool[np.ndarray, "m"]
    ) -> tuple[Int[np.ndarray, "m L"], Int[np.ndarray, "m"] | None]:
        """Return tokens, 0 in rows that do not count, and labels, some dropped, where model and data have any."""
        tokens, classes = np.where(present[:, None], micro.tokens, 0), self._config.model.classes
        if classes is None or micro.labels is None:  # text has no labels, whatever the model could read
            return tokens, None
        train = self._config.train
        dropped = partition.draw_dropped(self._config.seed, step, train.batch, train.class_drop)
        return tokens, np.where(dropped[micro.index], classes, micro.labels)


class Pretraining(Task):
    """The task of pretraining: the model's own objective (docs/method.md, section 2).

    Args:
        run: with its manifest.
        model: whose objective is trained.
        device: that computes on the batches.
    """

    def __init__(self, run: Run, model: Denoiser, device: torch.device):
        bos = run.manifest.special.bos is not None
        self._objective = Objective(run.config.diffusion, bos, model.both_groups, model.left_to_right)
        roles = run.manifest.padded or run.manifest.caption is not None
        self._sums = roles or self._objective.counts_groups
        super().__init__(run, model, device, self._sums)

    def prepare(self, step: int, micros: Sequence[MicroBatch], skipped: Collection[int]) -> list[Prepared]:
        """Draw times, groups and dropped classes of a step; see `Task.prepare`."""
        micros = self._with_roles(step, micros)
        draws = [self._draw(self._config.diffusion, step, micro) for micro in micros]
        divisor = self._divisor(micros, draws)
        return [
            self._prepare(step, micro, drawn, divisor, skipped)
            for micro, drawn in zip(micros, draws, strict=True)
        ]

    def _prepare(
        self, step: int, micro: MicroBatch, draws: StepDraws, divisor: int, skipped: Collection[int]
    ) -> Prepared:
        """Make one micro-batch."""
        present = micro.present(skipped)
        tokens, labels = self._rows(step, micro, present)
        batch = self._objective.batch(
            tokens,
            draws,
            present,
            divisor=divisor,
            labels=labels,
            order=self._order(step, micro) if self._model.causal else None,
            roles=micro.roles,
            device=self._device,
        )
        return self._ahead(micro.index, batch)

    def _divisor(self, micros: Sequence[MicroBatch], draws: Sequence[StepDraws]) -> int:
        """Return the normaliser of the global batch: a constant, or a sum over the ranks."""
        if not self._sums:
            return self._objective.normaliser(np.empty(self._shape, dtype=bool))
        own = 0
        for micro, drawn in zip(micros, draws, strict=True):
            there = micro.index >= 0
            predicted = None if micro.roles is None else int(micro.roles.counts(self._bos)[there].sum())
            own += self._objective.count(drawn.groups[there], predicted)
        return max(1, int(self._sum(np.array(own))))
