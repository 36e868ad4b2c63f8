"""The order in which training reads rows: deterministic, with random access, the same for any number of workers."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from jaxtyping import Int64

from pipeline.data.shards import ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.models.batch import Roles

MISSING = -1

# What a permutation is for; part of its seed, so that no two uses share random bits.
_SHARDS, _LEFTOVER, _WINDOW = range(3)


class ReadingOrder:
    """The rows of every global batch, and which of them a worker serves.

    An epoch permutes the shards, leaves out the rows that do not fill a last batch, and cuts the rest into C equal
    streams. A stream shuffles its rows in windows. A batch takes batch / C rows of every stream. Everything follows
    from the arguments and the step, so the position of training in the data is one integer.

    Args:
        rows_per_shard: rows of every shard file, in the manifest's order.
        batch: rows of a global batch.
        streams: C, a divisor of `batch`.
        window: rows of a stream that are shuffled together.
        seed: of the run.

    Raises:
        ConfigError: `streams` does not divide `batch`.
        DataError: fewer rows than one batch.
    """

    def __init__(self, rows_per_shard: list[int], batch: int, streams: int, window: int, seed: int) -> None:
        if batch % streams:
            raise ConfigError(f"data.streams: {streams} does not divide train.batch {batch}")
        self._sizes = np.asarray(rows_per_shard, dtype=np.int64)
        self.rows = int(self._sizes.sum())
        if self.rows < batch:
            raise DataError(
                f"train.batch: {batch} rows, but the data has {self.rows}; expected at most {self.rows}"
            )
        self.batch, self.streams, self.window, self.seed = batch, streams, window, seed
        self.steps_per_epoch = self.rows // batch
        self._share = batch // streams  # rows of one stream in one batch
        self._cached_layout = lru_cache(maxsize=1)(self._layout)
        self._cached_window = lru_cache(maxsize=2 * streams)(self._window)  # those of a batch or two

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a global batch.

        Args:
            step: number of the batch.
        """
        return step // self.steps_per_epoch

    def leftover(self, epoch: int) -> Int64[np.ndarray, "n"]:
        """Return the rows, fewer than a batch, that an epoch leaves out.

        Args:
            epoch: number of the epoch.
        """
        return self._cached_layout(epoch)[1]

    def rows_of_step(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Return the rows of a global batch.

        Args:
            step: number of the batch.

        Returns:
            Indices of the rows in the split; entry i comes from stream i // (batch // C).
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        first, last = within * self._share, (within + 1) * self._share
        parts = []
        for stream in range(self.streams):
            for window in range(first // self.window, (last - 1) // self.window + 1):
                start = window * self.window
                parts.append(self._cached_window(epoch, stream, window)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def slots(self, rank: int, workers: int) -> Int64[np.ndarray, "n"]:
        """Return the places in a global batch that a worker serves.

        Every worker serves neighbouring streams, the first ones one more where they do not divide evenly.

        Args:
            rank: of the worker.
            workers: number of workers.

        Returns:
            The places; the same number for every rank, filled up with -1.

        Raises:
            ConfigError: there are more workers than streams.
        """
        if workers > self.streams:
            raise ConfigError(f"cluster.workers: {workers} workers for data.streams {self.streams}")
        parts = np.array_split(np.arange(self.batch).reshape(self.streams, -1), workers)
        places = parts[rank].reshape(-1)
        return np.pad(places, (0, parts[0].size - places.size), constant_values=MISSING)

    def _layout(self, epoch: int) -> tuple[Int64[np.ndarray, "C n"], Int64[np.ndarray, "skipped"]]:
        """Return the rows of every stream before windows are shuffled, and the rows left out."""
        starts = np.cumsum(self._sizes) - self._sizes
        shards = permutation(len(self._sizes), self.seed, epoch, _SHARDS)
        rows = np.concatenate([np.arange(starts[s], starts[s] + self._sizes[s]) for s in shards])
        keep = np.ones(self.rows, dtype=bool)
        if skipped := self.rows % self.batch:
            keys = _bits(self.rows, self.seed, epoch, _LEFTOVER)
            keep[np.argpartition(keys, skipped)[:skipped]] = False
        return rows[keep].reshape(self.streams, -1), rows[~keep]

    def _window(self, epoch: int, stream: int, window: int) -> Int64[np.ndarray, "w"]:
        """Return one window of a stream, shuffled."""
        rows = self._cached_layout(epoch)[0][stream, window * self.window : (window + 1) * self.window]
        return rows[permutation(len(rows), self.seed, epoch, _WINDOW, stream, window)]


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass on one worker.

    Attributes:
        tokens: the rows; missing ones repeat a row that exists.
        index: place of each row in the global batch; -1 for missing ones, whose weight must be 0.
        labels: classes of the rows, where they have one.
        roles: given tokens and padding of the rows; None where rows have neither.
    """

    tokens: Int64[np.ndarray, "m L"]
    index: Int64[np.ndarray, "m"]
    labels: Int64[np.ndarray, "m"] | None = None
    roles: Roles | None = None


def batches(
    reader: ShardReader, order: ReadingOrder, start_step: int, rank: int, workers: int, micro_batch: int
) -> Generator[list[MicroBatch], None, None]:
    """Read what a worker trains on, step after step without end; the next step is read ahead in a thread.

    An error while reading ahead is raised when its step is requested. Closing the iterator ends the thread.

    Args:
        reader: of the split.
        order: the reading order.
        start_step: number of the first global batch.
        rank: of the worker.
        workers: number of workers.
        micro_batch: rows of a micro-batch at most.

    Returns:
        For every step the micro-batches; all ranks get the same number of them, of the same number of rows.
    """
    slots = order.slots(rank, workers)
    parts = -(-len(slots) // micro_batch)
    width = -(-len(slots) // parts)
    slots = np.pad(slots, (0, parts * width - len(slots)), constant_values=MISSING)
    served = slots >= 0

    def load(step: int) -> list[MicroBatch]:
        rows = order.rows_of_step(step)[np.where(served, slots, slots[0])]  # a worker has at least one stream
        tokens, labels, roles = reader.rows(rows).astype(np.int64), reader.labels(rows), reader.roles(rows)
        return [
            MicroBatch(
                tokens[part],
                slots[part],
                None if labels is None else labels[part],
                None if roles is None else roles.rows(part),
            )
            for part in np.split(np.arange(len(rows)), parts)
        ]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        ahead = pool.submit(load, start_step)
        for step in count(start_step):
            current = ahead.result()
            ahead = pool.submit(load, step + 1)
            yield current


def _bits(n: int, *key: int) -> np.ndarray:
    """Draw n random 64-bit words that belong to `key`: raw ones, which stay the same in all versions of numpy."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)


def permutation(n: int, *key: int) -> Int64[np.ndarray, "n"]:
    """Return the permutation of range(n) that belongs to a key.

    Args:
        n: number of items.
        key: integers that seed it.
    """
    return np.argsort(_bits(n, *key), kind="stable")
