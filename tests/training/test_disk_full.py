"""Files that cannot be written whole, as on a full disk: an error that says so, and nothing is lost."""

import resource
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.run import Run
from pipeline.training import checkpoint
from tests.support import observed
from tests.support.observed import Seen, quick
from tests.support.workers import Workers

MOST = 32 * 1024  # bytes of a file; a checkpoint's are larger


def limit(most: int = MOST) -> None:
    """Let the system cut this process's files, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_on_a_full_disk(rank: int, workers: int, config: RunConfig, where: str) -> Seen:
    """Train while no file gets whole: neither locally, or not in the run's folder."""
    try:
        if where == "local":
            limit()
        return observed.train_one(rank, workers, config, on_publish=limit)
    finally:
        limit(resource.RLIM_INFINITY)


@pytest.fixture(scope="module", params=[("local", 1), ("run", 1), ("local", 0)], ids=str)
def starts(
    request: pytest.FixtureRequest, run_storage: Path, groups: dict[int, Workers]
) -> tuple[RunConfig, str, list[Seen]]:
    """A run to step 4; then to step 8 on a full disk; then once more with room."""
    where, stage = request.param
    short = quick(run_storage, f"full-{where}-{stage}", 0.1, steps=4, zero_stage=stage)
    config = short.model_copy(update={"train": short.train.model_copy(update={"steps": 8})})
    calls = [
        groups[1](observed.train_one, short)[0],
        groups[1](train_on_a_full_disk, config, where)[0],
        groups[1](observed.train_one, config)[0],
        groups[1](observed.train_one, config.model_copy(update={"name": f"room-{where}-{stage}"}))[0],
    ]
    return config, where, calls


def test_the_error_names_path_and_cause(starts: tuple[RunConfig, str, list[Seen]]) -> None:
    config, where, (_, full, _, _) = starts
    assert full.error is not None
    if where == "local":
        assert full.error.startswith("CheckpointError: the checkpoint of step 8 cannot be saved to /")
        assert "step_00000008-" in full.error
        assert "MiB free): " in full.error
    else:
        target = f"{Run(config).folder}/step_00000008"
        assert full.error.startswith(f"CheckpointError: {target}: the checkpoint cannot be written: ")
        assert "File too large" in full.error


def test_the_run_goes_on_from_the_checkpoint_before(starts: tuple[RunConfig, str, list[Seen]]) -> None:
    config, where, (first, full, again, straight) = starts
    assert list(full.losses) == list(again.losses) == [5, 6, 7, 8]
    unfinished = f"checkpoint {Run(config).folder}/step_00000008 is not usable: no list of files"
    assert any(line.startswith(unfinished) for line in again.log) == (where == "run")
    assert first.losses | again.losses == straight.losses
    assert again.error is straight.error is None
    assert checkpoint.steps(Run(config).folder) == [4, 8]
