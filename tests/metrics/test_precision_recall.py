"""Precision and recall: against every pair of images, where they are known, and in blocks."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.metrics import precision_recall as module
from pipeline.metrics.precision_recall import manifold, precision_recall


def of_every_pair(drawn: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Both figures by their definition, one image after the other."""

    def radius(index: int, own: np.ndarray) -> float:
        return sorted(np.linalg.norm(own[index] - own[j]) for j in range(len(own)) if j != index)[2]

    def share(points: np.ndarray, own: np.ndarray) -> float:
        radii = [radius(i, own) for i in range(len(own))]
        inside = [any(np.linalg.norm(p - o) <= r for o, r in zip(own, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(drawn, real), share(real, drawn)


@pytest.mark.parametrize("block", [1 << 25, 100, 1])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_every_pair(spread: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    drawn, real = 5 + spread * rng.normal(size=(40, 3)), 5 + rng.normal(size=(60, 3))
    expected = of_every_pair(drawn, real)
    assert precision_recall(drawn, manifold(real)) == pytest.approx(expected)
    assert 0 < expected[0] < 1


def test_known_cases() -> None:
    rng = np.random.default_rng(0)
    real = (100 + rng.normal(size=(50, 8))).astype(np.float32)
    assert precision_recall(real, manifold(real)) == (1, 1)
    assert precision_recall(real[::-1].copy(), manifold(real)) == (1, 1)
    assert precision_recall(real + 100, manifold(real)) == (0, 0)
    # Half of the images, all of them real: precise, but half of the real ones are far from them.
    two = np.concatenate([real, real + 1000])
    assert precision_recall(real, manifold(two)) == (1, 0.5)
    assert precision_recall(two, manifold(real)) == (0.5, 1)


def test_images_that_occur_several_times_have_balls_without_extent() -> None:
    images = np.random.default_rng(0).normal(300, 1, (3, 64)).repeat(5, 0).astype(np.float32)
    assert torch.equal(manifold(images).squared_radii, torch.zeros(15, dtype=torch.float64))
    assert precision_recall(images, manifold(images)) == (1, 1)
    assert precision_recall(images + np.float32(1e-3), manifold(images)) == (0, 0)


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="3 images; expected at least 4"):
        manifold(np.zeros((3, 2), np.float32))
