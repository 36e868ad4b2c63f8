"""The objective: weights, targets and normaliser, and the estimator's moments under a constant cross-entropy."""

import numpy as np
import pytest
import torch

from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import StepDraws, draw
from pipeline.diffusion.schedule import alpha, complement, weight
from pipeline.models.batch import Batch
from tests.support.small_models import BOTH_KINDS, randomised

EPS = 1e-3
CPU = torch.device("cpu")
MATCHED, PAPER = (DiffusionConfig(eps=EPS, complement_time=kind) for kind in ("matched", "paper"))
UNIFORM = DiffusionConfig(eps=EPS, loss_weight="uniform")


def batch_of(
    t: np.ndarray,
    groups: np.ndarray,
    config: DiffusionConfig,
    both: bool = True,
    bos: bool = False,
    present: np.ndarray | None = None,
) -> Batch:
    rows = len(groups)
    tokens = np.random.default_rng(0).integers(0, 11, groups.shape)
    present = np.ones(rows, bool) if present is None else present
    objective = Objective(config, bos, both)
    divisor = objective.normaliser(groups)
    return objective.batch(tokens, StepDraws(t, groups), present, divisor=divisor, device=CPU)


def batch_losses(config: DiffusionConfig, draws: int, rows: int, length: int) -> np.ndarray:
    """Losses [draws] of whole batches at cross-entropy 1: only the size of a row's group 1 matters to them."""
    rng = np.random.default_rng(1)
    t = EPS + (1 - EPS) * ((rng.random((draws, 1)) + np.arange(rows) / rows) % 1)
    ones = rng.binomial(length, 1 - alpha(t, EPS))
    sums = ones * weight(t) + (length - ones) * weight(complement(t, EPS, config.complement_time))
    return 0.5 * sums.mean(1) / length


def test_moments_of_the_matched_loss() -> None:
    losses = batch_losses(MATCHED, 4000, 512, 1024)
    deviation = losses.std(ddof=1)
    assert abs(losses.mean() - (1 - EPS)) < 4 * deviation / np.sqrt(4000)
    assert deviation < 0.003
    assert losses.max() < 1.02


def test_the_papers_time_spreads_more() -> None:
    assert batch_losses(PAPER, 4000, 512, 1024).std() > 5 * batch_losses(MATCHED, 4000, 512, 1024).std()


@pytest.mark.parametrize("config", [MATCHED, PAPER], ids=["matched", "paper"])
def test_a_training_batch_has_the_weights_of_those_losses(config: DiffusionConfig) -> None:
    t, groups = draw(MATCHED, seed=0, step=0, shape=(512, 1024), bos=False)
    weights = batch_of(t, groups, config).weights.double().numpy()
    ones = groups.sum(1)
    sums = ones * weight(t) + (1024 - ones) * weight(complement(t, EPS, config.complement_time))
    assert np.allclose(weights.sum(1), 0.5 * sums / (512 * 1024), rtol=1e-5)
    if config is MATCHED:
        assert weights.max() <= (1 / EPS) / (2 * 512 * 1024)


def test_matched_weights_are_bounded_and_the_papers_are_not() -> None:
    t = np.concatenate([np.linspace(EPS, 1, 10_001), 1 - np.logspace(-12, -3, 10)])
    for groups in (np.zeros((len(t), 2), bool), np.ones((len(t), 2), bool)):
        assert Objective(MATCHED, False, True).weights(StepDraws(t, groups)).max() <= 1 / EPS * (1 + 1e-9)
    late = StepDraws(np.array([1 - 1e-6]), np.zeros((1, 1), bool))
    assert Objective(PAPER, False, True).weights(late).item() > 1e5
    assert Objective(MATCHED, False, True).weights(late).item() < 1 / EPS


def test_the_matched_time_hides_exactly_group_0() -> None:
    t = np.linspace(EPS, 1, 101)
    other = complement(t, EPS, "matched")
    assert np.allclose(1 - alpha(other, EPS), alpha(t, EPS))
    assert np.allclose(weight(other), (1 - EPS) / alpha(t, EPS))
    assert np.allclose(complement(t, EPS, "paper"), 1 - t)


def test_the_weight_follows_from_the_schedule() -> None:
    t = np.linspace(0.01, 0.99, 50)
    slope = (alpha(t + 1e-6, EPS) - alpha(t - 1e-6, EPS)) / 2e-6
    assert np.allclose(weight(t), -slope / (1 - alpha(t, EPS)), rtol=1e-6)


def test_the_rare_side_weighs_more() -> None:
    """Group 1 is the masked side at time t: early it is rare and weighs 1 / t, group 0 about 1."""
    groups = np.array([[True, False, False, False]])
    (weights,) = batch_of(np.array([0.25]), groups, MATCHED).weights.numpy() * 8  # times 2 x rows x L
    assert weights == pytest.approx([4, *[(1 - EPS) / (1 - (1 - EPS) * 0.25)] * 3])
    (weights,) = batch_of(np.array([0.25]), groups, PAPER).weights.numpy() * 8
    assert weights == pytest.approx([4, *[1 / 0.75] * 3])


def test_a_partition_model_learns_from_all_positions_at_half_weight() -> None:
    t, groups = draw(MATCHED, seed=0, step=0, shape=(4, 8), bos=False)
    both, masked = batch_of(t, groups, MATCHED), batch_of(t, groups, MATCHED, both=False)
    assert both.targets.all()
    assert torch.equal(masked.targets, torch.from_numpy(groups))
    torch.testing.assert_close(both.weights[both.groups] * 2, masked.weights[both.groups])
    assert masked.weights[~both.groups].eq(0).all()
    at_t = torch.from_numpy(1 / t)[:, None].expand(4, 8)[both.groups].float()
    torch.testing.assert_close(masked.weights[both.groups], at_t / (4 * 8))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("config", [MATCHED, PAPER, UNIFORM], ids=["matched", "paper", "uniform"])
def test_bos_is_never_a_target_and_does_not_count(both: bool, config: DiffusionConfig) -> None:
    t, groups = draw(MATCHED, seed=0, step=0, shape=(6, 9), bos=True)
    batch = batch_of(t, groups, config, both, bos=True)
    assert not batch.targets[:, 0].any()
    assert batch.weights[:, 0].eq(0).all()
    rest = batch_of(t, groups[:, 1:], config, both)  # the same rows as if there were no BOS
    torch.testing.assert_close(batch.weights[:, 1:], rest.weights)
    assert torch.equal(batch.targets[:, 1:], rest.targets)


def test_uniform_weights() -> None:
    t, groups = draw(MATCHED, seed=0, step=0, shape=(4, 8), bos=False)
    assert batch_of(t, groups, UNIFORM).weights.numpy() == pytest.approx(np.full((4, 8), 0.5 / 32))
    masked = batch_of(t, groups, UNIFORM, both=False).weights.numpy()
    assert masked == pytest.approx(groups / 32)


@pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)
def test_rows_that_are_not_present_weigh_nothing(config: PGMConfig | MDLMConfig) -> None:
    t, groups = draw(MATCHED, seed=0, step=0, shape=(4, 16), bos=False)
    present = np.array([True, False, True, False])
    both = config.kind == "pgm"
    model = randomised(config).double()
    some = batch_of(t, groups, MATCHED, both, present=present)
    every = batch_of(t, groups, MATCHED, both)
    assert some.weights[~torch.from_numpy(present)].eq(0).all()
    losses = model(some)
    assert losses[[1, 3]].eq(0).all()
    torch.testing.assert_close(losses[[0, 2]], model(every)[[0, 2]], atol=0, rtol=2e-7)


@pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)
def test_micro_batches_add_up_to_the_global_batch(config: PGMConfig | MDLMConfig) -> None:
    """Losses and gradients of parts, one of them filled up with an absent row, sum to the whole batch's."""
    both = config.kind == "pgm"
    t, groups = draw(MATCHED, seed=2, step=3, shape=(5, 16), bos=True)
    tokens = np.random.default_rng(4).integers(0, 11, (5, 16))
    model, objective = randomised(config).double(), Objective(MATCHED, True, both)
    divisor = objective.normaliser(groups)

    def measure(rows: list[int]) -> tuple[float, list[torch.Tensor]]:
        index = np.array(rows)
        draws = StepDraws(t[index], groups[index])
        batch = objective.batch(tokens[index], draws, index >= 0, divisor=divisor, device=CPU)
        loss = model(batch).sum()
        return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))

    whole, grads = measure([0, 1, 2, 3, 4])
    parts = [measure(rows) for rows in ([3, 0], [4, -1], [1, 2])]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-6)
    for total, *some in zip(grads, *(part for _, part in parts), strict=True):
        torch.testing.assert_close(sum(some), total, atol=1e-10, rtol=0)
