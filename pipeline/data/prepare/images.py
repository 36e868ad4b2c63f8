"""Image preparation: images become shards of rows of BOS or a caption and a grid of codes, on Ray.

1. The tokenizer is loaded, or fitted on training images, and kept beside the shards.
2. Ray Data reads the units of images and encodes each, on a pool of actors, into one intermediate file.
3. Ray tasks write the shards from the rows of the units. The mirrored copies of the training images follow behind
   all of the originals: the two rows of an image are then as far from each other as can be, and rarely meet in a
   batch.

What the shards hold depends on the input and the config alone; codes of a network also on the kind of device.
"""

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from jaxtyping import Bool, Int64, Shaped, UInt8

from pipeline import storage
from pipeline.config.data import ImageDataConfig, PairDataConfig, Pictures
from pipeline.data.manifest import (
    TOKENIZER,
    Manifest,
    SpecialIds,
    TokenizerInfo,
    hash_content,
    tokenizer_key,
)
from pipeline.data.pixels import square
from pipeline.data.prepare import workflow
from pipeline.data.prepare.image_sources import (
    ImageSource,
    Listing,
    Ref,
    list_file,
    list_images,
    read_images,
)
from pipeline.data.prepare.source_files import Problem, leave_out, reached
from pipeline.data.shards import Rows, token_dtype
from pipeline.data.tokenizers import PairTokenizer, Tokenizer, load_tokenizer, train_bpe
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same config and input would give other shards
_UNIT = 256  # images of a unit, rounded up to whole calls of the tokenizer
_FIT_SEED = 0
_READERS = 8  # threads that read the images on which the tokenizer is fitted


class ImageUnit(workflow.Unit):
    """The record of one encoded unit.

    Its file (`npz`) has codes and labels, or codes and captions as ids: of the training images, of their mirrored
    copies, of the held-out images.

    Attributes:
        train: number of training images, mirrored copies not counted.
        validation: number of held-out images.
        cut: number of captions that do not fit with an end of text.
    """

    train: int = 0
    validation: int = 0
    cut: int = 0

    @property
    def amount(self) -> int:
        """The number of images."""
        return self.train + self.validation + len(self.problems)


@dataclass
class Pixels:
    """Images that were read.

    Attributes:
        images: as RGB squares.
        labels: their classes, or their captions.
        kept: their places among all images that were to be read.
        problems: what is wrong with the others.
    """

    images: UInt8[np.ndarray, "n S S 3"]
    labels: Shaped[np.ndarray, "n"]
    kept: Int64[np.ndarray, "n"]
    problems: list[str] = field(default_factory=list)


def content(data: Pictures) -> dict[str, Any]:
    """Return every setting that determines what the shards hold, by key of the config.

    Args:
        data: the data section of the config.
    """
    keys = ("kind", "source", "subset", "split", "revision", "on_error", "image_field", data.described_by)
    shape: tuple[str, ...] = ("size", "factor", "validation_images", "shard_rows")
    shape += ("classes", "flip") if isinstance(data, ImageDataConfig) else ("captions", "caption_length")
    patch = data.tokenizer == "patch"  # its codes do not depend on how many images are encoded together
    encoding = ("codes", "fit_images") if patch else ("encode_batch", "encode_threads")
    values = {key: getattr(data, key) for key in keys + shape + encoding}
    if isinstance(data, PairDataConfig):
        spec = data.text_tokenizer
        values["text_tokenizer"] = spec if data.fitted is not None else load_tokenizer(spec).hash
    return {**values, "tokenizer": tokenizer_key(data.tokenizer), "format": FORMAT}


def build(data: Pictures, source: ImageSource, path: str, work: str) -> Manifest:
    """Make the shards, except for those that an interrupted preparation has finished.

    Args:
        data: the data section of the config.
        source: the listed files.
        path: folder of the shards.
        work: folder of the intermediate files.

    Returns:
        The manifest, which is not written yet.

    Raises:
        DataError: the source is empty, unreadable or too small.
        ConfigError: the tokenizer does not exist or does not fit.
    """
    listing = _list(data, source)
    refs = listing.refs
    tokenizer = _tokenizer(data, refs, work)
    pair = tokenizer if isinstance(tokenizer, PairTokenizer) else None
    codes = (tokenizer.image if isinstance(tokenizer, PairTokenizer) else tokenizer).codes
    text_ids = 0 if pair is None else pair.text.vocab_size
    bos = codes + 1 if pair is None else None  # behind the mask
    size = unit_size(data)
    inputs = [refs[start : start + size] for start in range(0, len(refs), size)]
    encode = partial(_encode_units, data=data, images=len(refs), work=work)
    units = workflow.run_units(inputs, ImageUnit, encode, work=work, verb="encoded", amounts="images")
    make = partial(_rows, work=work, bos=bos, text_ids=text_ids, ids=text_ids + (bos or codes - 1) + 1)
    splits = workflow.write_shards(plan_splits(units, data), make, path, work=work, unit="rows")
    workflow.save_tokenizer(tokenizer, storage.join(path, TOKENIZER))
    settings = content(data)
    return Manifest(
        length=data.length,
        vocabulary=text_ids + codes,
        special=SpecialIds(eot=None if pair is None else pair.text.eot, bos=bos),
        wrap="none",
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        source=source.info,
        content=settings,
        content_key=hash_content(settings),
        splits=splits,
        documents=sum(split.documents for split in splits.values()),
        documents_empty=0,
        tokens=sum(split.tokens for split in splits.values()),
        skipped=workflow.skipped(units, *map(str, listing.problems)),
        classes=data.classes if isinstance(data, ImageDataConfig) else None,
        class_names=listing.class_names,
        grid=data.size // data.factor,
        rows_cut=sum(unit.cut for unit in units),
        caption=data.caption_length if isinstance(data, PairDataConfig) else None,
        text_ids=text_ids or None,
    )


def held_out(numbers: Int64[np.ndarray, "n"], validation: int, images: int) -> Bool[np.ndarray, "n"]:
    """Choose the images that belong to validation, evenly spread over all images.

    Args:
        numbers: of the images in question.
        validation: how many of all images are held out.
        images: number of all images.

    Returns:
        Whether each of the images in question is held out.
    """
    return (numbers + 1) * validation // images > numbers * validation // images


@storage.retry
def read_pixels(refs: Sequence[Ref], data: Pictures) -> Pixels:
    """Read images, crop them to squares and resize them.

    Args:
        refs: which images.
        data: the data section of the config.

    Returns:
        The images that can be read.

    Raises:
        DataError: one cannot be read, and `data.on_error` is fatal.
    """
    images, labels, kept, problems = [], [], [], []
    for place, (ref, item) in enumerate(zip(refs, read_images(refs, data), strict=True)):
        if not isinstance(item, Problem):
            try:
                images.append(square(item[0], data.size))
                labels.append(item[1])
                kept.append(place)
                continue
            except DataError as error:
                item = Problem(str(ref), str(error))
        problems.append(leave_out(item, data))
    pixels = np.stack(images) if images else np.empty((0, data.size, data.size, 3), np.uint8)
    described = np.array(labels, np.int64 if isinstance(data, ImageDataConfig) else np.str_)
    return Pixels(pixels, described, np.array(kept, np.int64), problems)


def read_spread(
    refs: Sequence[Ref], data: Pictures, most: int
) -> tuple[UInt8[np.ndarray, "n S S 3"], Shaped[np.ndarray, "n"]]:
    """Read images, evenly spread over a list, in several threads.

    Args:
        refs: the list.
        data: the data section of the config.
        most: how many to read at most.

    Returns:
        The images that can be read, and their labels or captions.

    Raises:
        DataError: one cannot be read, and `data.on_error` is fatal.
    """
    count = min(len(refs), most)
    chosen = [refs[i * len(refs) // count] for i in range(count)]
    parts = [chosen[start : start + _UNIT] for start in range(0, count, _UNIT)]
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(lambda part: read_pixels(part, data), parts))
    return np.concatenate([part.images for part in read]), np.concatenate([part.labels for part in read])


def unit_size(data: Pictures) -> int:
    """Return the number of images in a unit.

    Args:
        data: the data section of the config.
    """
    return -(-_UNIT // data.encode_batch) * data.encode_batch


class Encoder:
    """Encodes units that were read, with the tokenizer in memory; for the actors of Ray Data.

    Args:
        data: the data section of the config.
        images: number of all images.
        work: folder of the intermediate files, which has the tokenizer.
        device: "cuda" or "cpu".
    """

    def __init__(self, data: Pictures, images: int, work: str, device: str) -> None:
        import torch  # takes seconds, and readers of images and writers of shards do without

        torch.set_num_threads(data.encode_threads)
        self._tokenizer = _load(data, folder := storage.join(work, TOKENIZER), device)
        self._text = load_tokenizer(folder) if isinstance(data, PairDataConfig) else None
        self._data, self._images, self._work = data, images, work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode one unit and write its file and its record.

        Args:
            row: the number and the `Pixels` of the unit, see `map_row`.

        Returns:
            A row of the record.
        """
        return workflow.map_row(row, self._encode)

    def _encode(self, unit: tuple[int, Pixels]) -> ImageUnit:
        """Write the codes and labels of a unit, then its record."""
        (index, pixels), data = unit, self._data
        out = held_out(index * unit_size(data) + pixels.kept, data.validation_images, self._images)
        order = np.argsort(out, kind="stable")
        images, labels, train = pixels.images[order], pixels.labels[order], int((~out).sum())
        cut = 0
        if isinstance(data, PairDataConfig):
            assert self._text is not None
            pair = PairTokenizer(self._text, self._tokenizer)
            labels, cut = pair.encode_captions(labels.tolist(), data.caption_length)
        elif data.flip:
            images = np.concatenate([images[:train], images[:train, :, ::-1], images[train:]])
            labels = np.concatenate([labels[:train], labels])
        sink = io.BytesIO()
        np.savez(sink, codes=self._tokenizer.encode(images).astype("<i4"), labels=labels)
        storage.publish_bytes(workflow.unit_path(self._work, index, "npz"), sink.getvalue())
        counts = {"train": train, "validation": len(out) - train, "cut": cut}
        return ImageUnit(index=index, problems=pixels.problems, **counts).publish(self._work)


def plan_splits(units: Sequence[ImageUnit], data: Pictures) -> dict[str, workflow.SplitPlan]:
    """Decide which shard holds which rows.

    Args:
        units: records of all units, in order.
        data: the data section of the config.

    Returns:
        The plans of the splits "train" and "validation".

    Raises:
        DataError: a split has no rows.
    """
    copies = 2 if isinstance(data, ImageDataConfig) and data.flip else 1
    train = [(u.index, copy * u.train, (copy + 1) * u.train) for copy in range(copies) for u in units]
    validation = [(u.index, copies * u.train, copies * u.train + u.validation) for u in units]
    counts = (sum(unit.train for unit in units), sum(unit.validation for unit in units))
    pieces, border = np.array(train + validation, np.int64), copies * counts[0]
    plans = workflow.plan_splits(pieces, border, counts, data.shard_rows, row=1, tokens=data.length)
    for name, plan in plans.items():
        if not plan.shards:
            raise DataError(f"data.source: no image of the {name} split can be read")
    return plans


def _rows(shard: workflow.Shard, work: str, bos: int | None, text_ids: int, ids: int) -> Rows:
    """Read the codes of a shard, and put the BOS or the caption in front of every row."""
    codes, labels = [], []
    for unit, start, stop in shard.pieces.tolist():
        with np.load(io.BytesIO(storage.read_bytes(workflow.unit_path(work, unit, "npz")))) as file:
            codes.append(file["codes"][start:stop])
            labels.append(file["labels"][start:stop])
    if bos is None:
        rows = np.concatenate([np.concatenate(labels), np.concatenate(codes) + text_ids], 1)
        return Rows(rows.astype(token_dtype(ids)))
    rows = np.pad(np.concatenate(codes), ((0, 0), (1, 0)), constant_values=bos)
    return Rows(rows.astype(token_dtype(ids)), np.concatenate(labels))


def _list(data: Pictures, source: ImageSource) -> Listing:
    """List all images; raise what is wrong with the source."""
    log.info("listing %s", data.source)
    with reached(data.source):
        listing = list_images(source, data, _list_in_tasks)
    for problem in listing.problems:
        log.warning("skipped %s", leave_out(problem, data))
    workflow.check_held_out(data, "images", len(listing.refs), data.validation_images)
    return listing


def _tokenizer(data: Pictures, refs: Sequence[Ref], work: str) -> "ImageTokenizer | PairTokenizer":
    """Load or fit the tokenizer, and leave it in `work` for the encoders."""
    folder = storage.join(work, TOKENIZER)
    if not storage.folder_complete(folder):
        fitted = _fit(data, refs) if data.tokenizer == "patch" else _load(data, data.tokenizer)
        if isinstance(data, PairDataConfig):
            workflow.save_tokenizer(PairTokenizer(_text(data, refs), fitted), folder)
        else:
            workflow.save_tokenizer(fitted, folder)
    image = _load(data, folder)
    return PairTokenizer(load_tokenizer(folder), image) if isinstance(data, PairDataConfig) else image


def _load(data: Pictures, spec: str, device: str = "cpu") -> "ImageTokenizer":
    """Load a tokenizer."""
    from pipeline.models.vq import load_image_tokenizer  # takes seconds, and text does without

    return load_image_tokenizer(spec, data.factor, data.encode_batch, device=device)


def _fit(data: Pictures, refs: Sequence[Ref]) -> "ImageTokenizer":
    """Fit a codebook on patches of training images, which are evenly spread."""
    from pipeline.models.vq import fit_patches

    log.info("fitting %d codes on up to %d images", data.codes, data.fit_images)
    images, _ = read_spread(_train(data, refs), data, data.fit_images)
    return fit_patches(images, data.codes, data.factor, seed=_FIT_SEED)


def _text(data: PairDataConfig, refs: Sequence[Ref]) -> Tokenizer:
    """Load the tokenizer of captions, or train it on captions of training images, which are evenly spread."""
    if data.fitted is None:
        return load_tokenizer(data.text_tokenizer)
    return train_bpe(data.fitted, read_spread(_train(data, refs), data, data.fit_images)[1].tolist())


def _train(data: Pictures, refs: Sequence[Ref]) -> list[Ref]:
    """List the training images."""
    out = held_out(np.arange(len(refs)), data.validation_images, len(refs))
    return [refs[i] for i in np.flatnonzero(~out).tolist()]


def _list_in_tasks(paths: Sequence[str], data: Pictures) -> list[list[Ref | Problem]]:
    """List the images of several files by tasks of the whole cluster, since tar files are read to their ends."""
    task: Any = ray.remote(num_cpus=1)(list_file)
    try:
        return ray.get([task.remote(path, data) for path in paths])
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None


def _encode_units(units: ray.data.Dataset, data: Pictures, images: int, work: str) -> ray.data.Dataset:
    """Read units on any free CPU, then encode them on a pool of actors with a GPU each.

    Without GPUs both ask for the same, so that Ray Data runs them in one process, without a copy in between.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
    actors = min(data.encoders, gpus) if gpus else data.encoders
    if actors < data.encoders:
        log.warning("data.encoders: %d, but the cluster has only %d GPUs", data.encoders, gpus)
    share = min(1.0, cpus / 2) if gpus else min(data.encode_threads, cpus / actors)
    return units.map(partial(workflow.map_row, function=partial(_read, data=data)), num_cpus=share).map(
        Encoder,  # type: ignore[arg-type]  # a class, whose actors are called
        fn_constructor_args=(data, images, work, "cuda" if gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=min(share, cpus / 2 / actors) if gpus else share,
        num_gpus=1 if gpus else 0,
    )


def _read(unit: tuple[int, Sequence[Ref]], data: Pictures) -> tuple[int, Pixels]:
    """Read the images of a unit."""
    with reached(data.source):
        return unit[0], read_pixels(unit[1], data)
