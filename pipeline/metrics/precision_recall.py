"""Precision and recall of generated images: shares of one set that lie in the manifold of the other.

The manifold of a set is the union of balls around its features; a ball reaches to the k-th nearest other feature.

Source: Kynkaanniemi et al. 2019, arXiv 1904.06991.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipeline.errors import DataError

NEIGHBOUR = 3  # k, as published
LEAST_IMAGES = NEIGHBOUR + 1
_BLOCK = 1 << 25  # distances that exist at the same time: 256 MiB
_ROUNDING = 1e-12  # squared distances below this share of the squared norms are 0


class Manifold(NamedTuple):
    """A set of features and the squared radii of their balls.

    Attributes:
        features: of the set.
        squared_radii: squared distance from each feature to its k-th nearest other.
    """

    features: Float64[Tensor, "n D"]
    squared_radii: Float64[Tensor, "n"]


def manifold(features: Float[np.ndarray, "n D"], device: str | torch.device = "cpu") -> Manifold:
    """Compute the manifold of a set, in blocks of distances.

    Args:
        features: of at least `LEAST_IMAGES` images.
        device: that computes.

    Raises:
        DataError: there are fewer images.
    """
    if len(features) < LEAST_IMAGES:
        raise DataError(
            f"{len(features)} images; expected at least {LEAST_IMAGES}, since precision and recall look at the "
            f"nearest {NEIGHBOUR} neighbours"
        )
    own = torch.tensor(features, dtype=torch.float64, device=device)
    # The nearest of all is the feature itself.
    radii = [block.kthvalue(NEIGHBOUR + 1, dim=1).values for block in _squared_distances(own, own)]
    return Manifold(own, torch.cat(radii))


def share_inside(points: Float64[Tensor, "m D"], inside: Manifold) -> float:
    """Compute the share of points that lie in at least one ball of a manifold.

    Args:
        points: features of a set.
        inside: manifold of another set, on the same device.
    """
    blocks = _squared_distances(points, inside.features)
    covered = [(block <= inside.squared_radii).any(1) for block in blocks]
    return float(torch.cat(covered).double().mean())


def precision_recall(drawn: Float[np.ndarray, "m D"], real: Manifold) -> tuple[float, float]:
    """Compute precision and recall.

    Args:
        drawn: features of generated images, at least `LEAST_IMAGES`.
        real: manifold of real images.

    Returns:
        The share of generated images in the manifold of real ones, and of real images in that of generated ones.

    Raises:
        DataError: there are fewer images.
    """
    own = manifold(drawn, real.features.device)
    return share_inside(own.features, real), share_inside(real.features, own)


def _squared_distances(
    points: Float64[Tensor, "m D"], others: Float64[Tensor, "n D"]
) -> Iterator[Float64[Tensor, "b n"]]:
    """Yield the squared distances from blocks of points to all others; equal features have distance 0."""
    norms = (others**2).sum(1)
    for block in points.split(max(1, _BLOCK // len(others))):
        scale = (block**2).sum(1)[:, None] + norms
        squared = scale - 2 * block @ others.T
        yield squared.masked_fill_(squared < _ROUNDING * scale, 0)
