"""Metrics of images: FID, Inception Score, and the loss of an image tokenizer."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import torch
from jaxtyping import Float, Float64, UInt8
from scipy.special import rel_entr

from pipeline.errors import DataError
from pipeline.metrics.image_features import FeatureNet, Outputs
from pipeline.runtime.actors import Resources, own_device

Images = UInt8[np.ndarray, "n S S 3"]


@dataclass(frozen=True)
class Gaussian:
    """Statistics of image features.

    Attributes:
        count: number of images.
        mean, covariance: of the features.
    """

    count: int
    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]


class Difference(NamedTuple):
    """Sums over the pixel values of a batch; whole numbers, so that totals do not depend on the batches.

    Attributes:
        images, values: number of images and of pixel values.
        squares, absolute: sums of squared and absolute errors.
    """

    images: int
    values: int
    squares: int
    absolute: int


@dataclass(frozen=True)
class Reconstruction:
    """Error of encoding and decoding, in pixel values 0 to 255.

    Attributes:
        images: number of images.
        mse: mean squared error.
        mae: mean absolute error.
        psnr: 10 log10(255^2 / mse), in dB; infinite without error.
    """

    images: int
    mse: float
    mae: float
    psnr: float


def gaussian(blocks: Iterable[Float[np.ndarray, "n D"]]) -> Gaussian:
    """Compute mean and covariance of features that arrive in blocks, in float64.

    Args:
        blocks: features.

    Raises:
        DataError: fewer than two rows, blocks of different widths, or a feature that is not finite.

    Source: Chan, Golub and LeVeque 1979.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for block in blocks:
        rows = block.astype(np.float64)
        if not len(rows):
            continue
        if not count:
            mean, scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        _check_widths(len(mean), rows.shape[1])
        shift = rows.mean(0) - mean
        centred = rows - rows.mean(0)
        total = count + len(rows)
        scatter += centred.T @ centred + np.outer(shift, shift) * (count * len(rows) / total)
        mean += shift * (len(rows) / total)
        count = total
    if count < 2:
        raise DataError(f"{count} images; expected at least 2, since a covariance needs them")
    if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
        raise DataError("image features are not finite; expected numbers")
    return Gaussian(count, mean, scatter / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians with covariances A and B.

    A B has the eigenvalues of the symmetric R B R with R = A^(1/2), so that only roots of symmetric matrices are
    needed, which are never complex.

    Args:
        a: statistics of a set of images.
        b: statistics of another set.

    Raises:
        DataError: features of different widths.

    Source: Dowson and Landau 1982; as FID: Heusel et al. 2017, arXiv 1706.08500.
    """
    _check_widths(len(a.mean), len(b.mean))
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(((a.mean - b.mean) ** 2).sum() + traces - 2 * np.sqrt(inner).sum()))


def inception_score(probabilities: Float[np.ndarray, "n K"], splits: int = 10) -> tuple[float, float]:
    """Compute exp of the mean KL divergence of an image's classes from the classes of all images.

    Images are assigned to the parts at random, since samples often come sorted by class.

    Args:
        probabilities: of the classes of every image.
        splits: parts that are scored separately; at most one for two images.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        DataError: fewer than two images.

    Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    if len(probabilities) < 2:
        raise DataError(f"{len(probabilities)} images; expected at least 2 for an Inception Score")
    order = np.random.default_rng(0).permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, min(splits, len(order) // 2)):
        p = probabilities[part].astype(np.float64)
        scores.append(math.exp(rel_entr(p, p.mean(0)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def summarise(outputs: Iterable[Outputs]) -> tuple[Gaussian, Float[np.ndarray, "n K"] | None]:
    """Summarise a net's outputs.

    Args:
        outputs: of all images, in blocks.

    Returns:
        Statistics of the features, and all class probabilities; None for a net without classes.

    Raises:
        DataError: as `gaussian`.
    """
    probabilities = []

    def features() -> Iterator[np.ndarray]:
        for out in outputs:
            probabilities.append(out.probabilities)
            yield out.features

    statistics = gaussian(features())
    known = [part for part in probabilities if part is not None]
    return statistics, np.concatenate(known) if known else None


def dataset_outputs(images: ray.data.Dataset, net: FeatureNet, resources: Resources) -> Iterator[Outputs]:
    """Compute a net's outputs for a dataset's images on a pool of Ray actors.

    The order is the dataset's, so that statistics are the same for any number of actors.

    Args:
        images: with the column `image`, uint8 arrays [S, S, 3] of one size.
        net: on the CPU; every actor gets a copy and moves it to its GPU.
        resources: of the actors. They take at most three quarters of all CPUs, since reading the images needs some.
    """
    images.context.execution_options.preserve_order = True
    images.context.enable_progress_bars = images.context.print_on_execution_start = False
    outputs = images.map_batches(
        _FeatureActor,
        fn_constructor_args=(ray.put(net), resources.cpus),
        batch_size=net.batch,
        compute=ray.data.ActorPoolStrategy(size=resources.actors),
        num_cpus=min(resources.cpus, 0.75 * ray.cluster_resources()["CPU"] / resources.actors),
        num_gpus=int(resources.use_gpu),
    )
    for rows in outputs.iter_batches(batch_size=net.batch, batch_format="numpy"):
        yield Outputs(rows["features"], rows.get("probabilities"))


def difference(images: Images, rebuilt: Images) -> Difference:
    """Sum the errors of reconstructed images.

    Args:
        images: the originals.
        rebuilt: their reconstructions.
    """
    error = rebuilt.astype(np.int64) - images
    return Difference(len(images), error.size, int((error**2).sum()), int(np.abs(error).sum()))


def reconstruction(parts: Iterable[Difference]) -> Reconstruction:
    """Average the errors of all batches.

    Args:
        parts: sums over batches of images.

    Raises:
        DataError: there are no images.
    """
    images, values, squares, sizes = map(sum, zip(Difference(0, 0, 0, 0), *parts, strict=True))
    if not images:
        raise DataError("reconstruction: no images; expected at least one")
    mse = squares / values
    return Reconstruction(images, mse, sizes / values, 10 * math.log10(255**2 / mse) if mse else math.inf)


class _FeatureActor:
    """A feature net in one process."""

    def __init__(self, net: Any, threads: int):
        torch.set_num_threads(threads)
        self._net: FeatureNet = ray.get(net).to(own_device())

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = self._net(rows["image"])
        classes = {} if out.probabilities is None else {"probabilities": out.probabilities}
        return {"features": out.features, **classes}


def _check_widths(known: int, new: int) -> None:
    if known != new:
        raise DataError(
            f"features of {new} values, statistics of {known}; expected those of the same feature net"
        )
