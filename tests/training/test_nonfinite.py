"""Losses and gradients that are not finite: named, left out, and trained on; or an error, as configured."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run
from tests.support import observed, plain
from tests.support.observed import Seen, quick
from tests.support.workers import Workers

KINDS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


def nan_token(model: Denoiser, token: int) -> None:
    """Plant an embedding that is not finite."""
    with torch.no_grad():
        model.embedding.weight[token] = float("nan")


def nan_head(model: Denoiser) -> None:
    """Every loss of every row depends on it."""
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))


class NanGradient:
    """Spoil one gradient on rank 0 while all losses stay finite: at the n-th call, or at every one."""

    def __init__(self, call: int | None):
        self.call, self.calls = call, 0

    def __call__(self, model: Denoiser) -> None:
        model.head.bias.register_hook(self.spoil)

    def spoil(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        spoilt = torch.distributed.get_rank() == 0 and self.call in (None, self.calls)
        return gradient * float("nan") if spoilt else gradient


def nan_gradients(model: Denoiser) -> None:
    """Spoil every gradient that is not 0, so that a step without rows is finite."""
    model.head.bias.register_hook(lambda gradient: torch.where(gradient == 0, gradient, torch.nan))


def rare_token(config: RunConfig, step: int) -> tuple[int, int, int]:
    """(id, place, row): a token that of all rows of the run, and of validation, stands only in this one."""
    rows, tokens = zip(*(plain.rows_of(config, s) for s in range(config.train.steps)), strict=True)
    reader = ShardReader(Run(config).data_path, Manifest.read(Run(config).data_path), "validation")
    held_out = reader.rows(np.linspace(0, len(reader) - 1, config.evaluation.rows).astype(np.int64))
    for place, row in enumerate(tokens[step]):
        for token in row.tolist():
            others = np.delete(np.concatenate(tokens), step * config.train.batch + place, axis=0)
            if token not in others and token not in held_out:
                return token, place, int(rows[step][place])
    raise AssertionError("no such token: take another step or seed")


def skipped(config: RunConfig) -> dict[str, dict[str, list[int]]]:
    return json.loads((Path(Run(config).folder) / "skipped.json").read_text())


@pytest.fixture(scope="module")
def runs(run_storage: Path, groups: dict[int, Workers]) -> dict[str, tuple[RunConfig, list[Seen], object]]:
    """By name: config, what both ranks saw, and (id, place, row) of the planted token."""
    found: dict[str, tuple[RunConfig, list[Seen], object]] = {}
    for stage, step in ((1, 5), (3, 1), (0, 5)):  # after the checkpoint of step 4, and before any
        config = quick(run_storage, f"nan-stage-{stage}", zero_stage=stage)
        planted = rare_token(config, step)
        plant = partial(nan_token, token=planted[0])
        found[f"stage-{stage}"] = config, groups[2](observed.train_one, config, False, plant), planted
    config = quick(run_storage, "nan-stop", on_nonfinite="stop")
    planted = rare_token(config, 5)
    for start in ("stop", "stop-again"):
        plant = partial(nan_token, token=planted[0])
        found[start] = config, groups[2](observed.train_one, config, False, plant), planted
    config = quick(run_storage, "nan-weights")
    found["weights"] = config, groups[2](observed.train_one, config, False, nan_head), None
    config = quick(run_storage, "nan-gradients-always")
    found["gradients-always"] = config, groups[2](observed.train_one, config, False, NanGradient(None)), None
    config = quick(run_storage, "nan-gradients-of-all-steps", log_every=1)
    found["all-steps"] = config, groups[2](observed.train_one, config, False, nan_gradients), None
    for stage, precision in KINDS:
        name, kind = f"nan-gradient-{stage}-{precision}", {"zero_stage": stage, "precision": precision}
        config = quick(run_storage, name, steps=3, micro_batch=2, **kind)
        seen = groups[2](observed.train_one, config, False, NanGradient(4))  # step 2 of 2 micro-batches
        found[f"gradient-{stage}-{precision}"] = config, seen, None
    return found


@pytest.mark.parametrize(("stage", "step", "start"), [(1, 5, 4), (3, 1, 0), (0, 5, 4)])
def test_a_planted_row_is_named_and_skipped(
    runs: dict[str, tuple[RunConfig, list[Seen], object]], stage: int, step: int, start: int
) -> None:
    config, seen, (_, place, row) = runs[f"stage-{stage}"]
    assert skipped(config) == {str(step): {"places": [place], "rows": [row]}}
    log = "\n".join(seen[0].log)
    assert f"step {step + 1}: loss or gradient is not finite; rows of the data: [{row}]; going back" in log
    assert log.index("going back") < log.index(
        f"{'resuming' if start else 'starting'} from step {start}:", 100
    )
    expected = plain.train(config, {step: [place]}).losses
    for one in seen:  # all ranks went back together, and trained as if the row had never been there
        assert one.error is None
        assert one.losses == pytest.approx(expected, abs=1e-5, rel=0)


def test_a_planted_row_stops_the_run_if_asked(
    runs: dict[str, tuple[RunConfig, list[Seen], object]],
) -> None:
    config, seen, (_, place, row) = runs["stop"]
    for one in seen:
        assert one.error is not None
        assert one.error.startswith("TrainingError: step 6: loss or gradient is not finite")
        assert f"rows of the data: [{row}] (train.on_nonfinite: stop)" in one.error
        assert list(one.losses) == [1, 2, 3, 4, 5]
    assert skipped(config) == {"5": {"places": [place], "rows": [row]}}
    again = runs["stop-again"][1]  # started again, it goes on without the row
    assert [one.error for one in again] == [None, None]
    assert list(again[0].losses) == [5, 6, 7, 8]


def test_weights_that_are_not_finite_are_an_error(
    runs: dict[str, tuple[RunConfig, list[Seen], object]],
) -> None:
    config, seen, _ = runs["weights"]
    for one in seen:
        assert one.error is not None
        assert one.error.startswith("TrainingError: step 1")
        assert "every row of the batch, so the weights are" in one.error
    assert not (Path(Run(config).folder) / "skipped.json").exists()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gradient_that_is_not_finite(
    runs: dict[str, tuple[RunConfig, list[Seen], object]], kind: tuple[int, str]
) -> None:
    """No row can be singled out, so the step goes without all of its rows, and nothing else is lost."""
    config, seen, _ = runs[f"gradient-{kind[0]}-{kind[1]}"]
    assert list(skipped(config)) == ["1"]
    assert skipped(config)["1"]["places"] == list(range(8))
    assert sorted(skipped(config)["1"]["rows"]) == sorted(plain.rows_of(config, 1)[0].tolist())
    expected = plain.train(config, {1: range(8)}).losses
    near = 1e-5 if kind[1] == "fp32" else 0.01
    for one in seen:
        assert one.error is None
        assert one.losses == pytest.approx(expected, abs=near, rel=0)
        assert one.losses[2] == 0


def test_gradients_that_stay_not_finite_are_an_error(
    runs: dict[str, tuple[RunConfig, list[Seen], object]],
) -> None:
    for one in runs["gradients-always"][1]:
        assert one.error is not None
        assert "although rows were skipped in this step already" in one.error


def test_steps_in_a_row_without_a_finite_gradient_are_an_error(
    runs: dict[str, tuple[RunConfig, list[Seen], object]],
) -> None:
    """Else every step would be skipped, and the run would end as a success that has learned nothing."""
    config, seen, _ = runs["all-steps"]
    for one in seen:
        assert one.error is not None
        assert "the gradient of 3 steps in a row is not finite while all losses are" in one.error
    assert list(skipped(config)) == ["0", "1"]
