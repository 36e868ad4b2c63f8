"""The images that prepared codes were made from, cropped and resized as in the preparation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray.data

from pipeline.config.data import ImageDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.image_sources import Ref, list_images, open_images
from pipeline.data.prepare.images import held_out, read_pixels, read_spread
from pipeline.errors import ConfigError, DataError
from pipeline.metrics.image_features import CLASSIFIER_IMAGES, CLASSIFIER_SIDE, FeatureNet, load_features

UNIT = 256  # images that are read together
_READ_CPUS = 0.25  # CPUs of a task that reads images, so that it fits beside the actors that compute features


@dataclass(frozen=True)
class SourceImages:
    """References to the images of both splits.

    Attributes:
        train, validation: the splits.
        key: changes with the images, their split and their size.
    """

    train: list[Ref]
    validation: list[Ref]
    key: str


def source_images(data: ImageDataConfig, manifest: Manifest) -> SourceImages:
    """List the images that prepared codes were made from.

    Args:
        data: section of the config.
        manifest: of the prepared codes.

    Raises:
        DataError: the source is missing, or has changed since.
    """
    source = open_images(data)
    if source.info.fingerprint != manifest.source.fingerprint:
        raise DataError(
            f"data.source: {data.source!r} has changed since its codes were prepared; expected the same images, "
            "which are the reference for samples"
        )
    refs = list_images(source, data).refs
    is_held_out = held_out(np.arange(len(refs)), data.validation_images, len(refs))
    train, validation = ([refs[i] for i in np.flatnonzero(mask)] for mask in (~is_held_out, is_held_out))
    return SourceImages(train, validation, f"{manifest.content_key}-{source.info.fingerprint}")


def load_net(
    spec: str | None, weights: str | None, data: ImageDataConfig, train: Sequence[Ref], batch: int
) -> FeatureNet:
    """Load the feature net of a config on the CPU.

    Args:
        spec: `evaluation.features`; None: "classifier" where images are small enough for it, else "inception".
        weights: `evaluation.weights`.
        data: section of the config.
        train: training images, on which "classifier" is fitted.
        batch: images of a forward pass.

    Raises:
        ConfigError: the net is unknown, or the images are too large for "classifier"; and as `load_features`.
    """
    small = data.size <= CLASSIFIER_SIDE
    spec = spec or ("classifier" if small else "inception")
    if spec == "classifier" and not small:
        raise ConfigError(
            f"evaluation.features: 'classifier' takes images of at most {CLASSIFIER_SIDE} pixels, data.size is "
            f"{data.size}; expected 'inception', 'efficientnet' or package.module:factory"
        )
    labelled = read_spread(train, data, CLASSIFIER_IMAGES) if spec == "classifier" else None
    return load_features(spec, weights, labelled, batch)


def dataset_of(refs: Sequence[Ref], data: ImageDataConfig) -> ray.data.Dataset:
    """Make a Ray dataset with the column `image`, in the order of the refs, without images that cannot be read.

    Args:
        refs: of the images.
        data: section of the config.
    """
    units = [{"refs": json.dumps(refs[i : i + UNIT])} for i in range(0, len(refs), UNIT)]
    rows: ray.data.Dataset = ray.data.from_items(units, override_num_blocks=len(units))
    return rows.flat_map(partial(_read_unit, data=data), num_cpus=_READ_CPUS)


def _read_unit(row: dict[str, Any], data: ImageDataConfig) -> list[dict[str, Any]]:
    refs = [Ref(*ref) for ref in json.loads(row["refs"])]
    return [{"image": image} for image in read_pixels(refs, data).images]
