"""The likelihood of an autoregressive model: exact, so that the chances of all rows add up to 1."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import StepDraws
from pipeline.errors import CapabilityError
from pipeline.metrics.likelihood import Masking, estimator_for, masked_batches, row_sums
from tests.support.one_process import measure
from tests.support.small_models import AR, BOTH_KINDS, randomised

CPU = torch.device("cpu")


@pytest.mark.parametrize("bos", [False, True])
def test_the_chances_of_all_rows_add_up_to_one(bos: bool) -> None:
    model = randomised(AR, vocab_size=3, length=4 + bos).double()
    rows = np.array(list(itertools.product(range(3), repeat=4)))
    if bos:
        rows = np.concatenate([np.full((81, 1), 2), rows], axis=1)
    batches = masked_batches(Masking("exact", 1, 0, bos=bos), rows)
    nats = row_sums(model, batches, 81) * 4
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert float(nats.std()) > 0.1
    bound = measure(model, Masking("exact", 1, 0, bos=bos), rows)
    assert bound.nats == pytest.approx(float(nats.mean()) / 4, rel=2e-7)
    assert "exact" in str(bound)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_share_the_rows(workers: int) -> None:
    model, rows = randomised(AR).double(), np.random.default_rng(0).integers(0, 11, (13, 16))
    sums = sum(
        row_sums(model, masked_batches(Masking("exact", 1, 0, batch=4), rows, share=(rank, workers)), 13)
        for rank in range(workers)
    )
    assert isinstance(sums, Tensor)
    assert float(sums.mean()) == pytest.approx(measure(model, Masking("exact", 1, 5), rows).nats, rel=2e-7)


def test_the_estimator_follows_the_model() -> None:
    settings = EvaluationConfig(draws=3)
    assert estimator_for(randomised(AR), settings.estimator, settings.draws) == ("exact", 1)
    rows = np.zeros((2, 16), dtype=np.int64)
    for config in BOTH_KINDS:
        model = randomised(config)
        assert estimator_for(model, settings.estimator, settings.draws) == ("count", 3)
        with pytest.raises(CapabilityError, match=r"'exact' does not fit.*count or mdlm"):
            measure(model, Masking("exact", 1, 0), rows)
    with pytest.raises(CapabilityError, match="'count' does not fit AR; expected exact"):
        measure(randomised(AR), Masking("count", 1, 0), rows)


@pytest.mark.parametrize("bos", [False, True])
def test_the_objective_is_the_mean_over_targets(bos: bool) -> None:
    """Rows that are absent weigh nothing, and the divisor is the global batch."""
    rows = np.random.default_rng(1).integers(0, 11, (3, 16))
    objective = Objective(DiffusionConfig(), bos, both_groups=False, left_to_right=True)
    draws = StepDraws(np.ones(3), np.zeros(rows.shape, bool))
    divisor = objective.normaliser(np.zeros((5, 16), bool))
    batch = objective.batch(rows, draws, np.array([True, False, True]), divisor=divisor, device=CPU)
    assert batch.targets.sum() == 3 * (16 - bos)
    model = randomised(AR).double()
    losses = model(batch)
    assert losses[1] == 0
    exact = measure(model, Masking("exact", 1, 0, bos=bos), rows[[0, 2]])
    assert float(losses.sum().detach()) == pytest.approx(exact.nats * 2 / 5, rel=1e-6)
    fresh = batch.weights.sum() * math.log(11)
    assert float(fresh) == pytest.approx(2 / 5 * math.log(11), rel=1e-5)
