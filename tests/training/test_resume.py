"""A run that is stopped and started again is the run that was never stopped."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.run import Run
from pipeline.runtime.control_files import STOP
from pipeline.runtime.session import PlainSession
from pipeline.training import checkpoint, loop
from pipeline.training.resume import needed_by
from tests.support import observed
from tests.support.observed import Seen, quick
from tests.support.workers import Workers, run_workers

KINDS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


def files(config: RunConfig, step: int, pattern: str) -> dict[str, bytes]:
    """Files of a checkpoint by name."""
    folder = Path(Run(config).folder) / checkpoint.name_of(step)
    found = {file.name: file.read_bytes() for file in sorted(folder.glob(pattern))}
    assert found
    return found


class Pair:
    """A run without a stop, and the same run continued by other processes from its middle."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.straight = self.resumed = Seen()
        self.averages: list[dict[str, bytes]] = []


@pytest.fixture(scope="module")
def pairs(run_storage: Path, groups: dict[int, Workers]) -> dict[tuple[int, str], Pair]:
    """Dropout on; validation in the middle; 8 steps of an epoch of thousands."""
    configs = [
        quick(run_storage, f"again-{s}-{p}", 0.1, zero_stage=s, precision=p, validate_every=5)
        for s, p in KINDS
    ]
    pairs = [Pair(config) for config in configs]
    for pair, seen in zip(pairs, groups[2](observed.train, configs)[0], strict=True):
        pair.straight = seen
        pair.averages.append(files(pair.config, 8, "ema_*"))
        shutil.rmtree(Path(Run(pair.config).folder) / checkpoint.name_of(8))
    for pair, seen in zip(pairs, run_workers(observed.train, 2, configs)[0], strict=True):
        pair.resumed = seen
        pair.averages.append(files(pair.config, 8, "ema_*"))
    return dict(zip(KINDS, pairs, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resumed_run_is_bit_equal(pairs: dict[tuple[int, str], Pair], kind: tuple[int, str]) -> None:
    pair = pairs[kind]
    assert pair.straight.error is pair.resumed.error is None
    assert list(pair.resumed.losses) == [5, 6, 7, 8]
    assert pair.resumed.losses == {step: pair.straight.losses[step] for step in range(5, 9)}
    assert pair.resumed.norms == {step: pair.straight.norms[step] for step in range(5, 9)}
    assert pair.straight.weights.keys() == pair.resumed.weights.keys() != set()
    for name, value in pair.straight.weights.items():
        assert torch.equal(value, pair.resumed.weights[name]), name
    assert pair.averages[0] == pair.averages[1]


@pytest.fixture(scope="module")
def stopped(run_storage: Path, groups: dict[int, Workers]) -> tuple[RunConfig, list[Seen], list[Seen]]:
    """A long run with a stop file in its folder from the start; then started again to three steps more."""
    config = quick(run_storage, "stopped", 0.1, steps=5000, checkpoint_every=1000)
    file = Path(Run(config).folder) / STOP
    file.parent.mkdir(parents=True)
    file.touch()
    first = groups[2](observed.train_one, config)
    file.unlink()
    more = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": max(first[0].losses) + 3})}
    )
    return more, first, groups[2](observed.train_one, more)


def test_stop_file_ends_all_ranks_after_the_same_step(
    stopped: tuple[RunConfig, list[Seen], list[Seen]],
) -> None:
    config, first, _ = stopped
    last = config.train.steps - 3
    assert [max(seen.losses) for seen in first] == [last, last]
    assert [seen.error for seen in first] == [None, None]
    assert f"stopped at step {last} on request" in first[0].log
    assert checkpoint.steps(Run(config).folder)[0] == last  # long before checkpoint_every


def test_stopped_run_goes_on_where_it_was(
    stopped: tuple[RunConfig, list[Seen], list[Seen]], groups: dict[int, Workers]
) -> None:
    config, first, second = stopped
    straight = groups[2](observed.train_one, config.model_copy(update={"name": "not-stopped"}))[0]
    assert first[0].losses | second[0].losses == straight.losses
    assert first[0].losses.keys().isdisjoint(second[0].losses)
    assert all(torch.equal(value, second[0].weights[name]) for name, value in straight.weights.items())


def test_nothing_is_left_in_the_temporary_folder(
    run_storage: Path, groups: dict[int, Workers], tmp_path: Path
) -> None:
    groups[1](_train_in, quick(run_storage, "tidy", steps=4), str(tmp_path))
    assert not list(tmp_path.glob("*step*"))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("zero/zero_pp_rank_1_mp_rank_00_optim_states.pt", [1]),
        ("zero/bf16_zero_pp_rank_12_mp_rank_00_optim_states.pt", [12]),
        ("zero/zero_pp_rank_1_mp_rank_00_model_states.pt", [1]),
        ("zero/mp_rank_00_model_states.pt", [1, 2, 12]),
        ("ema_00002.safetensors", [2]),
        ("optimizer_00012.safetensors", [12]),
        ("state.json", [1, 2, 12]),
    ],
)
def test_a_rank_needs_its_own_part_of_the_optimiser(name: str, ranks: list[int]) -> None:
    assert [rank for rank in (1, 2, 12) if needed_by(rank)(name)] == ranks


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_resumes_from_a_store_with_its_own_files(
    pairs: dict[tuple[int, str], Pair], groups: dict[int, Workers], tmp_path: Path, stage: int
) -> None:
    """`local://` is a store like any other: checkpoints are read through copies, here one for each rank."""
    pair = pairs[stage, "fp32"]
    shutil.copytree(Run(pair.config).folder, tmp_path / pair.config.name)
    shutil.rmtree(tmp_path / pair.config.name / checkpoint.name_of(8))
    histories = groups[2](_resume_from_store, pair.config, str(tmp_path))
    assert [loss for _, loss in histories[0]] == [pair.straight.losses[step] for step in range(5, 9)]
    for rank in (0, 1):
        for stem in ("optimizer", "ema"):
            (name,) = {file.name for file in (tmp_path / str(rank)).rglob(f"{stem}_*")}
            assert name == f"{stem}_{rank if stage else 0:05d}.safetensors"


def _resume_from_store(rank: int, workers: int, config: RunConfig, folder: str) -> list[tuple[int, float]]:
    """Resume with a node folder for each rank; (step, loss)."""
    session = PlainSession(rank, workers, f"{folder}/{config.name}")
    cluster = config.cluster.model_copy(update={"storage": f"local://{folder}"})
    before, tempfile.tempdir = tempfile.tempdir, f"{folder}/{rank}"
    Path(tempfile.tempdir).mkdir()
    try:
        loop.train(Run(config.model_copy(update={"cluster": cluster})), session)
    finally:
        tempfile.tempdir = before
    return [(step, metrics["train/loss"]) for step, metrics in session.history]


def _train_in(rank: int, workers: int, config: RunConfig, folder: str) -> None:
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        assert observed.train_one(rank, workers, config).error is None
    finally:
        tempfile.tempdir = before
