"""Counting baselines against a Markov chain whose entropies are known in closed form."""

import itertools
import math
import time

import numpy as np
import pytest

from pipeline.metrics.ngram import bigram_perplexity, unigram_perplexity

V, LENGTH = 8, 32


@pytest.fixture(scope="module")
def chain() -> tuple[np.ndarray, np.ndarray]:
    """Transition matrix [V, V] and stationary distribution [V]."""
    transition = np.random.default_rng(0).dirichlet(np.full(V, 0.5), size=V)
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    return transition, stationary / stationary.sum()


def draw(chain: tuple[np.ndarray, np.ndarray], rows: int, seed: int) -> np.ndarray:
    """[rows, LENGTH] tokens, each row started from the stationary distribution."""
    transition, stationary = chain
    rng = np.random.default_rng(seed)
    tokens = np.empty((rows, LENGTH), np.uint8)
    tokens[:, 0] = rng.choice(V, rows, p=stationary)
    for position in range(1, LENGTH):
        below = rng.random((rows, 1)) > transition[tokens[:, position - 1]].cumsum(1)
        tokens[:, position] = np.minimum(below.sum(1), V - 1)
    return tokens


def test_known_entropies(chain: tuple[np.ndarray, np.ndarray]) -> None:
    transition, stationary = chain
    train, rows = draw(chain, 4000, 1), draw(chain, 4000, 2)
    alone = -(stationary * np.log(stationary)).sum()
    rate = -(stationary[:, None] * transition * np.log(np.maximum(transition, 1e-300))).sum()
    first_alone = (alone + (LENGTH - 1) * rate) / LENGTH
    assert rate < 0.8 * alone, "else the bigram would pass with a unigram's work"
    assert unigram_perplexity([train], [rows], V) == pytest.approx(math.exp(alone), rel=0.01)
    assert bigram_perplexity([train], [rows], V) == pytest.approx(math.exp(first_alone), rel=0.01)


def test_against_plain_counting() -> None:
    """A slow transcription of the formulas, on data sparse enough that every branch is taken."""
    rng = np.random.default_rng(3)
    train, rows = rng.integers(0, 6, (4, 5)), rng.integers(0, 12, (6, 5))
    count = {a: int((train == a).sum()) for a in range(12)}
    alone = {a: (count[a] + 1) / (train.size + 12) for a in range(12)}
    pairs = [(int(row[i]), int(row[i + 1])) for row in train for i in range(4)]
    total = 0.0
    for row in rows.tolist():
        total += math.log(alone[row[0]])
        for a, b in itertools.pairwise(row):
            followed, different = sum(x == a for x, _ in pairs), len({y for x, y in pairs if x == a})
            total += math.log(
                (pairs.count((a, b)) + different * alone[b]) / (followed + different)
                if followed
                else alone[b]
            )
    assert bigram_perplexity([train], [rows], 12) == pytest.approx(math.exp(-total / rows.size), rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    train = np.random.default_rng(4).integers(0, 5, (3, 6))
    for before in range(7):  # 5 and 6 never occur in training
        mass = 0.0
        for after in range(7):
            pair = np.array([[before, after]])
            first = unigram_perplexity([train], [pair[:, :1]], 7)
            mass += first / bigram_perplexity([train], [pair], 7) ** 2
        assert mass == pytest.approx(1)


def test_blocks(chain: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    train, rows = draw(chain, 300, 5), draw(chain, 50, 6)
    for measure in (unigram_perplexity, bigram_perplexity):
        whole = measure([train[:200]], [rows], V)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.metrics.ngram._PORTION", 1000)
            blocks = iter([train[:70], train[70:180], train[180:200]])
            assert measure(blocks, iter([rows[:7], rows[7:]]), V) == pytest.approx(whole)
        assert measure([train], [rows], V) != whole


def test_no_training_rows_is_uniform() -> None:
    rows = np.arange(12).reshape(2, 6)
    assert unigram_perplexity([], [rows], 50) == pytest.approx(50)
    assert bigram_perplexity([], [rows], 50) == pytest.approx(50)


def test_large_vocabulary_is_quick() -> None:
    tokens = np.random.default_rng(7).zipf(1.3, (500, 1024)) % 50257
    started = time.process_time()  # whatever else the machine does
    assert bigram_perplexity([tokens[:400]], [tokens[400:]], 50257) > 1
    assert time.process_time() - started < 5
