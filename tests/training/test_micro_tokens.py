"""Micro-batches by tokens compute what micro-batches of a number of rows do, and run together on all workers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import order_of
from pipeline.data.reading_order import batches
from pipeline.data.shards import ShardReader
from pipeline.models import build
from pipeline.run import Run
from pipeline.training import checkpoint
from pipeline.training.pretraining import Prepared, Pretraining
from tests.support import observed
from tests.support.data_helpers import answers, sentences
from tests.support.observed import Seen, quick
from tests.support.tiny_runs import with_micro_tokens
from tests.support.workers import Workers, run_workers

MOST, STEPS, HALF = 96, 8, 4
KINDS = {"sentences": sentences, "answers": answers}


def run_of(
    storage: Path, name: str, kind: str = "sentences", most: int | None = MOST, **train: object
) -> RunConfig:
    """Rows of 2 to 48 bytes; the micro-batches of a step are 4 to 8 by tokens."""
    config = KINDS[kind](quick(storage, name, **{"steps": STEPS, **train}))
    return config if most is None else with_micro_tokens(config, most)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("kind", "most"), [("sentences", 128), ("answers", 48)])
def test_the_gradient_is_that_of_rows_one_by_one(run_storage: Path, kind: str, most: int) -> None:
    """In float64, and no micro-batch has more tokens than it may."""
    plain, packed = (run_of(run_storage, "any", kind, size) for size in (None, most))
    Run(plain).with_data()
    manifest = Manifest.read(Run(plain).data_path)
    model = build(plain.model, manifest.vocabulary, manifest.length, manifest.special.bos).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    results = [gradient(config, manifest, model) for config in (plain, packed)]
    (losses, grads), (same_losses, same_grads) = ((x, y) for x, y, _ in results)
    torch.testing.assert_close(same_losses, losses, rtol=0, atol=1e-10)
    for value, same in zip(grads, same_grads, strict=True):
        torch.testing.assert_close(same, value, rtol=0, atol=1e-10)
    sizes = [int(part.batch.lengths.sum()) for part in results[1][2] if part.batch.lengths is not None]
    assert len(sizes) == len(results[1][2]) >= 2
    assert max(sizes) <= most < sum(sizes)
    assert max(len(part.index) for part in results[1][2]) > 1


def gradient(
    config: RunConfig, manifest: Manifest, model: torch.nn.Module
) -> tuple[Tensor, list[Tensor], list[Prepared]]:
    """Losses of the rows of a step by their place, gradient of their sum, and the micro-batches."""
    task = Pretraining(Run(config, given_manifest=manifest), model, torch.device("cpu"))  # type: ignore[arg-type]
    order = order_of(manifest, config.train.batch, config.data, config.seed)
    reader = ShardReader(Run(config).data_path, manifest, "train")
    feed = batches(reader, order, 0, 0, 1, (config.train.micro_batch and 1) or 8)
    parts = task.prepare(3, next(feed), skipped=())
    feed.close()
    task.close()
    model.zero_grad()
    losses = []
    for part in parts:
        batch = task.batch(part)
        losses.append(model(replace(batch, weights=batch.weights.double())))
        losses[-1].sum().backward()
    grads = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    places = np.concatenate([part.index for part in parts])
    return torch.cat(losses).detach()[places.argsort()].double(), grads, parts


VARIANTS: dict[str, dict[str, object]] = {
    **{f"stage-{stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"stage-{stage}-offload": {"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def runs(run_storage: Path, groups: dict[int, Workers]) -> dict[str, Seen]:
    """One worker with rows; two, and three, which miss rows, with tokens; two that go on after half of the steps."""
    Run(run_of(run_storage, "any")).with_data()
    found = {"rows": groups[1](observed.train_one, run_of(run_storage, "rows", most=None, zero_stage=0))[0]}
    configs = [run_of(run_storage, f"micro-{name}", **train) for name, train in VARIANTS.items()]
    found |= dict(zip(VARIANTS, groups[2](observed.train, configs)[0], strict=True))
    three = [run_of(run_storage, f"micro-three-{stage}", zero_stage=stage) for stage in (0, 3)]
    found |= dict(zip(("three-0", "three-3"), run_workers(observed.train, 3, three)[0], strict=True))
    for config in configs[:4]:
        shutil.rmtree(Path(Run(config).folder) / checkpoint.name_of(STEPS))
    again = groups[2](observed.train, configs[:4])[0]
    return found | {f"again-{stage}": seen for stage, seen in enumerate(again)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VARIANTS, "three-0", "three-3"])
def test_workers_train_as_one_with_rows_does(runs: dict[str, Seen], name: str) -> None:
    plain, seen = runs["rows"], runs[name]
    assert seen.error is plain.error is None
    assert seen.losses.keys() == set(range(1, STEPS + 1))
    assert seen.losses == pytest.approx(plain.losses, abs=1e-5, rel=0)
    assert seen.norms == pytest.approx(plain.norms, rel=1e-4)
    assert plain.losses[STEPS] < plain.losses[1] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_is_bit_equal(runs: dict[str, Seen], stage: int) -> None:
    straight, again = runs[f"stage-{stage}"], runs[f"again-{stage}"]
    assert again.error is None
    assert again.losses == {step: straight.losses[step] for step in range(HALF + 1, STEPS + 1)}
    for name, value in straight.weights.items():
        assert torch.equal(value, again.weights[name]), name
