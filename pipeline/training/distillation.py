"""Self-Distillation Through Time (SDTT): a student learns to do in one step what its teacher does in two."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import storage, trained
from pipeline.config.model import ModelConfig
from pipeline.config.schema import DiffusionConfig, DistillConfig
from pipeline.data.reading_order import MicroBatch
from pipeline.diffusion import partition
from pipeline.diffusion.partition import StepDraws
from pipeline.diffusion.schedule import complement
from pipeline.errors import CapabilityError, CheckpointError, ConfigError, DataError
from pipeline.models import model_folder
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import DistillTargets
from pipeline.run import Run
from pipeline.runtime.session import Session
from pipeline.sampling.rollout import roll_out
from pipeline.training import checkpoint
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine
from pipeline.training.pretraining import Prepared, Task
from pipeline.training.resume import differences
from pipeline.training.slices import fill

log = logging.getLogger(__name__)

ORIGIN = "origin.json"  # file in the first teacher's folder: where it was copied from
Form = Literal["compatible", "complementary"]


class Sides(NamedTuple):
    """What is hidden from the teacher: one roll-out of every row, or two.

    Attributes:
        hidden: positions that are hidden in each roll-out.
        time: that hides them.

    Shape:
        B rows of L positions, S roll-outs of each.
    """

    hidden: Bool[np.ndarray, "B S L"]
    time: Float[np.ndarray, "B S"]


class RollOut(NamedTuple):
    """What the teacher is given beside a batch.

    Attributes:
        sides: what is hidden from it.
        noise: uniforms, as `teach` takes them.
        roles: given tokens and padding of the rows; None: neither.
    """

    sides: Sides
    noise: Float[np.ndarray, "B 2 2 L"]
    roles: Roles | None


def time_step(config: DistillConfig, done: int) -> float:
    """Return dt of the teacher's steps after `done` finished rounds; it doubles every round.

    Args:
        config: of the distillation.
        done: number of finished rounds.
    """
    return 2**done / config.teacher_steps


def sampling_steps(config: DistillConfig, done: int) -> int:
    """Return the number of steps that a model is made for after `done` rounds; it halves every round.

    Args:
        config: of the distillation.
        done: number of finished rounds.
    """
    return config.teacher_steps // 2**done


def teacher_folder(folder: str, done: int) -> str:
    """Return the folder of the teacher after `done` finished rounds; 0 is the given teacher.

    Args:
        folder: of the run.
        done: number of finished rounds.
    """
    return storage.join(folder, "rounds", f"{done}")


def hidden_sides(draws: StepDraws, dt: float, form: Form, eps: float, bos: bool) -> Sides:
    """Find what is hidden from the teacher, and the time that hides it.

    Group 1 is hidden at t. In the complementary form, group 0 is hidden too, in a roll-out of its own: it is what
    masking at time t' hides, clamped to the times from which two steps are possible.

    Args:
        draws: time and groups of every row.
        dt: of the teacher's steps.
        form: of the distillation.
        eps: of the noise schedule.
        bos: whether position 0 is BOS, which is never hidden.

    Returns:
        One roll-out (compatible form) or two.

    Source:
        docs/method.md, section 5.
    """
    if form == "compatible":
        return Sides(draws.groups[:, None], draws.t[:, None])
    others = ~draws.groups
    others[:, :bos] = False
    time = np.clip(complement(draws.t, eps, "matched"), 2 * dt, 1.0)
    return Sides(np.stack([draws.groups, others], axis=1), np.stack([draws.t, time], axis=1))


def teach(
    teacher: Denoiser,
    tokens: Int[np.ndarray, "B L"],
    sides: Sides,
    noise: Float[np.ndarray, "B 2 2 L"],
    dt: float,
    labels: Int[np.ndarray, "B"] | None = None,
    order: Int[np.ndarray, "B L"] | None = None,
    roles: Roles | None = None,
) -> Float[Tensor, "Q H"]:
    """Compute the teacher's vectors at all hidden positions, in the order of `Batch.target_index`.

    All roll-outs of all rows are computed together, row 0's first.

    Args:
        teacher: whose two steps are taken.
        tokens: clean rows.
        sides: what is hidden, and at which time.
        noise: uniforms for every roll-out: what the first step reveals, and which tokens it draws.
        dt: of the teacher's steps.
        labels: class of every row; None for an unconditional teacher.
        order: ranks by which the tokens of a row were revealed; None: ascending positions.
        roles: given tokens and padding of the rows, which are never hidden; None: neither.

    Shape:
        B rows of L positions; Q hidden positions; H hidden size.

    Returns:
        The vectors before the teacher's head.
    """
    count, length = sides.hidden.shape[1:]
    condition = None if labels is None else torch.from_numpy(labels.repeat(count))
    extents = None if roles is None else roles.lengths.repeat(count).tolist()
    return roll_out(
        teacher,
        torch.from_numpy(tokens.repeat(count, axis=0)),
        torch.from_numpy(sides.hidden.reshape(-1, length)),
        time=torch.from_numpy(sides.time.reshape(-1)),
        dt=dt,
        noise=torch.from_numpy(noise[:, :count].reshape(-1, 2, length)),
        order=None if order is None else torch.from_numpy(order.repeat(count, axis=0)),
        state=teacher.open(len(tokens) * count, condition, extents=extents),
    )


class Distillation(Task):
    """The task of distillation: match the teacher's two steps on rows of data (docs/method.md, section 5).

    A round takes `train.steps / rounds` steps. Its teacher is a model folder of the run, so that a resumed run
    finds it again. The student of a finished round is the teacher and the starting point of the next one.

    Args:
        run: with its manifest.
        engine: of the student.
        ema: of the student.
        session: this worker's place in its group.
    """

    def __init__(self, run: Run, engine: Engine, ema: EMA, session: Session) -> None:
        super().__init__(run, engine.model, session.device, sums=True)
        self._distill, self._engine, self._ema, self._session = run.distill, engine, ema, session
        self._every = run.config.train.steps // run.distill.rounds
        self._round: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return the round, counted from 1, and the folder of its teacher."""
        assert self._round is not None
        return {"round": self._round + 1, "teacher": teacher_folder(self._run.folder, self._round)}

    def prepare(self, step: int, micros: Sequence[MicroBatch], skipped: Collection[int]) -> list[Prepared]:
        """Draw times, groups, dropped classes and the teacher's noise of a step; see `Task.prepare`."""
        micros, done = self._micro_batches(step, micros), step // self._every
        dt, form, eps = time_step(self._distill, done), self._distill.form, self._config.diffusion.eps
        draws = [self._draw(DiffusionConfig(eps=eps), step, micro, least=2 * dt) for micro in micros]
        sides = [
            self._without_roles(micro, hidden_sides(drawn, dt, form, eps, self._bos))
            for micro, drawn in zip(micros, draws, strict=True)
        ]
        own = sum(
            side.hidden[micro.index >= 0].sum((0, 2)) for micro, side in zip(micros, sides, strict=True)
        )
        # The mean over the targets of a roll-out in the global batch, and the mean over the roll-outs.
        divisors = self._sum(own).clip(min=1) * len(own)
        return [
            self._prepare(step, micro, groups, side, divisors, micro.present(skipped))
            for micro, (_, groups), side in zip(micros, draws, sides, strict=True)
        ]

    def _without_roles(self, micro: MicroBatch, sides: Sides) -> Sides:
        """Hide neither given tokens nor padding."""
        if micro.roles is None:
            return sides
        return sides._replace(hidden=sides.hidden & micro.roles.targets(self._shape[1], self._bos)[:, None])

    def _prepare(
        self,
        step: int,
        micro: MicroBatch,
        groups: Bool[np.ndarray, "m L"],
        sides: Sides,
        divisors: Int[np.ndarray, "S"],
        present: Bool[np.ndarray, "m"],
    ) -> Prepared:
        """Make one micro-batch, without the teacher's vectors."""
        tokens, labels = self._rows(step, micro, present)
        if self._bos:
            tokens[:, 0] = self._run.manifest.special.bos
        weights = (sides.hidden / divisors[:, None]).sum(1) * present[:, None]
        order = self._order(step, micro) if self._model.causal else None  # as its teacher
        targets, roles = np.any(sides.hidden, axis=1), micro.roles
        if roles is not None:  # given tokens are hidden on no side
            groups = groups & roles.targets(self._shape[1], self._bos)
        batch = Batch.of_arrays(
            tokens, groups, targets, weights, labels=labels, order=order, roles=roles, device=self._device
        )
        rng = np.random.default_rng([self._config.seed, step, 2])
        noise = partition.uniforms_of_rows(rng, self._places(micro), (2, 2, tokens.shape[1]))
        return self._ahead(micro.index, batch, RollOut(sides, noise, roles))

    def reads_weights(self, step: int) -> bool:
        """Return whether a round begins; see `Task.reads_weights`."""
        return step % self._every == 0

    def start(self, step: int) -> None:
        """Load the teacher of a round at its first step; see `Task.start`.

        Raises:
            CheckpointError: the teacher of the round is missing.
        """
        done, inside = divmod(step, self._every)
        if done != self._round:
            self._begin(done, at_its_start=inside == 0)
        self._dt = time_step(self._distill, done)

    def batch(self, prepared: Prepared) -> Batch:
        """Add the teacher's vectors to a micro-batch; see `Task.batch`."""
        batch, (sides, noise, roles) = super().batch(prepared), prepared.roll_out
        labels, order = (None if x is None else x.numpy() for x in (batch.condition, batch.order))
        tokens = batch.tokens.numpy()
        with self._engine.assembled(self._teacher):
            vectors = teach(
                self._teacher, tokens, sides, noise, self._dt, labels=labels, order=order, roles=roles
            )
        places = self._teacher.places_of(batch)
        distill_targets = DistillTargets(vectors, self._teacher.head, self._distill.divergence, places)
        return replace(batch, distill_targets=distill_targets)

    def _begin(self, done: int, at_its_start: bool) -> None:
        """Load the teacher of a round; at the round's first step it is the student as it is now."""
        where = teacher_folder(self._run.folder, done)
        if at_its_start and done > 0:
            source = self._ema.slices if self._distill.next_teacher == "ema" else self._engine.masters()
            weights = self._engine.whole(source)
            if self._session.rank == 0:  # overwrites that of an earlier start
                checkpoint.publish_model(self._run, where, weights, figures={}, tokenizer=None)
            dist.barrier()
            self._engine.restart(weights, keep_optimizer=self._distill.optimizer == "keep")
            fill(self._ema.slices, weights)
        if not storage.folder_complete(where):
            raise CheckpointError(
                f"{where}: the teacher of round {done + 1} is missing; expected a model folder"
            )
        self._teacher = self._engine.frozen(model_folder.read(storage.fetch(where))[0])
        self._engine.fresh = done * self._every if self._distill.optimizer == "reset" else 0
        self._round = done
        if self._session.rank == 0:
            log.info(
                f"round {done + 1} of {self._distill.rounds}: teacher {where}, "
                f"dt 1/{1 / time_step(self._distill, done):g}, "
                f"for {sampling_steps(self._distill, done + 1)} sampling steps"
            )


def with_teacher(run: Run) -> Run:
    """Give a run its teacher's model section, and let it start from the teacher's weights.

    The teacher is copied into the run's folder. From the first checkpoint on, that copy is the teacher, even if
    the name in the config then means another model.

    Args:
        run: of a config with a `distill` section.

    Returns:
        The run with `model` and `train.init_from` set.

    Raises:
        CheckpointError: no such folder, file or model version.
        CapabilityError: an autoregressive teacher, or a form that its kind does not have.
        ConfigError: no distill section, another start, or keys that do not go with the teacher's model.
    """
    config, distill = run.config, run.config.distill
    if distill is None:
        raise ConfigError("distill: missing; expected a section with the teacher")
    where = teacher_folder(run.folder, 0)
    if config.train.init_from not in (None, where):
        raise ConfigError(
            f"train.init_from: {config.train.init_from!r}; expected null, a student starts as its teacher"
        )
    if checkpoint.newest(run.folder) is None or not storage.folder_complete(where):
        model = _place(run, where)
    else:
        model, _ = model_folder.read_config(storage.fetch(where))
        _check_model(run, model)
    train = config.train.model_copy(update={"init_from": where})
    run = run.configured(model=model, train=train)
    if conflicts := run.config.conflicts():
        raise ConfigError("with the teacher's model:\n" + "\n".join(f"  {line}" for line in conflicts))
    return run


def _place(run: Run, where: str) -> ModelConfig:
    """Copy the teacher that the config names into the run's folder; return its model section."""
    local, name = run.find_model("distill.teacher", run.distill.teacher)
    teacher = trained.read(local, uri=run.tracking_uri)
    _check_model(run, teacher.config)
    with storage.publishing_folder(where) as copy:
        tensors = teacher.denoiser.state_dict()
        model_folder.write(copy, teacher.config, teacher.facts, tensors, model_folder.Background())
        origin_facts = {"teacher": name, "tokenizer": teacher.tokenizer and teacher.tokenizer.hash}
        (copy / ORIGIN).write_text(json.dumps(origin_facts) + "\n", encoding="utf-8")
    return teacher.config


def _check_model(run: Run, model: ModelConfig) -> None:
    """Refuse a teacher that cannot be distilled as the config says."""
    origin = f"distill.teacher: {run.distill.teacher!r}"
    if model.kind == "ar":
        raise CapabilityError(
            f"{origin} is autoregressive: it draws one token per step in a fixed order, so two of its steps cannot "
            "become one; expected a pgm or mdlm teacher"
        )
    if run.distill.form == "complementary" and model.kind != "pgm":
        raise CapabilityError(
            f"distill.form: complementary, but {origin} is of kind {model.kind}; expected pgm, or compatible"
        )
    differing = [
        f"  model.{key}: {student!r}, the teacher's is {teacher!r}"
        for key, (student, teacher) in differences(run.config.model.model_dump(), model.model_dump()).items()
    ]
    if differing and "model" in run.config.model_fields_set:
        raise ConfigError(
            f"the model section is not that of {origin}; leave it out, then the teacher's is used:\n"
            + "\n".join(differing)
        )


def read_origin(folder: str) -> dict[str, Any]:
    """Read where the first teacher was copied from, and the hash of its tokenizer.

    Args:
        folder: of the run.

    Returns:
        `teacher`, a folder, a file, or the model version behind an alias; and `tokenizer`, its hash or None.
    """
    path = storage.join(teacher_folder(folder, 0), ORIGIN)
    return storage.read_json(
        path, parse=lambda origin: {key: origin[key] for key in ("teacher", "tokenizer")}
    )


def check_teacher(run: Run) -> None:
    """Refuse a teacher of another vocabulary, tokenizer or length than the data.

    Args:
        run: with its manifest.

    Raises:
        DataError: names every difference.
    """
    manifest = run.manifest
    _, facts = model_folder.read_config(storage.fetch(teacher_folder(run.folder, 0)))
    pairs: dict[str, tuple[object, object]] = {
        "vocabulary": (facts.vocab_size, manifest.vocabulary),
        "length": (facts.length, manifest.length),
        "BOS": (facts.bos, manifest.special.bos),
    }
    if tokenizer := read_origin(run.folder)["tokenizer"]:  # None for released files
        pairs["tokenizer (hash)"] = (tokenizer, manifest.tokenizer.hash)
    differing = [
        f"{key} {of_teacher}, the data's is {of_data}"
        for key, (of_teacher, of_data) in pairs.items()
        if of_teacher != of_data
    ]
    if differing:
        raise DataError(
            f"distill.teacher: {run.distill.teacher!r} does not fit the data: " + "; ".join(differing)
        )
