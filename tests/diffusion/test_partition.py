"""Times and groups: a pure function of (seed, step), stratified over the global batch, of the right frequencies."""

import hashlib
from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.partition import (
    StepDraws,
    by_rank,
    draw,
    draw_order,
    draw_subset,
    stratified,
    uniforms_of_rows,
)
from pipeline.diffusion.schedule import alpha

EPS = 1e-3
# Start of the SHA-256 of times and groups, as drawn before a worker drew its own rows alone.
RECORDED = {
    ("loglinear", None): "aa82f7ac8b042012",
    ("loglinear", 0.25): "0223fa2891599b9c",
    ("arccos", None): "95ab098f5332c34a",
}
CONFIG = DiffusionConfig(eps=EPS)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    t, groups = draw(CONFIG, seed=7, step=11, shape=(16, 32), bos=False)
    np.random.seed(0)
    np.random.random(5)
    again, groups_again = draw(CONFIG, seed=7, step=11, shape=(16, 32), bos=False)
    assert np.array_equal(t, again)
    assert np.array_equal(groups, groups_again)
    for seed, step in ((7, 12), (8, 11), (11, 7)):
        other, other_groups = draw(CONFIG, seed=seed, step=step, shape=(16, 32), bos=False)
        assert not np.isin(other, t).any()
        assert not np.array_equal(groups, other_groups)


@pytest.mark.parametrize("batch", [1, 7, 512])
@pytest.mark.parametrize("step", range(5))
def test_every_stratum_of_the_global_batch_has_one_time(batch: int, step: int) -> None:
    t, _ = draw(CONFIG, seed=0, step=step, shape=(batch, 2), bos=False)
    assert t.min() >= EPS
    assert t.max() <= 1
    uniform = (t - EPS) / (1 - EPS)
    gaps = np.diff(np.sort(uniform))
    assert np.allclose(gaps, 1 / batch)  # one offset for all
    assert sorted(np.floor(uniform * batch).astype(int)) == list(range(batch))


@pytest.mark.parametrize(("schedule", "least"), [("loglinear", None), ("loglinear", 0.25), ("arccos", None)])
def test_draws_of_some_rows_are_those_of_the_whole_batch(
    schedule: Literal["loglinear", "arccos"], least: float | None
) -> None:
    """Bit by bit, in any order and with repetitions; and what earlier versions drew."""
    config = DiffusionConfig(schedule=schedule)

    def drawn(rows: np.ndarray | None) -> StepDraws:
        return draw(config, seed=3, step=11, shape=(96, 33), bos=True, least=least, rows=rows)

    whole = drawn(None)
    for rows in (np.arange(40, 56), np.array([95, 3, 3, 0]), np.array([], dtype=np.int64)):
        some = drawn(rows)
        assert np.array_equal(some.t, whole.t[rows])
        assert np.array_equal(some.groups, whole.groups[rows])
    digest = hashlib.sha256(whole.t.tobytes() + whole.groups.tobytes()).hexdigest()
    assert digest.startswith(RECORDED[schedule, least])
    noise = np.random.default_rng([3, 11, 2]).random((96, 2, 2, 33))
    some_noise = uniforms_of_rows(np.random.default_rng([3, 11, 2]), [7, 95, 0], (2, 2, 33))
    assert np.array_equal(some_noise, noise[[7, 95, 0]])


def test_the_offset_moves() -> None:
    """Over steps a stratum is filled evenly: the estimate of anything is unbiased."""
    rng = np.random.default_rng(0)
    offsets = np.array([stratified(8, rng).min() * 8 for _ in range(4000)])
    counts, _ = np.histogram(offsets, bins=10, range=(0, 1))
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_no_worker_holds_all_the_large_times() -> None:
    """Contiguous shares of the batch, as workers take them, have times like the whole batch's."""
    times = np.stack([draw(CONFIG, seed=3, step=step, shape=(512, 1), bos=False)[0] for step in range(40)])
    shares = times.reshape(40, 8, 64).mean(-1)
    assert np.abs(shares - 0.5).max() < 5 * np.sqrt(1 / 12 / 64)
    ranks = times.argsort(1)
    assert not np.array_equal(ranks[0], ranks[1])


def test_groups_have_their_frequency() -> None:
    t, groups = draw(CONFIG, seed=1, step=0, shape=(64, 8192), bos=False)
    hidden = 1 - alpha(t, EPS)
    deviation = (groups.mean(1) - hidden) / np.sqrt(hidden * (1 - hidden) / 8192)
    assert np.abs(deviation).max() < 4.5
    by_position = (groups - hidden[:, None]).mean(0)  # no position is preferred
    assert np.abs(by_position).max() < 5.5 * np.sqrt((hidden * (1 - hidden)).mean() / 64)


def test_bos_is_in_group_0() -> None:
    _, groups = draw(CONFIG, seed=0, step=0, shape=(256, 4), bos=True)
    assert not groups[:, 0].any()
    assert groups[:, 1:].mean() > 0.4
    _, groups = draw(CONFIG, seed=0, step=0, shape=(256, 4), bos=False)
    assert groups[:, 0].mean() > 0.4


@pytest.mark.parametrize("bos", [False, True])
def test_subsets_have_their_size_and_are_uniform(bos: bool) -> None:
    rng = np.random.default_rng(5)
    counts = np.repeat(np.arange(1, 7 - bos), 4000)
    subsets = draw_subset(rng, counts, 6, bos)
    assert np.array_equal(subsets.sum(1), counts)
    assert not (bos and subsets[:, 0].any())
    for count in range(1, 7 - bos):
        of_size = subsets[counts == count]
        kinds, times = np.unique(of_size, axis=0, return_counts=True)
        expected = 4000 / len(kinds)
        assert len(kinds) == pytest.approx(_choose(6 - bos, count))
        assert np.abs(times - expected).max() < 5 * np.sqrt(expected)


def _choose(n: int, k: int) -> float:
    return np.prod(np.arange(n - k + 1, n + 1)) / np.prod(np.arange(1, k + 1))


def test_an_order_depends_on_seed_and_row_alone() -> None:
    whole = draw_order([1, 5, 3], range(6), 10, bos=True)
    assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(10), (6, 1)))
    assert (whole[:, 0] == 0).all(), "BOS comes first"
    assert np.array_equal(draw_order([1, 5, 3], np.array([4, 1]), 10, bos=True), whole[[4, 1]])
    assert not np.array_equal(draw_order([1, 6, 3], range(6), 10, bos=True), whole)
    assert draw_order([1], [2**64 - 1, 3], 4, bos=False).shape == (2, 4), (
        "indices of the harness have 64 bits"
    )


def test_orders_are_uniform() -> None:
    ranks = draw_order([0], range(6000), 3, bos=False)
    found = np.unique(ranks, axis=0, return_counts=True)[1]
    assert len(found) == 6
    assert np.abs(found - 1000).max() < 4 * np.sqrt(1000)


def test_positions_by_rank() -> None:
    where = torch.tensor([[True, False, True], [True, True, True]])
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert by_rank(where, order).tolist() == [2, 0, 5, 3, 4]
    assert by_rank(where, None).tolist() == [0, 2, 3, 4, 5]
