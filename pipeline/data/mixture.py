"""Mixtures of sources: which source every row of a global batch comes from, and the manifest of their shards."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.data.manifest import Manifest, MixedPart, Skipped, SourceInfo, Split, hash_content
from pipeline.data.reading_order import ReadingOrder, permutation
from pipeline.data.shards import Rows, ShardReader
from pipeline.errors import DataError
from pipeline.seeds import mix_seed

_PLACES = 3  # what a permutation is for, beside those of the reading order


class MixedOrder(ReadingOrder):
    """The reading order of several sources, each with a share of the rows.

    After any number of steps, the number of rows read of a source differs from its share of all rows by at most one.
    Every source is read in an order of its own, epoch after epoch, and the rows of a batch stand in random order.
    Everything follows from the arguments and the step.

    Args:
        rows_per_shard: by source, the rows of every shard file.
        weights: of the sources.
        batch: rows of a global batch.
        streams: C, a divisor of `batch`.
        window: rows that a source shuffles together.
        seed: of the run.

    Raises:
        ConfigError: `streams` does not divide `batch`.
        DataError: fewer rows than one batch.
    """

    def __init__(
        self,
        rows_per_shard: Sequence[list[int]],
        weights: Sequence[float],
        batch: int,
        streams: int,
        window: int,
        seed: int,
    ) -> None:
        super().__init__([rows for sizes in rows_per_shard for rows in sizes], batch, streams, window, seed)
        self._sources = [
            ReadingOrder(sizes, 1, 1, window, mix_seed(seed, number))
            for number, sizes in enumerate(rows_per_shard)
        ]
        self._offsets = np.cumsum([0, *map(sum, rows_per_shard)])[:-1]
        self._ends = np.cumsum(weights) / np.sum(weights)

    def read(self, steps: int) -> Int64[np.ndarray, "sources"]:
        """Count the rows of every source that the first steps read.

        Args:
            steps: number of steps.
        """
        ends = np.floor(self._ends * (steps * self.batch) + 0.5).astype(np.int64)
        ends[-1] = steps * self.batch
        return np.diff(ends, prepend=0)

    def sources_of_step(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Return the source of every row of a global batch.

        Args:
            step: number of the batch.
        """
        counts = self.read(step + 1) - self.read(step)
        sources = np.repeat(np.arange(len(counts)), counts)
        return sources[permutation(self.batch, self.seed, step, _PLACES)]

    def rows_of_step(self, step: int, streams: range | None = None) -> Int64[np.ndarray, "n"]:
        """Return the rows of a global batch; see `ReadingOrder.rows_of_step`."""
        sources, before = self.sources_of_step(step), self.read(step)
        share = self.batch // self.streams
        served = range(self.batch) if streams is None else range(streams.start * share, streams.stop * share)
        rows = np.empty(len(served), np.int64)
        for number, (order, offset) in enumerate(zip(self._sources, self._offsets, strict=True)):
            places = np.flatnonzero(sources == number)
            first, last = np.searchsorted(places, [served.start, served.stop])
            rows[places[first:last] - served.start] = offset + np.array(
                [order.rows_of_step(int(before[number]) + index)[0] for index in range(first, last)], np.int64
            )
        return rows

    def feed(self, reader: ShardReader, streams: range) -> Callable[[int], Rows]:
        """Return a function that reads rows; see `ReadingOrder.feed`. All workers read the same few windows."""
        return lambda step: reader.read(self.rows_of_step(step, streams))


def order_of(manifest: Manifest, batch: int, data: AnyDataConfig, seed: int) -> ReadingOrder:
    """Make the reading order of training.

    Args:
        manifest: of the data.
        batch: rows of a global batch.
        data: the data section of the config.
        seed: of the run.
    """
    sizes = manifest.rows_per_shard("train")
    if manifest.mix is None:
        return ReadingOrder(sizes, batch, data.streams, data.shuffle_window, seed)
    ends = np.cumsum([part.shards for part in manifest.mix])[:-1]
    parts = [part.tolist() for part in np.split(np.array(sizes), ends)]
    weights = [part.weight for part in manifest.mix]
    return MixedOrder(parts, weights, batch, data.streams, data.shuffle_window, seed)


def manifest_of(
    data: TextDataConfig, content: dict[str, Any], folders: Sequence[str], parts: Sequence[Manifest]
) -> Manifest:
    """Make the manifest of a mixture, which lies beside the folders of its sources.

    Args:
        data: the data section of the config.
        content: every setting that determined what the shards hold.
        folders: of the sources.
        parts: their manifests.

    Raises:
        DataError: a source has no training rows.
    """
    assert data.mix is not None
    for part in parts:
        if not part.rows("train"):
            raise DataError(f"data.mix: {part.source.name!r} has no rows to train on")
    by_part = [part.beside(folder) for part, folder in zip(parts, folders, strict=True)]
    splits = {name: _joined([splits[name] for splits in by_part]) for name in ("train", "validation")}
    skipped = [name for part in parts for name in part.skipped.names]
    sums = {
        key: sum(getattr(part, key) for part in parts)
        for key in ("documents", "documents_empty", "tokens", "rows_cut", "rows_full")
    }
    return parts[0].model_copy(
        update={
            "splits": splits,
            "source": SourceInfo(
                name="mix",
                revision=None,
                fingerprint=hash_content({"parts": [part.source.fingerprint for part in parts]}),
            ),
            "content": content,
            "content_key": hash_content(content),
            "skipped": Skipped(count=sum(part.skipped.count for part in parts), names=tuple(skipped)),
            "mix": tuple(
                MixedPart(name=mixed.source, weight=mixed.weight, shards=len(part.split("train").files))
                for mixed, part in zip(data.mix, parts, strict=True)
            ),
            **sums,
        }
    )


def _joined(splits: Sequence[Split]) -> Split:
    """Return the shards of several splits as those of one."""
    sizes = [split.bytes for split in splits]
    return Split(
        files=tuple(file for split in splits for file in split.files),
        documents=sum(split.documents for split in splits),
        tokens=sum(split.tokens for split in splits),
        tokens_dropped=sum(split.tokens_dropped for split in splits),
        bytes=None if None in sizes else sum(size or 0 for size in sizes),
    )
