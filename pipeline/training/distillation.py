"""Self-Distillation Through Time: a student learns in one step what its teacher does in two, round after round."""

import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import storage, tracking
from pipeline.config.load import flatten
from pipeline.config.schema import DiffusionConfig, DistillConfig, ModelConfig, RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.reading_order import MicroBatch
from pipeline.data.tokenizers import saved_tokenizer
from pipeline.diffusion import partition
from pipeline.diffusion.schedule import complement
from pipeline.errors import CapabilityError, CheckpointError, ConfigError, DataError
from pipeline.models import model_folder
from pipeline.models.denoiser import Batch, Denoiser
from pipeline.models.distill_loss import DistillTargets
from pipeline.models.released import conversion
from pipeline.runtime.session import Session
from pipeline.sampling.rollout import roll_out
from pipeline.training import checkpoint
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine

log = logging.getLogger(__name__)

ORIGIN = "origin.json"  # in the first teacher's folder: what it was when it was copied there
Form = Literal["compatible", "complementary"]
Side = tuple[
    Bool[np.ndarray, "B L"], Float[np.ndarray, "B"]
]  # hidden positions, and the time that hides them


def time_step(config: DistillConfig, done: int) -> float:
    """dt of the teacher's steps in the round after `done` finished ones; it doubles every round."""
    return 2**done / config.teacher_steps


def sampling_steps(config: DistillConfig, done: int) -> int:
    """Steps that a model is made for after `done` rounds: half as many after each."""
    return config.teacher_steps // 2**done


def teacher_folder(run: str, done: int) -> str:
    """Model folder of the teacher of the round after `done` finished ones: 0 is the one that was given."""
    return storage.join(run, "rounds", f"{done}")


def hidden_sides(
    groups: Bool[np.ndarray, "B L"],
    t: Float[np.ndarray, "B"],
    dt: float,
    form: Form,
    eps: float,
    bos: bool,
) -> list[Side]:
    """What is hidden from the teacher, and at which time: group 1 at t, and in the complementary form group 0 too.

    Group 0 is what masking at time t' hides, which is clamped to the times from which two steps are possible.

    Source: method.md section 5.
    """
    if form == "compatible":
        return [(groups, t)]
    others = ~groups
    others[:, :bos] = False
    return [(groups, t), (others, np.clip(complement(t, eps, "matched"), 2 * dt, 1.0))]


def teach(
    teacher: Denoiser,
    tokens: Int[np.ndarray, "B L"],
    sides: list[Side],
    noise: Float[np.ndarray, "B sides 2 L"],
    dt: float,
    labels: Int[np.ndarray, "B"] | None = None,
) -> Float[Tensor, "Q H"]:
    """The teacher's vectors at everything that the sides hide, in the order of `Batch.target_index`.

    All sides of all rows are rolled out together, row 0's first.

    Args:
        noise: uniforms for every side: what the first step reveals, and which tokens it draws.
    """
    count = len(sides)

    def interleaved(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]))

    return roll_out(
        teacher,
        torch.from_numpy(tokens.repeat(count, axis=0)),
        interleaved([hidden for hidden, _ in sides]),
        time=interleaved([time for _, time in sides]),
        dt=dt,
        noise=interleaved([noise[:, side] for side in range(count)]),
        condition=None if labels is None else torch.from_numpy(labels.repeat(count)),
    )


class Distillation:
    """Task of a distillation run: matching the teacher's two steps on rows of data (method.md section 5).

    Round r takes `train.steps / rounds` steps. Its teacher is a model folder of the run, so that a resumed run
    finds the teacher that it had; the student of a round that ends becomes the next one's teacher and starting
    point.
    """

    def __init__(
        self, config: RunConfig, manifest: Manifest, engine: Engine, ema: EMA, session: Session
    ) -> None:
        assert config.distill is not None
        self._config, self._distill, self._session = config, config.distill, session
        self._manifest, self._engine, self._ema = manifest, engine, ema
        self._length, self._bos = manifest.length, manifest.special.bos is not None
        self._run = checkpoint.run_folder(config)
        self._every = config.train.steps // self._distill.rounds
        self._round: int | None = None

    def facts(self) -> dict[str, Any]:
        assert self._round is not None
        return {"round": self._round + 1, "teacher": teacher_folder(self._run, self._round)}

    def start(self, step: int) -> None:
        config = self._config
        done, inside = divmod(step, self._every)
        if done != self._round:
            self._begin(done, at_its_start=inside == 0)
        self._dt = time_step(self._distill, done)
        rows, eps = config.train.batch, config.diffusion.eps
        t, self._groups = partition.draw(
            DiffusionConfig(eps=eps),
            seed=config.seed,
            step=step,
            shape=(rows, self._length),
            bos=self._bos,
            least=2 * self._dt,
        )
        self._sides = hidden_sides(self._groups, t, self._dt, self._distill.form, eps, self._bos)
        self._dropped = partition.draw_dropped(config.seed, step, rows, config.train.class_drop)
        self._noise = np.random.default_rng([config.seed, step, 2]).random((rows, 2, 2, self._length))

    def batch(self, micro: MicroBatch, present: Bool[np.ndarray, "m"]) -> Batch:
        index, device = micro.index, self._session.device
        tokens, labels = np.where(present[:, None], micro.tokens, 0), None
        if self._bos:
            tokens[:, 0] = self._manifest.special.bos
        if self._config.model.classes is not None:
            assert micro.labels is not None, "data without labels passed the checks"
            labels = np.where(self._dropped[index], self._config.model.classes, micro.labels)
        targets = np.zeros(tokens.shape, dtype=bool)
        weights = np.zeros(tokens.shape)
        for hidden, _ in self._sides:
            targets |= hidden[index]
            # Each side's mean over its own targets in the global batch, and the mean of the sides.
            weights += hidden[index] / (len(self._sides) * max(1, int(hidden.sum())))
        here = [(hidden[index], time[index]) for hidden, time in self._sides]
        with self._engine.assembled(self._teacher):
            vectors = teach(self._teacher, tokens, here, self._noise[index], self._dt, labels)
        weights *= present[:, None]
        batch = Batch.of_arrays(tokens, self._groups[index], targets, weights, labels=labels, device=device)
        distill_targets = DistillTargets(vectors, self._teacher.head, self._distill.divergence)
        return replace(batch, distill_targets=distill_targets)

    def _begin(self, done: int, at_its_start: bool) -> None:
        """Load the round's teacher, which at the round's first step is the student as it is now."""
        where = teacher_folder(self._run, done)
        if at_its_start and done > 0:
            source = self._ema.slices if self._distill.next_teacher == "ema" else self._engine.masters()
            weights = self._engine.whole(source)
            if self._session.rank == 0:  # over that of an earlier start, if there is one
                self._publish(where, weights)
            dist.barrier()
            self._engine.restart(weights, keep_optimizer=self._distill.optimizer == "keep")
            self._ema.restart(self._engine.masters())
        if not storage.folder_complete(where):
            raise CheckpointError(
                f"{where}: the teacher of round {done + 1} is gone; expected a model folder"
            )
        teacher, _, _ = model_folder.read(storage.fetch(where))
        self._teacher = self._engine.frozen(teacher)
        self._engine.fresh = done * self._every if self._distill.optimizer == "reset" else 0
        self._round = done
        if self._session.rank == 0:
            log.info(
                "round %d of %d: teacher %s, dt 1/%g, for %d sampling steps",
                done + 1,
                self._distill.rounds,
                where,
                1 / time_step(self._distill, done),
                sampling_steps(self._distill, done + 1),
            )

    def _publish(self, where: str, weights: dict[str, Tensor]) -> None:
        special = self._manifest.special
        facts = model_folder.DataFacts(self._manifest.vocabulary, self._length, special.bos, special.eot)
        background = model_folder.Background({}, self._config.model_dump(mode="json"))
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / "model"
            model_folder.write(local, self._config.model, facts, weights, background)
            storage.publish_folder(local, where)


def with_teacher(config: RunConfig) -> RunConfig:
    """The run's own config: with its teacher's model section, starting from that teacher's weights.

    The teacher is copied into the run's folder. From the first checkpoint on that copy is the teacher, whatever
    the config's name for it means by then.

    Raises:
        CheckpointError: no such folder, file or model version.
        CapabilityError: an autoregressive teacher, or a form that its kind does not have.
        ConfigError: no distill section, another start, or keys that do not go with the teacher's model.
    """
    distill, run = config.distill, checkpoint.run_folder(config)
    if distill is None:
        raise ConfigError("distill: missing; expected a section with the teacher")
    where = teacher_folder(run, 0)
    if config.train.init_from not in (None, where):
        raise ConfigError(
            f"train.init_from: {config.train.init_from!r}; expected null, a student starts as its teacher"
        )
    origin = f"distill.teacher: {distill.teacher!r}"
    if checkpoint.newest(run) is None or not storage.folder_complete(where):
        model = _place(config, origin, where)
    else:
        model, _ = model_folder.read_config(storage.fetch(where))
        _check_model(config, model, origin)
    train = config.train.model_copy(update={"init_from": where})
    config = config.model_copy(update={"model": model, "train": train})
    if found := config.conflicts():
        raise ConfigError("with the teacher's model:\n" + "\n".join(f"  {line}" for line in found))
    return config


def _place(config: RunConfig, origin: str, where: str) -> ModelConfig:
    """Put the teacher that the config names into the run's folder."""
    assert config.distill is not None
    name = config.distill.teacher
    tokenizer = None
    if name.startswith("models:/"):
        uri = tracking.tracking_uri(config)
        version = tracking.find_version(uri, name)
        name = f"models:/{version.name}/{version.version}"
        local = tracking.download_model(uri, name)
    elif storage.exists(name):
        local = storage.fetch(name)
    else:
        raise CheckpointError(
            f"{origin}: no such folder or file; expected a model folder, models:/... or a file"
        )
    if local.is_dir():
        denoiser, model, facts = model_folder.read(local)
        tokenizer = saved_tokenizer(local)
    else:
        denoiser, released, facts = conversion.load(local)
        model = released.model
    _check_model(config, model, origin)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        model_folder.write(copy, model, facts, denoiser.state_dict(), model_folder.Background())
        told = {"teacher": name, "tokenizer": tokenizer and tokenizer.hash}
        (copy / ORIGIN).write_text(json.dumps(told) + "\n", encoding="utf-8")
        storage.publish_folder(copy, where)
    return model


def _check_model(config: RunConfig, model: ModelConfig, origin: str) -> None:
    """Refuse a teacher that cannot be distilled as the config says.

    Raises:
        CapabilityError: an autoregressive teacher, or a form that its kind does not have.
        ConfigError: a model section that is not the teacher's.
    """
    assert config.distill is not None
    if model.kind == "ar":
        raise CapabilityError(
            f"{origin} is autoregressive: it draws one token a step in a fixed order, so there are no two steps "
            "to make one of; expected a pgm or mdlm teacher"
        )
    if config.distill.form == "complementary" and model.kind != "pgm":
        raise CapabilityError(
            f"distill.form: complementary, but {origin} is of kind {model.kind}; expected pgm, or compatible"
        )
    if "model" not in config.model_fields_set:
        return
    ours, its = flatten(config.model.model_dump()), flatten(model.model_dump())
    differing = [
        f"  model.{key}: {ours.get(key)!r}, the teacher's is {its.get(key)!r}"
        for key in sorted(ours.keys() | its.keys())
        if ours.get(key) != its.get(key)
    ]
    if differing:
        raise ConfigError(
            f"the model section is not that of {origin}; leave it out, the teacher's is used:\n"
            + "\n".join(differing)
        )


def teacher_name(run: str) -> str:
    """The teacher that a run was given: a folder, a file, or a model version, whatever alias it went by."""
    return str(_told(run)["teacher"])


def _told(run: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(storage.read_text(storage.join(teacher_folder(run, 0), ORIGIN)))
    return told


def check_teacher(config: RunConfig, run: str, manifest: Manifest) -> None:
    """Refuse a teacher of another vocabulary, tokenizer or length than the data.

    Raises:
        DataError: every difference.
    """
    assert config.distill is not None
    _, facts = model_folder.read_config(storage.fetch(teacher_folder(run, 0)))
    pairs: dict[str, tuple[object, object]] = {
        "vocabulary": (facts.vocab_size, manifest.vocabulary),
        "length": (facts.length, manifest.length),
        "BOS": (facts.bos, manifest.special.bos),
    }
    if tokenizer := _told(run)["tokenizer"]:  # released files come without
        pairs["tokenizer (hash)"] = (tokenizer, manifest.tokenizer.hash)
    found = [f"{key} {has}, the data's is {wants}" for key, (has, wants) in pairs.items() if has != wants]
    if found:
        raise DataError(
            f"distill.teacher: {config.distill.teacher!r} does not fit the data: " + "; ".join(found)
        )
