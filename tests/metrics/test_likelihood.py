"""Both validation estimators against closed forms, exact enumeration and other splits over workers."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.metrics.likelihood import (
    Estimator,
    Likelihood,
    Masking,
    masked_batches,
    row_sums,
    summarise,
)
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from tests.support.one_process import measure
from tests.support.small_models import BOTH_KINDS, CAUSAL, randomised

KINDS = pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)
ESTIMATORS = pytest.mark.parametrize("estimator", ["count", "mdlm"])


def rows_of(rows: int, length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length))


@KINDS
@pytest.mark.parametrize(("vocab_size", "length"), [(257, 64), (50, 1024), (8, 3)])
@pytest.mark.parametrize("bos", [False, True])
def test_every_count_draw_of_a_uniform_model_is_log_v(
    config: PGMConfig | MDLMConfig, vocab_size: int, length: int, bos: bool
) -> None:
    untrained = build(config, vocab_size, length).double().eval()
    tokens = rows_of(24, length, vocab_size)
    draws = row_sums(untrained, masked_batches(Masking("count", 1, 0, bos=bos, batch=8), tokens), 24)
    assert draws.numpy() == pytest.approx(np.full(24, math.log(vocab_size)), rel=2e-7)


@KINDS
@pytest.mark.parametrize("eps", [1e-3, 0.09])
def test_the_mdlm_estimate_of_a_uniform_model(config: PGMConfig | MDLMConfig, eps: float) -> None:
    untrained = build(config, 11, 32).eval()
    bound = measure(
        untrained, Masking("mdlm", 1, seed=3, eps=eps, bos=True, batch=256), rows_of(2048, 32, 11)
    )
    assert abs(bound.nats - (1 - eps) * math.log(11)) < 4 * bound.stderr
    if eps > 0.05:  # the factor is told from 1
        assert abs(bound.nats - math.log(11)) > 4 * bound.stderr


def exact_bound(model: Denoiser, row: np.ndarray, bos: bool) -> float:
    """Any-order bound of a row in nats per token: every subset hidden, every subset size equally likely.

    A causal encoder reads the known tokens behind BOS in every order, all equally likely.
    """
    places, tokens = range(int(bos), len(row)), torch.from_numpy(row)[None]
    total = 0.0
    for size in range(1, len(places) + 1):
        subsets = list(itertools.combinations(places, size))
        for hidden in subsets:
            known = [place for place in places if place not in hidden]
            orders = list(itertools.permutations(known)) if model.causal else [tuple(known)]
            for order in orders:
                given = [*range(int(bos)), *order]
                at, count = torch.tensor([given], dtype=torch.int64), torch.tensor([len(given)])
                logits = Model(model).predict(tokens[:, given], at, count, torch.tensor([hidden]))
                losses = torch.nn.functional.cross_entropy(logits[0].double(), tokens[0, list(hidden)])
                total += losses.item() / len(subsets) / len(orders) / len(places)
    return total


@pytest.mark.parametrize("config", [*BOTH_KINDS, CAUSAL], ids=["pgm", "mdlm", "causal"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_count_estimate_is_unbiased(config: PGMConfig | MDLMConfig, bos: bool) -> None:
    model = randomised(config, vocab_size=3, length=3 + bos, scale=0.25)
    for seed in range(3):
        row = rows_of(1, 3 + bos, 3, seed)[0]
        bound = measure(model, Masking("count", 1, seed, bos=bos, batch=500), np.tile(row, (4000, 1)))
        assert bound.stderr < 0.05
        assert abs(bound.nats - exact_bound(model, row, bos)) < 4 * bound.stderr


def test_a_wrong_weighting_would_be_seen() -> None:
    """The exact value is far from what weights 1 / L' in place of 1 / n give, so the test above can fail."""
    model = randomised(BOTH_KINDS[0], vocab_size=3, length=3, scale=0.25)
    row = rows_of(1, 3, 3, 1)[0]
    batches = masked_batches(Masking("count", 1, 1, batch=500), np.tile(row, (4000, 1)))
    wrong = (
        (index, Batch(batch.tokens, batch.groups, batch.targets, batch.groups / 3))
        for index, batch in batches
    )
    bound = summarise(row_sums(model, wrong, 4000), Masking("count", 1, 1))
    assert abs(bound.nats - exact_bound(model, row, False)) > 10 * bound.stderr


@ESTIMATORS
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_share_the_pairs_without_changing_the_result(estimator: Estimator, workers: int) -> None:
    model, tokens = randomised(CAUSAL).double(), rows_of(13, 16, 11)  # whose orders are part of the draws

    def shares(count: int) -> list[list[tuple[np.ndarray, Batch]]]:
        return [
            list(masked_batches(Masking(estimator, 3, 5, bos=True, batch=4), tokens, share=(rank, count)))
            for rank in range(count)
        ]

    (alone,) = shares(1)
    split = shares(workers)
    assert len({len(share) for share in split}) == 1, (
        "collective calls need equally many batches on all ranks"
    )
    seen = np.concatenate([index for share in split for index, _ in share])
    assert np.array_equal(np.sort(seen[seen >= 0]), np.repeat(np.arange(13), 3))
    for share in split:
        for index, batch in share:
            assert batch.weights[torch.from_numpy(index < 0)].eq(0).all()
    sums = sum(row_sums(model, iter(share), 13) for share in split)
    torch.testing.assert_close(sums, row_sums(model, iter(alone), 13), atol=0, rtol=2e-7)


@ESTIMATORS
def test_a_measurement_is_fixed_by_its_seed(estimator: Estimator) -> None:
    model, tokens = randomised(BOTH_KINDS[0]), rows_of(8, 16, 11)
    first = measure(model, Masking(estimator, 2, seed=1), tokens)
    assert first == measure(model, Masking(estimator, 2, seed=1), tokens)
    assert first.nats != measure(model, Masking(estimator, 2, seed=2), tokens).nats
    assert first == measure(model, Masking(estimator, 2, seed=1), tokens.astype(np.uint8))


@ESTIMATORS
def test_hidden_positions_alone_are_predicted(estimator: Estimator) -> None:
    for _, batch in masked_batches(Masking(estimator, 2, 0, bos=True, batch=4), rows_of(6, 16, 11)):
        assert torch.equal(batch.groups, batch.targets)
        assert not batch.groups[:, 0].any()
        assert batch.weights[~batch.groups].eq(0).all()


def test_levels_are_stratified_over_all_pairs() -> None:
    """24 pairs of rows with 12 positions: every n from 1 to 12 twice."""
    batches = masked_batches(Masking("count", 3, 0, batch=5), rows_of(8, 12, 11))
    sizes = torch.cat([batch.groups.sum(1)[torch.from_numpy(index >= 0)] for index, batch in batches])
    assert torch.bincount(sizes).tolist() == [0] + [2] * 12


def test_the_summary_says_what_was_measured() -> None:
    sums = torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64)
    bound = summarise(sums, Masking("count", 2, seed=9))
    assert bound.nats == pytest.approx(2)
    assert bound.perplexity == pytest.approx(math.exp(2))
    assert bound.stderr == pytest.approx(1 / math.sqrt(3))
    for part in ("7.39", "2.0000", "0.5774", "count", "3 rows x 2 draws", "seed 9"):
        assert part in str(bound)
    assert Likelihood(1e6, 1.0, "mdlm", 1, 1, 0).perplexity < math.inf
    assert bound.interval == pytest.approx((2 - 1.96 / math.sqrt(3), 2 + 1.96 / math.sqrt(3)), rel=1e-4)
    assert bound.interval is not None
    assert bound.perplexity_interval == pytest.approx([math.exp(nats) for nats in bound.interval])
    assert "95% interval 2.38 to 22.91" in str(bound)
    alone = summarise(sums[:1], Masking("mdlm", 2, 0))
    assert alone.stderr == math.inf
    assert alone.interval is None
    assert alone.perplexity_interval is None
    assert str(alone).startswith("perplexity 2.72 (1.0000 nats per token, "), (
        "one row says nothing of the spread"
    )
    diverged = str(Likelihood(1e6, 1e3, "mdlm", 1, 2, 0))
    assert diverged.startswith(
        "perplexity 1.01e+304 (95% interval 1.01e+304 to 1.01e+304; 1000000.0000 +- 1000.0000 nats"
    )


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).gamma(4.0, 0.5, (2000, 100)))  # of mean 2
    intervals = [summarise(sums, Masking("count", 1, 0)).interval for sums in rows]
    share = sum(low <= 2 <= high for low, high in intervals) / len(intervals)
    assert 0.93 < share < 0.96


def test_scores_may_come_from_anything() -> None:
    """A scorer that knows the answer: nats are its sums per row."""

    def score(batch: Batch) -> Tensor:
        return (batch.weights * batch.tokens).sum(1)

    tokens = np.tile(np.arange(5)[:, None], (1, 16))
    bound = measure(score, Masking("count", 4, seed=0, batch=3), tokens)
    assert bound.nats == pytest.approx(2)
