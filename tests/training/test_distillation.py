"""Distillation over several rounds: against its plainest form, and stopped and killed on the way."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.data import ImageDataConfig
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig, DistillConfig, RunConfig
from pipeline.data.manifest import Manifest
from pipeline.models import build, model_folder
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run
from pipeline.training import checkpoint, distillation
from tests.support import data_helpers, labelled_rows, observed, plain_distillation
from tests.support.observed import Seen, quick
from tests.support.small_models import shake
from tests.support.workers import Workers, run_workers

ROUNDS, STEPS, EVERY = 3, 9, 3
NEAR = 0.05
SIZE = {"hidden": 16, "heads": 2, "dropout": 0.0}
MODELS = {
    "pgm": PGMConfig(encoder_blocks=1, decoder_blocks=1, **SIZE),
    "mdlm": MDLMConfig(kind="mdlm", blocks=2, **SIZE),
    "classes": PGMConfig(encoder_blocks=1, decoder_blocks=1, classes=3, registers=2, **SIZE),
    "pairs": PGMConfig(encoder_blocks=1, decoder_blocks=1, **SIZE),
}
# What is distilled, how: name -> (model, distill section)
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "raw": ("pgm", {}),
    "ema": ("pgm", {"next_teacher": "ema", "optimizer": "keep", "divergence": "forward_kl"}),
    "complementary": ("pgm", {"form": "complementary"}),
    "mdlm": ("mdlm", {"optimizer": "keep"}),
    "classes": ("classes", {"form": "complementary", "divergence": "mse", "next_teacher": "ema"}),
    "pairs": ("pairs", {"form": "complementary"}),
}
# (workers, ZeRO stage) under which each is run
PLACES = {
    "raw": ((1, 1), (2, 2)),
    "ema": ((1, 0), (2, 1)),
    "complementary": ((1, 1), (2, 3)),
    "mdlm": ((1, 1), (2, 0)),
    "classes": ((1, 1), (2, 3)),
    "pairs": ((1, 1), (2, 3)),
}
RUNS = [(name, *place) for name in FORMS for place in PLACES[name]]
Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def distil(run_storage: Path) -> Callable[..., RunConfig]:
    """`distil(form, run name)` -> config of a run whose teacher is in its folder."""
    labelled_rows.write(run_storage / "labelled")

    def make(form: str, name: str, rounds: int = ROUNDS, **train: object) -> RunConfig:
        kind, section = FORMS[form]
        config = quick(
            run_storage, name, **{"steps": STEPS, "keep": 9, "checkpoint_every": 2, "ema": 0.5, **train}
        )
        # A student starts where its gradients are nearly 0, and Adam makes much of their rounding.
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 3e-4})})
        if kind == "classes":
            data = ImageDataConfig(
                kind="image", classes=3, path=str(run_storage / "labelled"), streams=4, shuffle_window=64
            )
            config = config.model_copy(update={"data": data, "diffusion": DiffusionConfig(schedule="arccos")})
        if kind == "pairs":
            config = data_helpers.pairs(config)
            Run(config).with_data()
        teacher = run_storage / f"teacher-{kind}"
        if not teacher.exists():
            torch.manual_seed(4)
            manifest = Manifest.read(Run(config).data_path)
            facts = manifest.facts
            model = shake(build(MODELS[kind], facts.vocab_size, facts.length, facts.bos, facts.modalities))
            model_folder.write(teacher, MODELS[kind], facts, model.state_dict(), model_folder.Background())
        settings = DistillConfig(teacher=str(teacher), rounds=rounds, teacher_steps=16, **section)  # type: ignore[arg-type]
        config = config.model_copy(update={"model": MODELS[kind], "distill": settings})
        return distillation.with_teacher(Run(config)).config

    return make


@pytest.fixture(scope="module")
def references(distil: Callable[..., RunConfig]) -> dict[str, plain_distillation.Plain]:
    found = {}
    for form in FORMS:
        config = distil(form, f"plain-{form}")
        assert config.distill is not None
        found[form] = plain_distillation.train(config, model_folder.read(Path(config.distill.teacher))[0])
    return found


@pytest.fixture(scope="module")
def runs(distil: Callable[..., RunConfig], groups: dict[int, Workers]) -> dict[Key, tuple[RunConfig, Seen]]:
    """Straight runs, of one and of two workers."""
    found: dict[Key, tuple[RunConfig, Seen]] = {}
    for workers in (1, 2):
        keys = [key for key in RUNS if key[1] == workers]
        configs = [distil(form, f"{form}-{workers}-{stage}", zero_stage=stage) for form, _, stage in keys]
        seen = groups[workers](observed.train, configs)[0]
        found |= dict(zip(keys, zip(configs, seen, strict=True), strict=True))
    return found


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Length of the difference. Of single entries, those whose gradient is 0 but for rounding may be anywhere."""
    assert a.keys() == b.keys()
    return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))


def student_of(config: RunConfig, done: int) -> dict[str, torch.Tensor]:
    """Weights in the folder of the teacher that follows `done` rounds."""
    return model_folder.read_weights(Path(distillation.teacher_folder(Run(config).folder, done)))


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_losses_and_weights_are_those_of_the_plain_form(
    runs: dict[Key, tuple[RunConfig, Seen]],
    references: dict[str, plain_distillation.Plain],
    key: Key,
) -> None:
    (config, seen), expected = runs[key], references[key[0]]
    assert seen.error is None
    assert seen.losses == pytest.approx(expected.losses, abs=5e-5, rel=0)
    near = NEAR * apart(expected.weights, expected.starts[-1])  # of the way that a round takes
    assert apart(seen.weights, expected.weights) < near
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    average = checkpoint.ema_weights(path, config.model, Manifest.read(Run(config).data_path))
    assert apart(average, expected.average) < near
    assert len(expected.starts) == ROUNDS
    for done, start in enumerate(expected.starts):
        assert apart(student_of(config, done), start) < near


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_neither_workers_nor_stages_change_a_run(runs: dict[Key, tuple[RunConfig, Seen]], key: Key) -> None:
    (config, first), (_, seen) = runs[key[0], *PLACES[key[0]][0]], runs[key]
    assert seen.losses == pytest.approx(first.losses, abs=1e-5, rel=0)
    assert apart(seen.weights, first.weights) < NEAR * apart(seen.weights, student_of(config, ROUNDS - 1))


@pytest.mark.parametrize("form", FORMS)
def test_those_numbers_mean_something(references: dict[str, plain_distillation.Plain], form: str) -> None:
    """The student learns in every round, and its average is another model."""
    expected = references[form]
    # The first loss of pairs is 0.006, 120 times the tolerance of losses.
    assert min(expected.losses.values()) > (0.005 if form == "pairs" else 0.01)
    way = apart(expected.weights, expected.starts[-1])
    assert all(apart(a, b) > way / 4 for a, b in zip(expected.starts, expected.starts[1:], strict=False))
    assert apart(expected.weights, expected.average) > way / 4


# (form, ZeRO stage, checkpoint_every, step from which the run goes on, workers that go on); round 2 is 4 to 6
AGAIN = [
    ("raw", 1, 2, 4, 2),
    ("complementary", 2, 5, 5, 2),
    ("raw", 3, 3, 3, 2),  # exactly between two rounds
    ("ema", 1, 3, 6, 2),
    ("ema", 3, 3, 3, 1),
]
Again = tuple[str, int, int, int, int]


@pytest.fixture(scope="module")
def again(
    distil: Callable[..., RunConfig], groups: dict[int, Workers]
) -> dict[Again, tuple[RunConfig, Seen, Seen]]:
    """Straight runs of two workers, and the same runs continued from a step of theirs."""
    configs = [
        distil(form, "-".join(map(str, ("again", form, *rest))), zero_stage=rest[0], checkpoint_every=rest[1])
        for form, *rest in AGAIN
    ]
    straight = groups[2](observed.train, configs)[0]
    for config, (_, _, _, step, _) in zip(configs, AGAIN, strict=True):
        run = Path(Run(config).folder)
        for later in checkpoint.steps(str(run)):
            if later > step:
                shutil.rmtree(run / checkpoint.name_of(later))
        for done in range(1, ROUNDS):
            if (
                done * EVERY >= step
            ):  # the teachers of the rounds to come: another model, as a leftover would be
                shutil.rmtree(run / "rounds" / str(done))
                shutil.copytree(run / "rounds" / "0", run / "rounds" / str(done))
    resumed: dict[str, Seen] = {}
    for workers in (1, 2):
        mine = [c for c, one in zip(configs, AGAIN, strict=True) if one[4] == workers]
        seen = groups[workers](observed.train, mine)[0]
        resumed |= {config.name: one for config, one in zip(mine, seen, strict=True)}
    return {
        key: (config, one, resumed[config.name])
        for key, config, one in zip(AGAIN, configs, straight, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("key", AGAIN, ids=str)
def test_a_resumed_run_is_the_straight_one(
    again: dict[Again, tuple[RunConfig, Seen, Seen]],
    references: dict[str, plain_distillation.Plain],
    key: Again,
) -> None:
    config, straight, resumed = again[key]
    form, _, _, step, workers = key
    assert straight.error is resumed.error is None
    later = range(step + 1, STEPS + 1)
    assert list(resumed.losses) == list(later)
    if workers == 2:
        assert resumed.losses == {at: straight.losses[at] for at in later}
        assert all(torch.equal(value, resumed.weights[name]) for name, value in straight.weights.items())
    else:
        assert resumed.losses == pytest.approx({at: straight.losses[at] for at in later}, abs=1e-5, rel=0)
        way = apart(straight.weights, student_of(config, ROUNDS - 1))
        assert apart(straight.weights, resumed.weights) < NEAR * way
    expected = references[form]
    for done, start in enumerate(expected.starts):
        assert apart(student_of(config, done), start) < NEAR * apart(expected.weights, expected.starts[-1])


@pytest.mark.slow
def test_checkpoints_tell_the_round_and_its_teacher(
    again: dict[Again, tuple[RunConfig, Seen, Seen]],
) -> None:
    config, _, resumed = again[AGAIN[0]]
    run = Path(Run(config).folder)
    assert checkpoint.steps(str(run)) == [2, 4, 6, 8, 9]
    told = [
        json.loads((run / checkpoint.name_of(s) / "state.json").read_text())["task"] for s in (2, 4, 6, 8)
    ]
    assert [task["round"] for task in told] == [1, 2, 2, 3]
    assert [task["teacher"] for task in told] == [str(run / "rounds" / n) for n in "0112"]
    started = [line for line in resumed.log if line.startswith("round ")]
    assert started == [
        f"round 2 of 3: teacher {run}/rounds/1, dt 1/8, for 4 sampling steps",
        f"round 3 of 3: teacher {run}/rounds/2, dt 1/4, for 2 sampling steps",
    ]


def shares(rank: int, workers: int, config: RunConfig) -> tuple[int, int, int]:
    """Bytes of the round's teacher on this rank: computable while it rolls out, then after the run; its own share."""
    seen: list[tuple[Denoiser, int]] = []
    original = distillation.teach

    def size(model: Denoiser) -> int:
        return sum(p.nbytes for p in model.parameters())

    def watched(teacher: Denoiser, *arguments: Any, **named: Any) -> torch.Tensor:
        seen.append((teacher, size(teacher)))
        return original(teacher, *arguments, **named)

    distillation.teach = watched  # type: ignore[assignment]
    try:
        observed.train_one(rank, workers, config)
    finally:
        distillation.teach = original
    teacher, rolling = seen[-1]
    own = sum(p.ds_tensor.nbytes for p in teacher.parameters() if hasattr(p, "ds_tensor"))
    return rolling, size(teacher), own


def test_under_zero_3_ranks_share_a_teacher(
    distil: Callable[..., RunConfig], groups: dict[int, Workers]
) -> None:
    config = distil("raw", "shared", rounds=1, zero_stage=3, steps=3)
    weights = student_of(config, 0)
    total = sum(value.nbytes for value in weights.values())
    for rolling, between, own in groups[2](shares, config):
        assert rolling == total
        assert between == sum(
            value.nbytes for name, value in weights.items() if "." not in name or "head" in name
        )
        assert own == pytest.approx((total - between) / 2, rel=0.05)  # shares are padded to one length


def die_in(rank: int, workers: int, config: RunConfig, step: int) -> None:
    """Train until rank 0 is killed after the update of a step."""

    class Losses(dict[int, float]):
        def __setitem__(self, key: int, value: float) -> None:
            if key == step and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            super().__setitem__(key, value)

    original, observed.Seen = observed.Seen, lambda: Seen(losses=Losses())  # type: ignore[misc, assignment]
    try:
        observed.train_one(rank, workers, config)
    finally:
        observed.Seen = original  # type: ignore[misc]


def test_a_run_killed_in_round_2_ends_as_if_it_had_not_been(
    distil: Callable[..., RunConfig],
    runs: dict[Key, tuple[RunConfig, Seen]],
    groups: dict[int, Workers],
) -> None:
    config = distil("raw", "killed", zero_stage=2, checkpoint_every=4)
    with pytest.raises(RuntimeError, match="rank"):
        run_workers(die_in, 2, config, 6)
    assert checkpoint.steps(Run(config).folder) == [4]
    assert Path(distillation.teacher_folder(Run(config).folder, 1)).is_dir()
    seen = groups[2](observed.train_one, distillation.with_teacher(Run(config)).config)[0]
    assert list(seen.losses) == [5, 6, 7, 8, 9]
    straight = runs["raw", 2, 2][1]
    assert all(torch.equal(value, seen.weights[name]) for name, value in straight.weights.items())
