"""The number of workers changes neither what is read nor what is learnt, from the start or in mid-epoch."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.run import Run
from pipeline.training import checkpoint
from pipeline.training.ema import read_averages
from tests.support import observed, plain
from tests.support.observed import Seen, quick
from tests.support.workers import Workers, run_workers

STEPS, CHANGE = 8, 4


@dataclass(frozen=True)
class Change:
    """A run that other workers, or another ZeRO stage, take over after `CHANGE` steps."""

    before: int
    after: int
    stage: int
    new_stage: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.before}-to-{self.after}-stage-{self.stage}-to-{self.new_stage}-{self.precision}"


CHANGES = [
    *(Change(a, b, stage, stage) for stage in (0, 1, 2, 3) for a, b in ((2, 1), (1, 2))),
    Change(2, 2, 1, 2),
    Change(2, 1, 2, 1),
    Change(2, 1, 0, 0, "bf16"),
    Change(1, 2, 1, 1, "bf16"),
    Change(2, 1, 3, 3, "bf16"),
]


def config_of(storage: Path, change: Change, steps: int, stage: int) -> RunConfig:
    return quick(storage, change.name, steps=steps, zero_stage=stage, precision=change.precision)


@pytest.fixture(scope="module")
def reference(run_storage: Path) -> plain.Plain:
    return plain.train(quick(run_storage, "plain", steps=STEPS))


@pytest.fixture(scope="module")
def changed(run_storage: Path, groups: dict[int, Workers]) -> dict[str, Seen]:
    """What rank 0 saw of both parts of every run, as one."""
    first, second = {}, {}
    for workers in (1, 2):
        part = [change for change in CHANGES if change.before == workers]
        configs = [config_of(run_storage, change, CHANGE, change.stage) for change in part]
        first |= dict(zip(part, groups[workers](observed.train, configs)[0], strict=True))
    for workers in (1, 2):
        part = [change for change in CHANGES if change.after == workers]
        configs = [config_of(run_storage, change, STEPS, change.new_stage) for change in part]
        second |= dict(zip(part, groups[workers](observed.train, configs)[0], strict=True))
    return {
        change.name: replace(
            second[change],
            losses={**first[change].losses, **second[change].losses},
            error=first[change].error or second[change].error,
        )
        for change in CHANGES
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_run_goes_on_as_if_nothing_had_changed(
    changed: dict[str, Seen], reference: plain.Plain, run_storage: Path, change: Change
) -> None:
    seen = changed[change.name]
    assert seen.error is None
    assert any(line.startswith(f"resuming from step {CHANGE}: {change.after} workers") for line in seen.log)
    near = 1e-5 if change.precision == "fp32" else 0.01
    assert seen.losses == pytest.approx(reference.losses, abs=near, rel=0)
    config = config_of(run_storage, change, STEPS, change.new_stage)
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    average = checkpoint.ema_weights(path, config.model, Manifest.read(Run(config).data_path))
    for name, value in reference.average.items():
        assert float((average[name] - value).abs().max()) < 10 * near, name


def test_nothing_is_converted(changed: dict[str, Seen], run_storage: Path) -> None:
    for change in CHANGES:
        assert not any(line.startswith("converting") for line in changed[change.name].log)
        path = (
            f"{Run(config_of(run_storage, change, STEPS, change.stage)).folder}/{checkpoint.name_of(CHANGE)}"
        )
        assert not Path(checkpoint.universal_path(path)).exists()


def test_ema_slices_of_any_workers_make_the_same_tensors(changed: dict[str, Seen], run_storage: Path) -> None:
    """Slices of two workers at stages 1 and 3 are cut in different places."""
    whole = []
    for change in (Change(2, 1, 1, 1), Change(2, 1, 3, 3), Change(2, 1, 0, 0)):
        run = Path(Run(config_of(run_storage, change, STEPS, change.stage)).folder)
        files = sorted((run / checkpoint.name_of(CHANGE)).glob("ema_*"))
        assert len(files) == (1 if change.stage == 0 else 2)
        whole.append(read_averages(run / checkpoint.name_of(CHANGE)))
    for name, value in whole[0].items():
        assert float((value - whole[1][name]).abs().max()) < 1e-5
        assert float((value - whole[2][name]).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def three(run_storage: Path) -> list[list[Seen]]:
    """Three workers serve four streams: two of them miss rows."""
    configs = [
        quick(run_storage, f"three-stage-{stage}", steps=6, micro_batch=2, zero_stage=stage)
        for stage in (0, 1, 3)
    ]
    return run_workers(observed.train, 3, configs)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_workers_that_do_not_divide_the_streams(
    three: list[list[Seen]], reference: plain.Plain, index: int
) -> None:
    expected = {step: reference.losses[step] for step in range(1, 7)}
    for rank in range(3):
        assert three[rank][index].losses == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.fixture(scope="module")
def shrunk(run_storage: Path) -> list[Seen]:
    """Three workers take over from four, at every stage."""
    configs = [
        quick(run_storage, f"four-stage-{stage}", steps=steps, zero_stage=stage)
        for steps in (CHANGE, STEPS)
        for stage in range(4)
    ]
    first = run_workers(observed.train, 4, configs[:4])[0]
    second = run_workers(observed.train, 3, configs[4:])[0]
    return [
        replace(after, losses={**before.losses, **after.losses}, error=before.error or after.error)
        for before, after in zip(first, second, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_three_workers_take_over_from_four(shrunk: list[Seen], reference: plain.Plain, stage: int) -> None:
    assert shrunk[stage].error is None
    assert shrunk[stage].losses == pytest.approx(reference.losses, abs=1e-5, rel=0)


@pytest.mark.slow
def test_worker_counts_are_logged(three: list[list[Seen]]) -> None:
    assert (
        "starting from step 0: 3 workers x 2 micro-batches of up to 2 rows, 4 streams, ZeRO stage 0, fp32"
        in (three[0][0].log)
    )
