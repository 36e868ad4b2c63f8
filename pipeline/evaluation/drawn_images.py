"""Figures of drawn images and of what their tokenizer loses, the looking spread over Ray actors."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Int

from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_archives import Ref
from pipeline.data.prepare.images import read_pixels
from pipeline.evaluation.source_images import UNIT, SourceImages, dataset_of
from pipeline.logs import Progress
from pipeline.metrics.image_features import FeatureNet, Outputs, accuracy
from pipeline.metrics.images import (
    Difference,
    Gaussian,
    dataset_outputs,
    difference,
    frechet_distance,
    inception_score,
    reconstruction,
    reference_statistics,
    summarise,
)
from pipeline.metrics.likelihood import NORMAL_95
from pipeline.models.vq import load_image_tokenizer
from pipeline.reports.measures import Group, Measure
from pipeline.runtime.actors import Resources, in_order, own_device, started

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageMeasurement:
    """What a net sees in real images, and in what encoding and decoding makes of them."""

    real: Outputs
    rebuilt: Outputs
    labels: Int[np.ndarray, "n"]
    difference: Difference


class ImageMeasurer:
    """One actor: the feature net and the image tokenizer on its device."""

    def __init__(self, net: FeatureNet, tokenizer: str, data: ImageDataConfig, threads: int):
        torch.set_num_threads(threads)
        device = own_device()
        self._net, self._data = net.to(device), data
        self._tokenizer = load_image_tokenizer(tokenizer, data.factor, data.encode_batch, device)

    def drawn(self, codes: Int[np.ndarray, "n T"]) -> Outputs:
        """What the net sees in the images of codes."""
        return self._net(self._tokenizer.decode(codes))

    def held_out(self, refs: Sequence[Ref]) -> ImageMeasurement | None:
        """What it sees in real images; None if none of them can be read."""
        pixels = read_pixels(refs, self._data)
        if not len(pixels.images):
            return None
        rebuilt = self._tokenizer.decode(self._tokenizer.encode(pixels.images))
        return ImageMeasurement(
            self._net(pixels.images), self._net(rebuilt), pixels.labels, difference(pixels.images, rebuilt)
        )


def reference_of(
    net: FeatureNet, images: SourceImages, data: ImageDataConfig, count: int, cache: str, resources: Resources
) -> Gaussian:
    """Statistics of the training images, computed by a Ray Data job where they are not kept yet.

    Args:
        count: images of the training split that can be read.
        cache: folder of the prepared data.
    """

    def outputs() -> Iterator[Outputs]:
        log.info("looking at %d training images, once", count)
        progress = Progress("looked at", "batches", -(-count // net.batch), "images")
        dataset = dataset_of(images.train, data)
        for seen in dataset_outputs(dataset, net, resources.actors, resources.cpus, resources.use_gpu):
            yield seen
            progress.add(len(seen.features))

    return reference_statistics(outputs, net.name, images.key, count, cache)


def image_groups(
    net: FeatureNet,
    classifier: bool,
    reference: Gaussian,
    codes: Int[np.ndarray, "n T"],
    labels: Sequence[int] | None,
    held_out: Sequence[Ref],
    tokenizer: str,
    data: ImageDataConfig,
    how: dict[str, Any],
    resources: Resources,
) -> list[Group]:
    """Figures of drawn images, and beside them of held-out ones and of their reconstructions.

    Args:
        classifier: whether the net's classes are the data's.
        reference: of the training images.
        codes: of the samples.
        labels: the class that each sample shall show.
        held_out: validation images.
        tokenizer: folder of the image tokenizer.
        how: how the samples were drawn.

    Raises:
        DataError: fewer than two samples or held-out images.
    """
    drawn_tasks = [(codes[i : i + UNIT],) for i in range(0, len(codes), UNIT)]
    real_tasks = [(list(held_out[i : i + UNIT]),) for i in range(0, len(held_out), UNIT)]
    tasks = len(drawn_tasks) + len(real_tasks)
    arguments = (ray.put(net), tokenizer, data, resources.cpus)
    with started(ImageMeasurer, arguments, resources, tasks) as lookers:
        seen: list[Outputs] = list(in_order(lookers, "drawn", drawn_tasks))
        every: list[ImageMeasurement | None] = list(in_order(lookers, "held_out", real_tasks))
    looked = [part for part in every if part is not None]
    classes = np.concatenate([np.empty(0, np.int64), *(part.labels for part in looked)])
    intended = None if labels is None else np.array(labels)
    lost = reconstruction(part.difference for part in looked)

    def measures(outputs: list[Outputs], right: np.ndarray | None, whose: str) -> list[Measure]:
        statistics, probabilities = summarise(outputs)
        by = f"{net.name}, against {reference.count:,} training images"
        found = [Measure("fid", "FID", frechet_distance(statistics, reference), by=by)]
        if probabilities is not None:
            score, spread = inception_score(probabilities)
            by = f"{net.name}, standard deviation of its parts {spread:.2f}"
            found.append(Measure("inception_score", "Inception Score", score, by=by))
        if classifier and probabilities is not None and right is not None:
            name = f"accuracy of the {whose} class"
            interval = _share_interval(accuracy(probabilities, right), len(right))
            found.append(Measure("accuracy", name, accuracy(probabilities, right), interval, by=net.name))
        return found

    lost_by = "/".join(tokenizer.rsplit("/", 2)[1:])
    of_tokenizer = {"images": lost.images, "split": "validation", "tokenizer": lost_by}
    pixels = [
        Measure("mse", "mean squared error", lost.mse, by="pixel values 0 to 255"),
        Measure("psnr", "PSNR, dB", lost.psnr),
    ]
    return [
        Group("samples", "Samples", how, measures(seen, intended, "intended")),
        Group(
            "tokenizer",
            "Reconstructions, which bound what any model on these codes can reach",
            of_tokenizer,
            [*pixels, *measures([part.rebuilt for part in looked], classes, "true")],
        ),
        Group(
            "real",
            "Held-out images themselves",
            {"images": lost.images, "split": "validation"},
            measures([part.real for part in looked], classes, "true"),
        ),
    ]


def distances(
    net: FeatureNet,
    reference: Gaussian,
    groups: Sequence[Int[np.ndarray, "n T"]],
    tokenizer: str,
    data: ImageDataConfig,
    resources: Resources,
) -> list[Measure]:
    """FID of every group of codes.

    Raises:
        DataError: a group of fewer than two samples.
    """
    starts = [(codes, i) for codes in groups for i in range(0, len(codes), UNIT)]
    tasks = [(codes[i : i + UNIT],) for codes, i in starts]
    by = f"{net.name}, against {reference.count:,} training images"
    with started(
        ImageMeasurer, (ray.put(net), tokenizer, data, resources.cpus), resources, len(tasks)
    ) as lookers:
        seen = in_order(lookers, "drawn", tasks)
        found = [summarise(islice(seen, -(-len(codes) // UNIT)))[0] for codes in groups]
    return [Measure("fid", "FID", frechet_distance(one, reference), by=by) for one in found]


def _share_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share.

    Source: Wilson 1927.
    """
    z = NORMAL_95
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half
