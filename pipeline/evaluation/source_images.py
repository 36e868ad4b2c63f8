"""The images behind prepared codes: the source's pixels, cut and sized as the preparation saw them."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray.data

from pipeline.config.data import ImageDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.image_archives import Ref
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import held_out, read_pixels
from pipeline.errors import ConfigError, DataError
from pipeline.metrics.image_features import (
    CLASSIFIER_IMAGES,
    CLASSIFIER_SIDE,
    FeatureNet,
    Labelled,
    load_features,
)

UNIT = 256  # images that are read together
_READING = 0.25  # CPUs of a task that reads them, so that one fits beside the actors that look at them
_READERS = 8  # threads that read the images on which a classifier is fitted


@dataclass(frozen=True)
class SourceImages:
    """The images of both splits, none of them read yet.

    Attributes:
        key: changes with the images, their split and their size.
    """

    train: list[Ref]
    validation: list[Ref]
    key: str


def source_images(data: ImageDataConfig, manifest: Manifest) -> SourceImages:
    """The images that prepared codes were made from.

    Raises:
        DataError: the source is gone, or is not what it was then.
    """
    source = open_images(data)
    if source.info.fingerprint != manifest.source.fingerprint:
        raise DataError(
            f"data.source: {data.source!r} has changed since its codes were prepared, so its images are no reference "
            "for them; expected the same images"
        )
    refs = list_images(source, data).refs
    out = held_out(np.arange(len(refs)), data.validation_images, len(refs))
    splits: dict[bool, list[Ref]] = {False: [], True: []}
    for ref, kept_back in zip(refs, out.tolist(), strict=True):
        splits[kept_back].append(ref)
    return SourceImages(splits[False], splits[True], f"{manifest.content_key}-{source.info.fingerprint}")


def load_net(
    spec: str | None, weights: str | None, data: ImageDataConfig, train: Sequence[Ref], batch: int
) -> FeatureNet:
    """The feature net that a config names, on the CPU; "classifier" is fitted on training images.

    Args:
        spec: `evaluation.features`; None: "classifier" where images are small enough for it, else "inception".

    Raises:
        ConfigError: an unknown net, or images too large for "classifier"; and as `load_features`.
    """
    small = data.size <= CLASSIFIER_SIDE
    spec = spec or ("classifier" if small else "inception")
    if spec == "classifier" and not small:
        raise ConfigError(
            f"evaluation.features: 'classifier' looks at images of at most {CLASSIFIER_SIDE} pixels, data.size is "
            f"{data.size}; expected 'inception', 'efficientnet' or package.module:factory"
        )
    labelled = _read_labelled(data, train) if spec == "classifier" else None
    return load_features(spec, weights, labelled, batch, "cpu")


def dataset_of(refs: Sequence[Ref], data: ImageDataConfig) -> ray.data.Dataset:
    """Images as Ray Data rows with the column `image`, in the order of the refs; what cannot be read is left out."""
    units = [{"refs": json.dumps(refs[i : i + UNIT])} for i in range(0, len(refs), UNIT)]
    rows: ray.data.Dataset = ray.data.from_items(units, override_num_blocks=len(units))
    return rows.flat_map(partial(_read_unit, data=data), num_cpus=_READING)


def _read_unit(row: dict[str, Any], data: ImageDataConfig) -> list[dict[str, Any]]:
    refs = [Ref(*ref) for ref in json.loads(row["refs"])]
    return [{"image": image} for image in read_pixels(refs, data).images]


def _read_labelled(data: ImageDataConfig, refs: Sequence[Ref]) -> Labelled:
    """Images and labels, evenly spread, at most `CLASSIFIER_IMAGES`."""
    count = min(len(refs), CLASSIFIER_IMAGES)
    chosen = [refs[i * len(refs) // count] for i in range(count)]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = [chosen[i : i + UNIT] for i in range(0, count, UNIT)]
        read = list(pool.map(lambda part: read_pixels(part, data), parts))
    return np.concatenate([part.images for part in read]), np.concatenate([part.labels for part in read])
