"""Evaluation of sampled images and of the image tokenizer, computed by Ray actors."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float, Int, UInt8

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_sources import Ref
from pipeline.data.prepare.images import TOKENIZER, read_pixels
from pipeline.errors import ConfigError
from pipeline.evaluation.source_images import UNIT, SourceImages, dataset_of, load_net, source_images
from pipeline.logs import Progress
from pipeline.metrics import images, precision_recall
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import GRID, GRID_IMAGES, DrawnRows, Samples
from pipeline.metrics.image_features import FeatureNet, Outputs
from pipeline.metrics.image_reference import Reference, ReferenceFile, reference
from pipeline.models.vq import load_image_tokenizer
from pipeline.reports.measures import Group, Measure, share_measure
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
        real: features that precision and recall compare with, where they are measured.
    """

    def __init__(
        self,
        net: FeatureNet,
        tokenizer: str,
        data: ImageDataConfig,
        threads: int,
        real: Float[np.ndarray, "n D"] | None = None,
    ):
        torch.set_num_threads(threads)
        self._device = own_device()
        self._net, self._data, self._real = net.to(self._device), data, real
        self._tokenizer = load_image_tokenizer(tokenizer, data.factor, data.encode_batch, self._device)

    @cached_property
    def _manifold(self) -> precision_recall.Manifold:
        assert self._real is not None
        return precision_recall.manifold(self._real, self._device)

    def coverage(self, features: Float[np.ndarray, "n D"]) -> tuple[float, float]:
        """Compute precision and recall of generated images.

        Args:
            features: of the images.
        """
        return precision_recall.precision_recall(features, self._manifold)

    def given(self, images: UInt8[np.ndarray, "n S S 3"]) -> Outputs:
        """Compute the net's outputs for images.

        Args:
            images: at least one.
        """
        return self._net(images)

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
    """Evaluates sampled images and compares them with training images, or with a published reference.

    The features of the training images are computed when the evaluator is made, or read where they were kept.

    Args:
        run: of the evaluation.
        corpus: its data.

    Attributes:
        real: metrics of held-out images that every comparison shows; none.
        notes: remarks on the metrics for the report.

    Raises:
        ConfigError: there is no such feature net or reference, or there are too few samples or held-out images.
        DataError: the source of the images is missing or has changed, or the reference does not fit.
    """

    def __init__(self, run: Run, corpus: Corpus):
        config = run.config
        data, settings = config.data, config.evaluation
        assert data.kind == "image"
        source = source_images(data, corpus.manifest)
        chosen = validation_rows(len(source.validation), settings.rows)
        _check_counts(config.sampling.num_samples, len(chosen))
        file = None if settings.reference is None else ReferenceFile(settings.reference, data.size)
        net = load_net(settings.features, settings.weights, data, source.train, settings.batch)
        self.real: list[Measure] = []
        self.notes: dict[str, str] = {}
        self._net, self._data = net, data
        self._held_out = [source.validation[i] for i in chosen]
        self._tokenizer, self._resources = storage.join(corpus.path, TOKENIZER), run.resources
        if file is None:
            self._reference = self._training_images(source, corpus)
            against = f"{self._reference.statistics.count:,} training images"
        else:
            file.check_fits(net, data.size)
            self._reference, against = self._published(file, corpus), file.name
        self._method = f"{net.name}, against {against}"

    def _training_images(self, source: SourceImages, corpus: Corpus) -> Reference:
        """Compute the reference of all training images."""
        net, count = self._net, corpus.manifest.split("train").documents

        def outputs() -> Iterator[Outputs]:
            log.info("computing features of %d training images; they are kept for later evaluations", count)
            progress = Progress("computed features of", "batches", -(-count // net.batch), "images")
            for part in images.dataset_outputs(dataset_of(source.train, self._data), net, self._resources):
                yield part
                progress.add(len(part.features))

        return reference(outputs, net.name, source.key, count, corpus.path)

    def _published(self, file: ReferenceFile, corpus: Corpus) -> Reference:
        """Take the reference of a file, with the features of its images where it has some."""
        if not file.count:
            assert file.statistics is not None
            self.notes["precision and recall"] = f"left out, since {file.name} has no images"
            return Reference(file.statistics, None)

        def outputs() -> Iterator[Outputs]:
            log.info("computing features of the %d images of %s", file.count, file.name)
            with self._actors(-(-file.count // UNIT)) as actors:
                for block in file.images(UNIT * len(actors)):
                    yield from in_order(actors, "given", _tasks(block))

        found = reference(outputs, self._net.name, file.key, file.count, corpus.path)
        return found if file.statistics is None else Reference(file.statistics, found.features)

    def measure(self, drawn: Sequence[DrawnRows]) -> list[list[Measure]]:
        """Compute FID, Inception Score, precision, recall and, with `classifier`, the share of the intended class.

        Args:
            drawn: samples, their rows with BOS.

        Raises:
            DataError: too few rows.
        """
        with self._actors(max(len(_tasks(one.tokens)) for one in drawn), self._reference.features) as actors:
            return [
                self._measures(
                    actors, [*in_order(actors, "drawn", _tasks(one.tokens[:, 1:]))], one.labels, "intended"
                )
                for one in drawn
            ]

    def report(self, samples: Samples, how: dict[str, Any]) -> tuple[list[Group], list[Block]]:
        """Compute the metrics of samples, of held-out images and of their reconstructions.

        Args:
            samples: generated images.
            how: how they were sampled.

        Returns:
            Metrics of the three, and overviews of samples and held-out images.

        Raises:
            DataError: too few of the held-out images can be read.
        """
        drawn_tasks, real_tasks = _tasks(samples.tokens[:, 1:]), _tasks(self._held_out)
        with self._actors(len(drawn_tasks) + len(real_tasks), self._reference.features) as actors:
            drawn: list[Outputs] = list(in_order(actors, "drawn", drawn_tasks))
            real = [part for part in in_order(actors, "held_out", real_tasks) if part is not None]
            classes = np.concatenate([np.empty(0, np.int64), *(part.labels for part in real)])
            of_samples = self._measures(actors, drawn, samples.labels, "intended")
            of_rebuilt = self._measures(actors, [part.rebuilt for part in real], classes, "true")
            of_held_out = self._measures(actors, [part.real for part in real], classes, "true")
        lost = images.reconstruction(part.difference for part in real)
        of_real = {"images": lost.images, "split": "validation"}
        of_tokenizer = {**of_real, "tokenizer": "/".join(self._tokenizer.rsplit("/", 2)[1:])}
        rebuilt = [
            Measure("mse", "mean squared error", lost.mse, by="pixel values 0 to 255"),
            Measure("psnr", "PSNR, dB", lost.psnr),
            *of_rebuilt,
        ]
        title = "Reconstructions, which bound the quality of any model of these codes"
        groups = [
            Group("samples", "Samples", how, of_samples),
            Group("tokenizer", title, of_tokenizer, rebuilt),
            Group("real", "Held-out images", of_real, of_held_out),
        ]
        overview = storage.read_bytes(storage.join(samples.folder, GRID))
        pixels = read_pixels(self._held_out[:GRID_IMAGES], self._data)
        grid = sample_grid(pixels.images, pixels.labels.tolist() if samples.labels is not None else None)
        pictures = [Picture("samples", overview, "Samples"), picture("held_out", grid, "Held-out images")]
        return groups, [*pictures]

    def _actors(
        self, tasks: int, real: Float[np.ndarray, "n D"] | None = None
    ) -> AbstractContextManager[list[Any]]:
        arguments = (ray.put(self._net), self._tokenizer, self._data, self._resources.cpus)
        return started(
            ImageMeasurer, (*arguments, None if real is None else ray.put(real)), self._resources, tasks
        )

    def _measures(
        self,
        actors: list[Any],
        outputs: list[Outputs],
        labels: Sequence[int] | Int[np.ndarray, "n"] | None = None,
        whose: str = "",
    ) -> list[Measure]:
        """Compute all metrics of images; with labels, and a classifier of the data's own classes, accuracy too."""
        statistics, probabilities = images.summarise(outputs)
        distance = images.frechet_distance(statistics, self._reference.statistics)
        measures = [Measure("fid", "FID", distance, by=self._method)]
        if probabilities is not None:
            score, spread = images.inception_score(probabilities)
            method = f"{self._net.name}, standard deviation of its parts {spread:.2f}"
            measures.append(Measure("inception_score", "Inception Score", score, by=method))
            if self._net.spec == "classifier" and labels is not None:
                right = probabilities.argmax(1) == np.asarray(labels)
                name = f"accuracy of the {whose} class"
                measures.append(share_measure("accuracy", name, right, by=self._net.name))
        if (real := self._reference.features) is not None:
            own = np.concatenate([part.features for part in outputs])
            ((precision, recall),) = in_order(actors, "coverage", [(own,)])
            method = f"{self._net.name}, k = {precision_recall.NEIGHBOUR}, against {len(real):,} real images"
            measures.append(Measure("precision", "precision", precision, by=method))
            measures.append(Measure("recall", "recall", recall, by=method))
        return measures


def _check_counts(samples: int, held_out: int) -> None:
    """Refuse numbers of images of which not all metrics can be computed."""
    least = precision_recall.LEAST_IMAGES
    expected = (
        f"expected at least {least}, since precision and recall look at the nearest {least - 1} neighbours"
    )
    if samples < least:
        raise ConfigError(f"sampling.num_samples: {samples}; {expected}")
    if held_out < least:
        raise ConfigError(f"evaluation.rows: {held_out} held-out images; {expected}")


def _tasks(items: Any) -> list[tuple[Any]]:
    """Cut images or their codes into tasks."""
    return [(items[first : first + UNIT],) for first in range(0, len(items), UNIT)]
