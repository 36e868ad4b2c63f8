"""Learning rates, and averages cut into slices."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import OptimConfig
from pipeline.errors import CheckpointError
from pipeline.training.ema import EMA, read_averages
from pipeline.training.engine import learning_rate
from pipeline.training.slices import fill


def test_warm_up_then_constant() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, optim, 10) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )
    assert learning_rate(10**9, optim, 10) == 0.4  # a run that is made longer keeps its rates


def test_warm_up_then_cosine() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(step, optim, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert rates[8] == pytest.approx(0.2)  # half-way of the 8 steps after the warm-up
    assert rates[11] == pytest.approx(0.2 * (1 + math.cos(math.pi * 7 / 8)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(12, optim, 12) == pytest.approx(0)
    assert learning_rate(50, optim, 12) == pytest.approx(0)


def test_a_reset_optimiser_warms_up_again() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, optim, 20, fresh=10) for step in range(10, 15)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )


def test_no_warm_up() -> None:
    assert learning_rate(0, OptimConfig(lr=0.4, warmup_steps=0), 10) == 0.4
    assert learning_rate(0, OptimConfig(lr=0.4, warmup_steps=0, schedule="cosine"), 10) == 0.4


def cut(whole: dict[str, Tensor], pieces: int) -> list[EMA]:
    """What `pieces` ranks hold of flattened tensors, cut without regard to where a tensor ends."""
    total = sum(value.numel() for value in whole.values())
    size = -(-total // pieces)
    ranks: list[dict[tuple[str, int], Tensor]] = [{} for _ in range(pieces)]
    position = 0
    for name, value in whole.items():
        for rank, held in enumerate(ranks):
            low, high = max(position, rank * size), min(position + value.numel(), (rank + 1) * size)
            if low < high:
                held[name, low - position] = value.flatten()[low - position : high - position]
        position += value.numel()
    return [EMA(held, decay=0.5) for held in ranks]


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 1), (2, 5), (5, 2), (3, 3)])
def test_slices_are_read_by_any_number_of_workers(tmp_path: Path, writers: int, readers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b.weight": (7,), "c": (2, 2, 4), "d": (1,)}
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    files = [tmp_path / f"ema_{rank:05d}.safetensors" for rank in range(writers)]
    for ema, file in zip(cut(whole, writers), files, strict=True):
        ema.save(file)
    joined = read_averages(tmp_path)
    assert all(torch.equal(joined[name], value.flatten()) for name, value in whole.items())
    for ema in cut({name: torch.zeros(shape) for name, shape in shapes.items()}, readers):
        fill(ema.slices, read_averages(tmp_path))
        for (name, offset), values in ema.slices.items():
            assert torch.equal(values, whole[name].flatten()[offset : offset + values.numel()])


def test_a_missing_slice_is_an_error(tmp_path: Path) -> None:
    whole = {"a": torch.ones(10)}
    parts = cut(whole, 2)
    parts[0].save(tmp_path / "ema_00000.safetensors")
    with pytest.raises(CheckpointError, match="weights of 'a': 5 of 10 values from 0 on are stored"):
        fill(cut(whole, 1)[0].slices, read_averages(tmp_path))


def test_update_is_the_moving_average() -> None:
    ema = EMA({("a", 0): torch.tensor([1.0, 2.0])}, decay=0.9)
    ema.update({("a", 0): torch.tensor([2.0, 0.0])})
    assert torch.allclose(ema.slices["a", 0], torch.tensor([1.1, 1.8]))


def test_decay_0_keeps_the_weights_themselves() -> None:
    ema, weights = EMA({("a", 0): torch.tensor([1.0, 2.0])}, decay=0), torch.tensor([0.1, -3.3])
    ema.update({("a", 0): weights})
    assert torch.equal(ema.slices["a", 0], weights)
