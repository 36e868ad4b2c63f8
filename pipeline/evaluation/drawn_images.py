"""Evaluation of sampled images and of the image tokenizer, computed by Ray actors."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Int
from scipy.stats import binomtest

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_sources import Ref
from pipeline.data.prepare.images import TOKENIZER, read_pixels
from pipeline.errors import ConfigError
from pipeline.evaluation.source_images import UNIT, dataset_of, load_net, source_images
from pipeline.logs import Progress
from pipeline.metrics import images
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import GRID, GRID_IMAGES, Samples
from pipeline.metrics.image_features import FeatureNet, Outputs, accuracy
from pipeline.models.vq import load_image_tokenizer
from pipeline.reports.measures import Group, Measure
from pipeline.reports.page import Block, Picture, picture
from pipeline.reports.pictures import sample_grid
from pipeline.run import Run
from pipeline.runtime.actors import in_order, own_device, started
from pipeline.training.validation import validation_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageMeasurement:
    """A feature net's outputs for real images and for their reconstructions.

    Attributes:
        real, rebuilt: outputs of the net.
        labels: of the images.
        difference: between the images and their reconstructions.
    """

    real: Outputs
    rebuilt: Outputs
    labels: Int[np.ndarray, "n"]
    difference: images.Difference


class ImageMeasurer:
    """A feature net and an image tokenizer on one device; one Ray actor holds one.

    Args:
        net: the feature net.
        tokenizer: folder of the image tokenizer.
        data: how images are read.
        threads: CPU threads.
    """

    def __init__(self, net: FeatureNet, tokenizer: str, data: ImageDataConfig, threads: int):
        torch.set_num_threads(threads)
        device = own_device()
        self._net, self._data = net.to(device), data
        self._tokenizer = load_image_tokenizer(tokenizer, data.factor, data.encode_batch, device)

    def drawn(self, codes: Int[np.ndarray, "n T"]) -> Outputs:
        """Decode codes and compute the net's outputs.

        Args:
            codes: of images.
        """
        return self._net(self._tokenizer.decode(codes))

    def held_out(self, refs: Sequence[Ref]) -> ImageMeasurement | None:
        """Read real images and compute the outputs for them; None if none of them can be read.

        Args:
            refs: of the images.
        """
        pixels = read_pixels(refs, self._data)
        if not len(pixels.images):
            return None
        rebuilt = self._tokenizer.decode(self._tokenizer.encode(pixels.images))
        difference = images.difference(pixels.images, rebuilt)
        return ImageMeasurement(self._net(pixels.images), self._net(rebuilt), pixels.labels, difference)


class ImageEvaluator:
    """Evaluates sampled images and compares them with training images.

    The statistics of the training images are computed when the evaluator is made, or read where they were kept.

    Args:
        run: of the evaluation.
        corpus: its data.

    Attributes:
        real: metrics of held-out images that every comparison shows; none.
        notes: remarks on the metrics for the report.

    Raises:
        ConfigError: there is no such feature net, or a single sample is to be drawn.
        DataError: the source of the images is missing or has changed.
    """

    def __init__(self, run: Run, corpus: Corpus):
        config = run.config
        data, settings = config.data, config.evaluation
        assert data.kind == "image"
        if config.sampling.num_samples < 2:
            raise ConfigError("sampling.num_samples: 1; expected at least 2, since a covariance needs them")
        source = source_images(data, corpus.manifest)
        net = load_net(settings.features, settings.weights, data, source.train, settings.batch)
        count = corpus.manifest.split("train").documents

        def outputs() -> Iterator[Outputs]:
            log.info("computing features of %d training images; they are kept for later evaluations", count)
            progress = Progress("computed features of", "batches", -(-count // net.batch), "images")
            for part in images.dataset_outputs(dataset_of(source.train, data), net, run.resources):
                yield part
                progress.add(len(part.features))

        self.real: list[Measure] = []
        self.notes: dict[str, str] = {}
        self._net, self._data = net, data
        self._reference = images.reference_statistics(outputs, net.name, source.key, count, corpus.path)
        self._method = f"{net.name}, against {count:,} training images"
        chosen = validation_rows(len(source.validation), settings.rows)
        self._held_out = [source.validation[i] for i in chosen]
        self._tokenizer, self._resources = storage.join(corpus.path, TOKENIZER), run.resources

    def measure(self, groups: Sequence[Int[np.ndarray, "n L"]]) -> list[list[Measure]]:
        """Compute the FID of groups of rows.

        Args:
            groups: rows of codes, BOS included.

        Raises:
            DataError: a group has fewer than two rows.
        """
        tasks = [task for rows in groups for task in _tasks(rows[:, 1:])]
        with self._actors(len(tasks)) as actors:
            outputs = in_order(actors, "drawn", tasks)
            return [[self._fid(images.summarise(islice(outputs, len(_tasks(rows))))[0])] for rows in groups]

    def report(self, samples: Samples, how: dict[str, Any]) -> tuple[list[Group], list[Block]]:
        """Compute the metrics of samples, of held-out images and of their reconstructions.

        Args:
            samples: generated images.
            how: how they were sampled.

        Returns:
            Metrics of the three, and overviews of samples and held-out images.

        Raises:
            DataError: there are fewer than two samples or held-out images.
        """
        drawn_tasks, real_tasks = _tasks(samples.tokens[:, 1:]), _tasks(self._held_out)
        with self._actors(len(drawn_tasks) + len(real_tasks)) as actors:
            drawn: list[Outputs] = list(in_order(actors, "drawn", drawn_tasks))
            real = [part for part in in_order(actors, "held_out", real_tasks) if part is not None]
        classes = np.concatenate([np.empty(0, np.int64), *(part.labels for part in real)])
        intended = None if samples.labels is None else np.array(samples.labels)
        lost = images.reconstruction(part.difference for part in real)
        of_real = {"images": lost.images, "split": "validation"}
        of_tokenizer = {**of_real, "tokenizer": "/".join(self._tokenizer.rsplit("/", 2)[1:])}
        rebuilt = [
            Measure("mse", "mean squared error", lost.mse, by="pixel values 0 to 255"),
            Measure("psnr", "PSNR, dB", lost.psnr),
            *self._measures([part.rebuilt for part in real], classes, "true"),
        ]
        held_out = self._measures([part.real for part in real], classes, "true")
        title = "Reconstructions, which bound the quality of any model of these codes"
        groups = [
            Group("samples", "Samples", how, self._measures(drawn, intended, "intended")),
            Group("tokenizer", title, of_tokenizer, rebuilt),
            Group("real", "Held-out images", of_real, held_out),
        ]
        overview = storage.read_bytes(storage.join(samples.folder, GRID))
        pixels = read_pixels(self._held_out[:GRID_IMAGES], self._data)
        grid = sample_grid(pixels.images, pixels.labels.tolist() if samples.labels is not None else None)
        pictures = [Picture("samples", overview, "Samples"), picture("held_out", grid, "Held-out images")]
        return groups, [*pictures]

    def _actors(self, tasks: int) -> AbstractContextManager[list[Any]]:
        arguments = (ray.put(self._net), self._tokenizer, self._data, self._resources.cpus)
        return started(ImageMeasurer, arguments, self._resources, tasks)

    def _fid(self, statistics: images.Gaussian) -> Measure:
        return Measure("fid", "FID", images.frechet_distance(statistics, self._reference), by=self._method)

    def _measures(
        self, outputs: list[Outputs], labels: Int[np.ndarray, "n"] | None, whose: str
    ) -> list[Measure]:
        """Compute FID, Inception Score and, under a classifier of the data's own classes, accuracy."""
        statistics, probabilities = images.summarise(outputs)
        measures = [self._fid(statistics)]
        if probabilities is not None:
            score, spread = images.inception_score(probabilities)
            method = f"{self._net.name}, standard deviation of its parts {spread:.2f}"
            measures.append(Measure("inception_score", "Inception Score", score, by=method))
            if self._net.spec == "classifier" and labels is not None:
                share, name = accuracy(probabilities, labels), f"accuracy of the {whose} class"
                test = binomtest(round(share * len(labels)), len(labels))
                low, high = test.proportion_ci(method="wilson")
                measures.append(Measure("accuracy", name, share, (low, high), by=self._net.name))
        return measures


def _tasks(items: Any) -> list[tuple[Any]]:
    """Cut images or their codes into tasks."""
    return [(items[first : first + UNIT],) for first in range(0, len(items), UNIT)]
