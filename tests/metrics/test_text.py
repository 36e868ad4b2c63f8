"""How varied text is, by hand, and what bigrams tell real text from shuffled text by."""

import math
import pydoc_data.topics

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.metrics.external_lm import Scored
from pipeline.metrics.ngram import bigram_model
from pipeline.metrics.text import distinct, mauve, text_measures, unigram_entropy


def test_entropy_by_hand() -> None:
    rows = np.array([[7, 7, 7, 7], [1, 2, 3, 4], [5, 5, 6, 6]])
    assert unigram_entropy(rows) == pytest.approx((0 + math.log(4) + math.log(2)) / 3)


def test_distinct_by_hand() -> None:
    rows = np.array([[1, 2, 1, 2], [2, 1, 3, 3]])
    assert distinct(rows, 1) == 3 / 8
    assert distinct(rows, 2) == 4 / 6  # 12 21 12, 21 13 33
    assert distinct(rows, 3) == 4 / 4  # 121 212, 213 133
    assert distinct(rows.astype(np.uint8), 3) == 1
    assert distinct(np.tile(rows, (5, 1)), 3) == 4 / 20


def test_no_samples() -> None:
    for function in (unigram_entropy, lambda rows: distinct(rows, 2)):
        with pytest.raises(DataError, match="0 samples; expected at least one"):
            function(np.empty((0, 8), np.int64))


def test_real_text_scores_lower_than_shuffled_text() -> None:
    text = "".join(pydoc_data.topics.topics.values()).encode()
    rows = np.frombuffer(text[: 128 * 2000], np.uint8).reshape(-1, 128)
    train, real = rows[:1800], rows[1800:]
    shuffled = np.random.default_rng(0).permuted(real, axis=1)
    bigram = bigram_model([train], 257)
    found = [
        {
            one.key: one.value
            for one in text_measures(some, True, bigram, Scored(6.0, 3, 0, np.zeros((1, 2))), "a")
        }
        for some in (real, shuffled)
    ]
    assert found[0]["bigram_perplexity"] < 0.6 * found[1]["bigram_perplexity"]
    assert found[0]["distinct_3"] < found[1]["distinct_3"]
    assert found[0]["entropy"] == unigram_entropy(real[:, 1:])  # BOS is given
    assert found[0]["generative_perplexity"] == pytest.approx(math.exp(2))


def test_mauve() -> None:
    """Near one for texts of the same kind, near none for others, the same at every call."""
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    real, same, other = (rng.normal(shift, 1, (200, 8)).astype(np.float32) for shift in (0, 0, 3))
    (alike, clusters), (far, _) = mauve(real, same), mauve(real, other)
    assert alike > 0.9
    assert far < 0.1
    assert clusters == 20
    assert mauve(real, same)[0] == alike


def test_mauve_stands_beside_real_text_only() -> None:
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (40, 4)).astype(np.float32)
    scored = Scored(80.0, 40, 0, features)
    rows = rng.integers(0, 5, (40, 6))
    alone = text_measures(rows, False, lambda _: 1.0, scored, "a scorer")
    beside = text_measures(rows, False, lambda _: 1.0, scored, "a scorer", scored)
    assert [one.key for one in beside] == [*(one.key for one in alone), "mauve"]
    assert beside[-1].value == pytest.approx(1, abs=1e-6)
    assert "40 texts against 40 held-out ones, 4 clusters" in beside[-1].by
