"""Image preparation: labelled images -> rows of BOS and a grid of codes, on Ray.

Three stages, each skipping what an earlier, interrupted run has finished:
  1. The tokenizer is loaded, or fitted on training images, and kept beside the shards.
  2. Ray Data reads units of images and encodes each, on a pool of actors, into one intermediate file.
  3. Prefix sums over the units' rows give every shard its exact range; Ray tasks write them.
What comes out depends on the input and the config alone; codes of a network also on the kind of device.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.manifest import SpecialIds, Split, TokenizerInfo, token_dtype, weights_hash
from pipeline.data.prepare.encoding import (
    Encoder,
    Layout,
    Shard,
    Unit,
    held_out,
    plan_pieces,
    read_pixels,
    read_unit,
    read_unit_pixels,
    refusal,
    write_shard,
)
from pipeline.data.prepare.image_archives import Ref
from pipeline.data.prepare.image_sources import ImageSource, list_images
from pipeline.data.prepare.workflow import PreparationResult, Progress, run_shards, run_units
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same config and input would give other shards
TOKENIZER = "tokenizer"  # folder beside the shards
_UNIT = 256  # images of a unit, rounded up to whole calls of the tokenizer
_FIT_SEED = 0
_READERS = 8  # threads that read the images on which the tokenizer is fitted


def content(data: ImageDataConfig) -> dict[str, Any]:
    """Every setting that determines what the shards hold."""
    keys = ("kind", "source", "subset", "split", "revision", "on_error", "image_field", "label_field")
    shape = ("classes", "size", "factor", "flip", "validation_images", "shard_rows")
    patch = data.tokenizer == "patch"  # whose codes do not depend on how many are encoded together
    made = ("codes", "fit_images") if patch else ("encode_batch", "encode_threads")
    values = {key: getattr(data, key) for key in keys + shape + made}
    return {**values, "tokenizer": "patch" if patch else weights_hash(data.tokenizer), "format": FORMAT}


def build(data: ImageDataConfig, source: ImageSource, path: str, work: str) -> PreparationResult:
    """Make the shards of `data`, or those that an interrupted run did not.

    Args:
        path: folder of the shards.
        work: folder of intermediate files.

    Raises:
        DataError: the source is empty, unreadable or too small.
        ConfigError: no such tokenizer, or one that does not fit.
    """
    log.info("listing %s", data.source)
    listing = list_images(source, data)
    for problem in listing.problems:
        if data.on_error == "fatal":
            raise refusal(problem)
        log.warning("skipped %s", problem)
    images = len(listing.refs)
    if not images:
        raise DataError(f"data.source: {data.source!r} is empty: no image that can be read")
    if data.validation_images >= images:
        raise DataError(
            f"data.validation_images: {data.validation_images} of {images} images would leave none to train on; "
            f"expected less than {images}"
        )
    tokenizer = _tokenizer(data, listing.refs, work)
    bos = tokenizer.codes + 1  # behind the mask
    units = _encode(data, listing.refs, work)
    pieces = plan_pieces(units, data.flip)
    rows = {split: int(part[:, 2].sum()) for split, part in pieces.items()}
    for split, count in rows.items():
        if not count:
            raise DataError(f"data.source: no image of the {split} split can be read")
    shards = [
        Shard(f"{split}-{number:05d}.parquet", split, start, min(start + data.shard_rows, count))
        for split, count in rows.items()
        for number, start in enumerate(range(0, count, data.shard_rows))
    ]
    layout = Layout(pieces, bos, token_dtype(bos + 1).str)
    files = run_shards(shards, write_shard, layout, path, work, "rows")
    _save(tokenizer, storage.join(path, TOKENIZER))
    kept = {
        "train": sum(unit.train for unit in units),
        "validation": sum(unit.validation for unit in units),
    }
    return PreparationResult(
        vocabulary=tokenizer.codes,
        special=SpecialIds(eot=None, bos=bos),
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        splits={
            split: Split(
                files=tuple(files[shard.name] for shard in shards if shard.split == split),
                documents=kept[split],
                tokens=count * data.length,
                tokens_dropped=0,
            )
            for split, count in rows.items()
        },
        documents=sum(kept.values()),
        empty=0,
        tokens=sum(rows.values()) * data.length,
        problems=(
            *map(str, listing.problems),
            *(problem for unit in units for problem in unit.problems),
        ),
        classes=data.classes,
        class_names=listing.class_names,
        grid=data.size // data.factor,
    )


def _tokenizer(data: ImageDataConfig, refs: Sequence[Ref], work: str) -> "ImageTokenizer":
    """Stage 1: the tokenizer, which encoders find in `work`."""
    from pipeline.models.vq import load_image_tokenizer  # takes seconds, and text does without

    folder = storage.join(work, TOKENIZER)
    if storage.folder_complete(folder):
        return load_image_tokenizer(folder, data.factor, data.encode_batch, "cpu")
    if data.tokenizer == "patch":
        tokenizer = _fit(data, refs)
    else:
        tokenizer = load_image_tokenizer(data.tokenizer, data.factor, data.encode_batch, "cpu")
    _save(tokenizer, folder)
    return tokenizer


def _fit(data: ImageDataConfig, refs: Sequence[Ref]) -> "ImageTokenizer":
    """A codebook of patches of training images, evenly spread."""
    from pipeline.models.vq import fit_patches

    numbers = np.arange(len(refs), dtype=np.int64)
    train = numbers[~held_out(numbers, data.validation_images, len(refs))]
    count = min(len(train), data.fit_images)
    chosen = train[np.arange(count) * len(train) // count]
    log.info("fitting %d codes on %d images", data.codes, count)
    parts = np.array_split(chosen, -(-count // _UNIT))
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda part: read_pixels([refs[i] for i in part], data).images, parts)
        images = np.concatenate(list(read))
    return fit_patches(images, data.codes, data.factor, _FIT_SEED)


def _save(tokenizer: "ImageTokenizer", folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(local := Path(scratch) / TOKENIZER)
        storage.publish_folder(local, folder)


def _encode(data: ImageDataConfig, refs: Sequence[Ref], work: str) -> list[Unit]:
    """Stage 2: every unit's codes in `work`, and their counts."""
    size = -(-_UNIT // data.encode_batch) * data.encode_batch
    count = -(-len(refs) // size)
    there = set(storage.listing(work))
    done = [read_unit(work, index) for index in range(count) if f"unit-{index:06d}.json" in there]
    if done:
        log.info("%d of %d units were encoded before", len(done), count)
    finished = {unit.index for unit in done}
    todo = [
        {"index": index, "first": index * size, "refs": json.dumps(refs[index * size : (index + 1) * size])}
        for index in range(count)
        if index not in finished
    ]
    progress = Progress("encoded", "units", len(todo), "images")
    for record in run_units(todo, *_stages(data, len(refs), work)):
        unit = Unit(**record)
        if unit.fatal:
            raise DataError(unit.fatal)
        done.append(unit)
        progress.add(unit.train + unit.validation + len(unit.problems))
    for problem in (problem for unit in done for problem in unit.problems):
        log.warning("skipped %s", problem)
    return sorted(done, key=lambda unit: unit.index)


def _stages(data: ImageDataConfig, images: int, work: str) -> tuple[Any, ...]:
    """Reading on any free CPU, then encoding on a pool of actors with a GPU each.

    Without GPUs both ask for the same, so that Ray Data runs them in one process, without a copy in between.
    """
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 1.0), int(there.get("GPU", 0))
    actors = min(data.encoders, gpus) if gpus else data.encoders
    if actors < data.encoders:
        log.warning(
            "data.encoders: %d, but the cluster has %d GPUs: %d are used", data.encoders, gpus, actors
        )
    share = min(1.0, cpus / 2) if gpus else min(data.encode_threads, cpus / actors)
    read = partial(read_unit_pixels, data=data, validation=data.validation_images, images=images)

    def reading(units: ray.data.Dataset) -> ray.data.Dataset:
        return units.map(read, num_cpus=share)

    def encoding(units: ray.data.Dataset) -> ray.data.Dataset:
        return units.map(
            Encoder,  # type: ignore[arg-type]  # a class, whose actors are called
            fn_constructor_args=(storage.join(work, TOKENIZER), data, work, "cuda" if gpus else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=min(share, cpus / 2 / actors) if gpus else share,
            num_gpus=1 if gpus else 0,
        )

    return reading, encoding
