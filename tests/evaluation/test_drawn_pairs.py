"""Captions among which an image's own is to be found."""

import numpy as np

from pipeline.evaluation.drawn_pairs import CANDIDATES, draw_candidates


def test_candidates_are_other_captions() -> None:
    """The first is a row's own; all differ as texts; every other text is drawn about as often."""
    texts = np.random.default_rng(0).integers(0, 40, 2000)
    captions = np.stack([texts, texts % 7], 1)
    candidates = draw_candidates(captions, seed=1)
    assert candidates.shape == (2000, CANDIDATES)
    assert (candidates[:, 0] == np.arange(2000)).all()
    drawn = np.sort(texts[candidates], 1)
    assert (np.diff(drawn, axis=1) > 0).all()
    counts = np.bincount(texts[candidates[:, 1:]].ravel(), minlength=40)
    assert abs(counts / counts.mean() - 1).max() < 0.25
    assert np.array_equal(candidates, draw_candidates(captions, seed=1))
    assert not np.array_equal(candidates, draw_candidates(captions, seed=2))


def test_few_different_captions() -> None:
    captions = np.array([[0, 1], [0, 1], [2, 0], [0, 1], [3, 3]])
    candidates = draw_candidates(captions, seed=0)
    assert candidates.shape == (5, 3)
    for row, chosen in enumerate(candidates):
        assert chosen[0] == row
        assert {*map(tuple, captions[chosen].tolist())} == {(0, 1), (2, 0), (3, 3)}
    assert draw_candidates(captions[:2], seed=0).shape == (2, 1)
