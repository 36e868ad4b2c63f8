"""Figures of images: FID, Inception Score, and what a tokenizer loses."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import safetensors.numpy
import torch
from jaxtyping import Float, Float64, UInt8
from safetensors import SafetensorError

from pipeline import storage
from pipeline.errors import DataError
from pipeline.metrics.image_features import FeatureNet, Outputs
from pipeline.runtime.actors import own_device

log = logging.getLogger(__name__)

Images = UInt8[np.ndarray, "n S S 3"]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of the features of `count` images."""

    count: int
    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]


class Difference(NamedTuple):
    """Sums over pixel values, whole numbers, so that totals are exact for any batches."""

    images: int
    values: int
    squares: int
    absolute: int


@dataclass(frozen=True)
class Reconstruction:
    """What encoding and decoding changes, in pixel values 0 to 255.

    Attributes:
        mse: mean squared error.
        mae: mean absolute error.
        psnr: 10 log10(255^2 / mse), in dB; infinite where nothing changes.
    """

    images: int
    mse: float
    mae: float
    psnr: float


def gaussian(blocks: Iterable[Float[np.ndarray, "n D"]]) -> Gaussian:
    """Statistics of features that arrive in blocks, in float64, by the update of Chan, Golub and LeVeque 1979.

    Raises:
        DataError: fewer than two rows, blocks of different widths, or a feature that is not finite.
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
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians with covariances A and B.

    A B has the eigenvalues of the symmetric R B R with R = A^(1/2), so that no root of a matrix without symmetry
    is needed, and none turns out complex.

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
    """exp of the mean KL divergence of an image's classes from the classes of all images.

    Images are dealt out at random, since samples often come sorted by class.

    Args:
        splits: parts that are scored by themselves; at most one for two images.

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
        tiny = np.finfo(np.float64).tiny  # 0 log 0 = 0
        gain = p * (np.log(p.clip(tiny)) - np.log(p.mean(0).clip(tiny)))
        scores.append(math.exp(gain.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def summarise(outputs: Iterable[Outputs]) -> tuple[Gaussian, Float[np.ndarray, "n K"] | None]:
    """Statistics of the features, and all class probabilities; None from a net without classes.

    Raises:
        DataError: as `gaussian`.
    """
    probabilities: list[np.ndarray] = []

    def features() -> Iterator[np.ndarray]:
        for out in outputs:
            if out.probabilities is not None:
                probabilities.append(out.probabilities)
            yield out.features

    statistics = gaussian(features())
    return statistics, np.concatenate(probabilities) if probabilities else None


def reference_statistics(
    outputs: Callable[[], Iterable[Outputs]], net: str, data: str, count: int, cache: str
) -> Gaussian:
    """Statistics of real images, computed once and kept.

    Args:
        outputs: gives what the net makes of exactly `count` images; called only where nothing is kept yet.
        net: the feature net's name.
        data: a key of the images, such as the hash of a manifest.
        count: how many of them.
        cache: folder, or URL of one, that keeps statistics.

    Raises:
        DataError: another number of images, or what is kept is damaged.
    """
    key = hashlib.sha256(f"{data}\n{net}\n{count}".encode()).hexdigest()
    path = storage.join(cache, f"features-{key[:32]}.safetensors")
    if storage.exists(path):
        return _read(path, count)
    storage.check_writable(cache, "data.path")
    statistics, _ = summarise(outputs())
    if statistics.count != count:
        raise DataError(f"reference statistics: {statistics.count} images of {data}; expected {count}")
    tensors = {"mean": statistics.mean, "covariance": statistics.covariance, "count": np.array([count])}
    storage.publish_bytes(path, safetensors.numpy.save(tensors))
    log.info("features of %d reference images by %s are kept in %s", count, net, path)
    return statistics


def dataset_outputs(
    images: ray.data.Dataset, net: FeatureNet, actors: int, cpus: int, use_gpu: bool
) -> Iterator[Outputs]:
    """What a net makes of a dataset's images, on a pool of Ray actors.

    The order is the dataset's, so that statistics are the same for any number of actors.

    Args:
        images: with the column `image`, uint8 arrays [S, S, 3] of one size.
        net: on the CPU; every actor gets a copy, and moves it to its GPU.
        actors: processes that look at the same time.
        cpus: threads of an actor. A quarter of all CPUs is left to what makes the images, or neither could go on.
    """
    reserved = min(cpus, 0.75 * ray.cluster_resources()["CPU"] / actors)
    images.context.execution_options.preserve_order = True
    images.context.enable_progress_bars = images.context.print_on_execution_start = False
    looked = images.map_batches(
        _Actor,
        fn_constructor_args=(ray.put(net), cpus),
        batch_size=net.batch,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=reserved,
        num_gpus=int(use_gpu),
    )
    for rows in looked.iter_batches(batch_size=net.batch, batch_format="numpy"):
        yield Outputs(rows["features"], rows.get("probabilities"))


def difference(images: Images, rebuilt: Images) -> Difference:
    """How far images are from what a tokenizer makes of them."""
    error = rebuilt.astype(np.int64) - images
    return Difference(len(images), error.size, int((error**2).sum()), int(np.abs(error).sum()))


def reconstruction(parts: Iterable[Difference]) -> Reconstruction:
    """What a tokenizer's codes lose of images.

    Raises:
        DataError: there are no images.
    """
    images, values, squares, sizes = (
        sum(column) for column in zip(Difference(0, 0, 0, 0), *parts, strict=True)
    )
    if not images:
        raise DataError("reconstruction: no images; expected at least one")
    mse = squares / values
    return Reconstruction(images, mse, sizes / values, 10 * math.log10(255**2 / mse) if mse else math.inf)


class _Actor:
    """The net in one process."""

    def __init__(self, net: Any, threads: int):
        torch.set_num_threads(threads)
        self._net: FeatureNet = ray.get(net)
        self._net.to(own_device())

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = self._net(rows["image"])
        found = {"features": out.features}
        return found if out.probabilities is None else found | {"probabilities": out.probabilities}


def _read(path: str, count: int) -> Gaussian:
    try:
        tensors = safetensors.numpy.load(storage.read_bytes(path))
        kept = Gaussian(int(tensors["count"][0]), tensors["mean"], tensors["covariance"])
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: damaged statistics of features ({error}); remove it") from None
    if kept.count != count or kept.covariance.shape != (len(kept.mean),) * 2:
        raise DataError(
            f"{path}: {kept.count} images, mean {list(kept.mean.shape)}, covariance {list(kept.covariance.shape)}; "
            f"expected {count} images and fitting widths; remove it"
        )
    return kept


def _check_widths(known: int, new: int) -> None:
    if known != new:
        raise DataError(f"features of {new} values beside statistics of {known}: of another feature net")
