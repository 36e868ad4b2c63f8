"""The order in which training reads rows: deterministic, with random access, the same for any number of workers."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from pipeline.data.shards import Rows, ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.models.batch import Roles

MISSING = -1

# What a permutation is for; part of its seed, so that no two uses share random bits.
_SHARDS, _LEFTOVER, _WINDOW = range(3)
_CHUNK = 1 << 20  # random words that are drawn together


class ReadingOrder:
    """The rows of every global batch, and which of them a worker serves.

    An epoch permutes the shards, leaves out the rows that do not fill a last batch, and cuts the rest into C equal
    streams. A stream shuffles its rows in windows. A batch takes batch / C rows of every stream. Everything follows
    from the arguments and the step, so the position of training in the data is one integer. Time and memory of a
    worker depend on the streams that it serves, not on their number or that of the rows.

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
        self._cached_window = lru_cache(maxsize=2 * streams)(self.window_rows)  # those of a batch or two

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
        layout = self._cached_layout(epoch)
        return layout.rows_at(layout.skipped)

    def rows_of_step(self, step: int, streams: range | None = None) -> Int64[np.ndarray, "n"]:
        """Return the rows of a global batch.

        Args:
            step: number of the batch.
            streams: whose rows are returned; None: all streams.

        Returns:
            Indices of the rows in the split, batch / C of every stream.
        """
        epoch, pieces = self.epoch_of(step), self.pieces(step)
        return np.concatenate(
            [
                self._cached_window(epoch, stream, window)[piece]
                for stream in (range(self.streams) if streams is None else streams)
                for window, piece in pieces
            ]
        )

    def feed(self, reader: ShardReader, streams: range) -> Callable[[int], Rows]:
        """Return a function that reads the rows of a global batch that some streams hold.

        Args:
            reader: of the split.
            streams: that a worker serves.
        """
        return _Windows(reader, self, streams).rows

    def pieces(self, step: int) -> list[tuple[int, slice]]:
        """Return what a global batch takes of every stream: windows, and the part of each.

        Args:
            step: number of the batch.
        """
        first = step % self.steps_per_epoch * self._share
        last = first + self._share
        windows = range(first // self.window, (last - 1) // self.window + 1)
        return [(w, slice(max(first - w * self.window, 0), last - w * self.window)) for w in windows]

    def window_rows(self, epoch: int, stream: int, window: int) -> Int64[np.ndarray, "w"]:
        """Return the rows of one window of a stream, shuffled.

        Args:
            epoch: number of the epoch.
            stream: number of the stream.
            window: number of the window in the stream.
        """
        length = self.steps_per_epoch * self._share
        inside = np.arange(window * self.window, min((window + 1) * self.window, length))
        rows = self._cached_layout(epoch).rows_of(stream * length + inside)
        return rows[permutation(len(rows), self.seed, epoch, _WINDOW, stream, window)]

    def streams_of(self, rank: int, workers: int) -> range:
        """Return the streams that a worker serves: neighbours, the first workers one more where C is no multiple.

        Args:
            rank: of the worker.
            workers: number of workers.

        Raises:
            ConfigError: there are more workers than streams.
        """
        if workers > self.streams:
            raise ConfigError(f"cluster.workers: {workers} workers for data.streams {self.streams}")
        each, more = divmod(self.streams, workers)
        first = rank * each + min(rank, more)
        return range(first, first + each + (rank < more))

    def slots(self, rank: int, workers: int) -> Int64[np.ndarray, "n"]:
        """Return the places in a global batch that a worker serves, those of its streams.

        Args:
            rank: of the worker.
            workers: number of workers.

        Returns:
            The places, ascending; the same number for every rank, filled up with -1.

        Raises:
            ConfigError: there are more workers than streams.
        """
        own = self.streams_of(rank, workers)
        places = np.arange(own.start * self._share, own.stop * self._share)
        missing = -(-self.streams // workers) * self._share - len(places)
        return np.pad(places, (0, missing), constant_values=MISSING)

    def _layout(self, epoch: int) -> "_Layout":
        """Permute the shards of an epoch, and choose the rows that it leaves out."""
        shards = permutation(len(self._sizes), self.seed, epoch, _SHARDS)
        ends = np.cumsum(self._sizes[shards])
        starts = np.cumsum(self._sizes) - self._sizes  # in the split
        shift = starts[shards] - (ends - self._sizes[shards])
        skipped = _smallest(self.rows, self.rows % self.batch, self.seed, epoch, _LEFTOVER)
        return _Layout(ends, shift, skipped)


class _Layout(NamedTuple):
    """An epoch's rows in the order of its permuted shards, before windows are shuffled.

    Attributes:
        ends: place behind every shard's last row, in that order.
        shift: index of a row in the split minus its place, for every shard.
        skipped: places that are left out, ascending.
    """

    ends: Int64[np.ndarray, "shards"]
    shift: Int64[np.ndarray, "shards"]
    skipped: Int64[np.ndarray, "n"]

    def rows_at(self, places: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Return the rows at places of the permuted shards."""
        return places + self.shift[np.searchsorted(self.ends, places, side="right")]

    def rows_of(self, index: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Return rows by their index among those that are not left out."""
        kept_before = self.skipped - np.arange(len(self.skipped))
        return self.rows_at(index + np.searchsorted(kept_before, index, side="right"))


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

    @classmethod
    def of(cls, rows: Rows, index: Int64[np.ndarray, "m"]) -> "MicroBatch":
        """Make a micro-batch of rows of a shard.

        Args:
            rows: with their labels and roles, where they have any.
            index: place of each row in the global batch.
        """
        return cls(rows.tokens.astype(np.int64), index, rows.labels, rows.roles)

    def take(self, chosen: Int64[np.ndarray, "n"], index: Int64[np.ndarray, "n"]) -> "MicroBatch":
        """Select rows.

        Args:
            chosen: which ones.
            index: their places in the global batch, or -1.
        """
        rows = Rows(self.tokens, self.labels, self.roles).take(chosen)
        return MicroBatch(rows.tokens, index, rows.labels, rows.roles)

    def by_tokens(self, most: int, agree: Callable[[int], int]) -> list["MicroBatch"]:
        """Cut the rows of a worker, in order, into micro-batches of at most `most` tokens, as even as possible.

        Args:
            most: largest number of tokens, at least those of the longest row.
            agree: from the number of micro-batches that a worker needs to the number that all workers run.

        Returns:
            As many as agreed on, none of them without rows: where a worker has fewer rows than that, the others hold
            the shortest one, missing.
        """
        assert self.roles is not None
        there = np.flatnonzero(self.index >= 0)
        lengths = self.roles.lengths[there]
        parts = agree(len(_cut(lengths, most)))
        least = max(int(lengths.max()), -(-int(lengths.sum()) // parts))
        even = bisect_left(range(most), True, lo=least, key=lambda size: len(_cut(lengths, size)) <= parts)
        cut = [there[piece] for piece in _cut(lengths, even)]
        while len(cut) < parts and max(map(len, cut)) > 1:
            longest = max(range(len(cut)), key=lambda number: len(cut[number]))
            cut[longest : longest + 1] = np.array_split(cut[longest], 2)
        missing = self.take(there[[lengths.argmin()]], np.array([MISSING]))
        return [self.take(rows, self.index[rows]) for rows in cut] + [missing] * (parts - len(cut))

    def present(self, skipped: Collection[int]) -> Bool[np.ndarray, "m"]:
        """Return which rows count.

        Args:
            skipped: places in the global batch that do not.
        """
        return (self.index >= 0) & ~np.isin(self.index, list(skipped))


class _Windows:
    """The rows of the streams that a worker serves, of each stream the window that is being read.

    A window is loaded once, so that the shards of many streams need not be kept decoded.

    Args:
        reader: of the split.
        order: the reading order.
        streams: that the worker serves.
    """

    def __init__(self, reader: ShardReader, order: ReadingOrder, streams: range) -> None:
        self._reader, self._order, self._streams = reader, order, streams
        self._held: dict[int, tuple[tuple[int, int], Rows]] = {}

    def rows(self, step: int) -> Rows:
        """Return the rows of a global batch that the streams hold, stream by stream."""
        epoch, pieces = self._order.epoch_of(step), self._order.pieces(step)
        parts = [
            self._window(epoch, stream, window).take(piece)
            for stream in self._streams
            for window, piece in pieces
        ]
        return Rows.concatenate(parts)

    def _window(self, epoch: int, stream: int, window: int) -> Rows:
        """Return a window, loaded in place of the stream's last one if that was another."""
        held = self._held.get(stream)
        if held is None or held[0] != (epoch, window):
            self._held.pop(stream, None)  # makes room first
            rows = self._reader.read(self._order.window_rows(epoch, stream, window))
            held = self._held[stream] = ((epoch, window), rows)
        return held[1]


def batches(
    reader: ShardReader,
    order: ReadingOrder,
    start_step: int,
    rank: int,
    workers: int,
    micro_batch: int,
    prepare: Callable[[int, list[MicroBatch]], Any] = lambda _, micros: micros,
) -> Generator[Any, None, None]:
    """Read what a worker trains on, step after step without end; the next step is read ahead in a thread.

    An error while reading ahead is raised when its step is requested. Closing the iterator ends the thread.

    Args:
        reader: of the split.
        order: the reading order.
        start_step: number of the first global batch.
        rank: of the worker.
        workers: number of workers.
        micro_batch: rows of a micro-batch at most.
        prepare: called in the thread with a step and its micro-batches; all ranks get the same number of them, of
            the same number of rows.

    Returns:
        What `prepare` returns, for every step; by default the micro-batches.
    """
    slots = order.slots(rank, workers)
    parts = -(-len(slots) // micro_batch)
    width = -(-len(slots) // parts)
    slots = np.pad(slots, (0, parts * width - len(slots)), constant_values=MISSING)
    index = np.split(slots, parts)
    # A missing row repeats the first one: a worker has at least one stream.
    chosen = np.split(np.where(slots >= 0, slots - slots[0], 0), parts)
    read = order.feed(reader, order.streams_of(rank, workers))

    def load(step: int) -> Any:
        rows = read(step)
        return prepare(step, [MicroBatch.of(rows.take(c), i) for c, i in zip(chosen, index, strict=True)])

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        ahead = pool.submit(load, start_step)
        for step in count(start_step):
            current = ahead.result()
            ahead = pool.submit(load, step + 1)
            yield current


def _cut(lengths: Int64[np.ndarray, "n"], most: int) -> list[slice]:
    """Cut rows, in order, into as few pieces as hold at most `most` tokens each."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    cut = [0]
    while cut[-1] < len(lengths):
        cut.append(int(np.searchsorted(ends, ends[cut[-1]] + most, side="right")) - 1)
    return [slice(*pair) for pair in pairwise(cut)]


def _bits(n: int, *key: int) -> np.ndarray:
    """Draw n random 64-bit words that belong to `key`: raw ones, which stay the same in all versions of numpy."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)


def _smallest(n: int, k: int, *key: int) -> Int64[np.ndarray, "k"]:
    """Return the places of the k smallest of n random words, ascending, without holding them all."""
    bits = np.random.PCG64(np.random.SeedSequence(key))
    words, places = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for start in range(0, n if k else 0, _CHUNK):
        stop = min(start + _CHUNK, n)
        words = np.concatenate([words, bits.random_raw(stop - start)])
        places = np.concatenate([places, np.arange(start, stop)])
        if k < len(words):
            least = np.argpartition(words, k)[:k]
            words, places = words[least], places[least]
    return np.sort(places)


def permutation(n: int, *key: int) -> Int64[np.ndarray, "n"]:
    """Return the permutation of range(n) that belongs to a key.

    Args:
        n: number of items.
        key: integers that seed it.
    """
    return np.argsort(_bits(n, *key), kind="stable")
