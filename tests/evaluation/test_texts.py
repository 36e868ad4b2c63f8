"""How varied text is, by hand, and what bigrams tell real text from shuffled text by."""

import math
import pydoc_data.topics

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation.ngram import bigram_model
from pipeline.evaluation.scorer import Scored
from pipeline.evaluation.texts import distinct, text_measures, unigram_entropy


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
        {one.key: one.value for one in text_measures(some, True, bigram, Scored(6.0, 3, 0), "a")}
        for some in (real, shuffled)
    ]
    assert found[0]["bigram_perplexity"] < 0.6 * found[1]["bigram_perplexity"]
    assert found[0]["distinct_3"] < found[1]["distinct_3"]
    assert found[0]["entropy"] == unigram_entropy(real[:, 1:])  # BOS is given
    assert found[0]["generative_perplexity"] == pytest.approx(math.exp(2))
