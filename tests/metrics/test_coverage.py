"""The 95% interval of the `count` estimator covers the truth as often as it says, for a model that is the source."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.metrics.likelihood import Likelihood, Masking
from pipeline.models.batch import Batch
from tests.support.known_source import Known, markov
from tests.support.one_process import measure

V, L, ROWS, REPEATS = 3, 5, 200, 200


class Source(Known):
    """The exact posterior, scored as any model is."""

    def forward(self, batch: Batch) -> Tensor:
        log_prob = self.logits(batch.tokens, batch.groups)
        nats = -log_prob.gather(2, batch.tokens[..., None])[..., 0]
        return (torch.where(batch.targets, nats, 0.0) * batch.weights).sum(1)


@pytest.fixture(scope="module")
def found() -> tuple[float, list[Likelihood]]:
    """The entropy, and the source's own bound on fresh sequences, again and again."""
    joint = markov(V, L, seed=1)
    entropy = -float((joint * np.log(joint)).sum()) / L
    rows, rng, model = np.array(list(product(range(V), repeat=L))), np.random.default_rng(0), Source(joint)
    fresh = [rows[rng.choice(len(rows), ROWS, p=joint.ravel())] for _ in range(REPEATS)]
    return entropy, [
        measure(model, Masking("count", 1, seed, batch=ROWS), some) for seed, some in enumerate(fresh)
    ]


def covered(entropy: float, found: list[Likelihood], share: float) -> float:
    """How often the entropy lies in so much of the interval."""
    hits = [abs(one.nats - entropy) <= share * (one.interval[1] - one.nats) for one in found]
    return float(np.mean(hits))


def test_coverage_over_fresh_sequences(found: tuple[float, list[Likelihood]]) -> None:
    assert 0.91 <= covered(*found, share=1) <= 0.99
    # Intervals of another width would not pass.
    assert covered(*found, share=0.7) < 0.91
    assert covered(*found, share=1.6) > 0.99


def test_the_bound_of_the_source_is_its_entropy(found: tuple[float, list[Likelihood]]) -> None:
    entropy, repeats = found
    nats = [one.nats for one in repeats]
    assert np.mean(nats) == pytest.approx(entropy, abs=4 * np.std(nats) / math.sqrt(REPEATS))
    assert np.mean([one.stderr for one in repeats]) == pytest.approx(np.std(nats), rel=0.15)
