"""The reading order: the same rows for any number of workers, every row once an epoch, from any step."""

import hashlib
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import reading_order
from pipeline.data.manifest import ShardFile
from pipeline.data.reading_order import MISSING, MicroBatch, ReadingOrder, batches
from pipeline.data.shards import ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.models.batch import Roles
from tests.support.data_helpers import SIZES, L, make_shards

PROMISED = [49, 52, 48, 71, 73, 68, 136, 137]
# Rows of a shard, shards, batch, streams, window, seed -> start of the SHA-256 of the rows of some steps, and of the
# rows that two epochs leave out, as read before a worker computed the rows of its own streams alone.
RECORDED = {
    (8192, 40, 1234, 512, 64, 4096, 0): ("33b86ec3b3a45914", "83cb66b9d272255a"),
    (1000, 9, 7, 512, 64, 100, 5): ("21f6f6a7814e7ce6", "946b342b466b03ab"),
    (40, 4, 17, 24, 8, 6, 0): ("66dddabafa8806f2", "6f4e49691fba2a0d"),
    (300, 6, 300, 64, 64, 64, 3): ("e6ffe355be31cfc5", "f5d7732bc5a1ef5c"),
}


def make_order(seed: int = 0, window: int = 6) -> ReadingOrder:
    return ReadingOrder(SIZES, batch=24, streams=8, window=window, seed=seed)


def make_reader(path: Path) -> ShardReader:
    return ShardReader(str(path), make_shards(path, SIZES), "train")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    share=st.integers(1, 5),
    streams=st.integers(1, 8),
    window=st.integers(1, 70),
    epoch=st.integers(0, 3),
)
def test_every_row_once_an_epoch(sizes: list[int], share: int, streams: int, window: int, epoch: int) -> None:
    batch = share * streams
    if sum(sizes) < batch:
        return
    order = ReadingOrder(sizes, batch, streams, window, seed=3)
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    assert {order.epoch_of(step) for step in steps} == {epoch}
    read = np.concatenate([order.rows_of_step(step) for step in steps])
    assert len(order.leftover(epoch)) == sum(sizes) % batch
    np.testing.assert_array_equal(
        np.sort(np.concatenate([read, order.leftover(epoch)])), np.arange(sum(sizes))
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_workers_share_the_same_global_batches(workers: int) -> None:
    order = make_order()
    slots = [order.slots(rank, workers) for rank in range(workers)]
    assert len({len(s) for s in slots}) == 1
    served = np.concatenate(slots)
    np.testing.assert_array_equal(np.sort(served[served != MISSING]), np.arange(24))
    assert (served == MISSING).any() == (8 % workers != 0)
    share = 24 // 8
    for s in slots:
        streams = np.unique(s[s != MISSING] // share)
        assert len(streams) in (8 // workers, -(-8 // workers))
        assert np.ptp(streams) == len(streams) - 1
    with pytest.raises(ConfigError, match="9 workers"):
        order.slots(0, 9)


def test_a_stream_is_a_contiguous_cut_shuffled_in_windows() -> None:
    """What a stream reads does not leave its window, and its windows follow one another."""
    order = make_order(window=6)
    cut = order._layout(0).rows_of(np.arange(168)).reshape(8, 21)
    reads = np.stack([order.rows_of_step(step).reshape(8, 3) for step in range(7)], axis=1).reshape(8, 21)
    for stream in range(8):
        for start in range(0, 21, 6):
            window = slice(start, start + 6)
            np.testing.assert_array_equal(np.sort(reads[stream, window]), np.sort(cut[stream, window]))
    assert (reads != cut).mean() > 0.5


def test_random_access_equals_iteration() -> None:
    order = make_order()
    straight = [order.rows_of_step(step) for step in range(21)]
    jumpy = make_order()
    for step in [20, 3, 0, 13, 6, 7, 20]:
        np.testing.assert_array_equal(jumpy.rows_of_step(step), straight[step])
        np.testing.assert_array_equal(make_order().rows_of_step(step), straight[step])


def test_epochs_and_seeds_differ() -> None:
    order = make_order()
    firsts = [order.rows_of_step(epoch * 7) for epoch in range(4)] + [make_order(seed=1).rows_of_step(0)]
    for i, one in enumerate(firsts):
        for two in firsts[i + 1 :]:
            assert (one != two).mean() > 0.5
    skipped = [tuple(order.leftover(epoch)) for epoch in range(4)]
    assert len(set(skipped)) == 4


def test_the_order_never_changes() -> None:
    """Runs resume under other versions of this code and of numpy: these rows are a promise."""
    rows = make_order().rows_of_step(100)
    assert rows[:8].tolist() == PROMISED


@pytest.mark.parametrize("settings", RECORDED, ids=str)
def test_rows_are_those_of_earlier_versions(settings: tuple[int, ...]) -> None:
    """Bit by bit, for runs of 64 streams and others that have begun."""
    size, count, last, batch, streams, window, seed = settings
    order = ReadingOrder([size] * count + [last], batch, streams, window, seed)
    epoch = order.steps_per_epoch
    rows = [order.rows_of_step(step) for step in (0, 1, epoch - 1, epoch, 2 * epoch + epoch // 2)]
    left_out = [order.leftover(0), order.leftover(3)]
    digests = (hashlib.sha256(np.concatenate(part).tobytes()).hexdigest()[:16] for part in (rows, left_out))
    assert tuple(digests) == RECORDED[settings]


def test_a_large_epoch_is_cheap() -> None:
    order = ReadingOrder([8192] * 250, batch=512, streams=64, window=4096, seed=0)
    assert len(np.unique(order.rows_of_step(12_345))) == 512
    assert sum(part.nbytes for part in order._layout(0)) <= 8 * (2 * 250 + 512)


def test_rows_left_out_are_chosen_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reading_order._smallest(1000, 30, 1, 2)
    monkeypatch.setattr(reading_order, "_CHUNK", 64)
    np.testing.assert_array_equal(reading_order._smallest(1000, 30, 1, 2), whole)
    np.testing.assert_array_equal(reading_order._smallest(20, 19, 1, 2)[[0, -1]], [0, 19])


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"train.batch: 24 rows, but the data has 23"):
        ReadingOrder([23], 24, 8, 4, 0)
    with pytest.raises(ConfigError, match="does not divide"):
        ReadingOrder(SIZES, 25, 8, 4, 0)


@pytest.mark.parametrize(("workers", "micro"), [(1, 7), (2, 4), (3, 4), (8, 2)])
def test_batches(workers: int, micro: int, tmp_path: Path) -> None:
    reader, order = make_reader(tmp_path), make_order()
    streams = [batches(reader, order, 5, rank, workers, micro) for rank in range(workers)]
    for step in range(5, 9):
        parts = [next(stream) for stream in streams]
        assert len({len(part) for part in parts}) == 1
        shapes = {mb.tokens.shape for part in parts for mb in part}
        assert len(shapes) == 1
        assert next(iter(shapes))[0] <= micro
        tokens = np.concatenate([mb.tokens for part in parts for mb in part])
        index = np.concatenate([mb.index for part in parts for mb in part])
        there = index != MISSING
        np.testing.assert_array_equal(np.sort(index[there]), np.arange(24))
        rows = order.rows_of_step(step)
        np.testing.assert_array_equal(tokens[there], rows[index[there]][:, None] + np.arange(L))
        assert set(tokens[~there][:, 0]) <= set(rows)
        assert tokens.dtype == index.dtype == np.int64
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=30), min_size=1, max_size=4),
    most=st.integers(20, 200),
    missing=st.booleans(),
)
def test_micro_batches_by_tokens(lengths: list[list[int]], most: int, missing: bool) -> None:
    """Every list is the rows of a worker."""
    workers = []
    for own in lengths:
        index, sizes = np.arange(len(own)), np.array(own)
        if missing:
            index, sizes = np.append(index, MISSING), np.append(sizes, own[0])
        tokens = np.repeat(index, 20).reshape(-1, 20)
        workers.append(MicroBatch(tokens, index, roles=Roles(np.zeros_like(sizes), sizes)))
    counts: list[int] = []
    for worker in workers:
        worker.by_tokens(most, lambda own: counts.append(own) or own)  # type: ignore[func-returns-value]
    cut = [worker.by_tokens(most, lambda own: max(counts)) for worker in workers]
    assert {len(parts) for parts in cut} == {max(counts)}
    for own, parts, count in zip(lengths, cut, counts, strict=True):
        assert count >= sum(own) / most
        rows = np.concatenate([part.index for part in parts])
        np.testing.assert_array_equal(rows[rows >= 0], np.arange(len(own)))  # each once, in order
        for part in parts:
            assert part.roles is not None
            assert 0 < part.roles.lengths.sum() <= most
            there = part.index >= 0
            assert there.all() or len(part.index) == 1
            np.testing.assert_array_equal(part.roles.lengths[there], np.array(own)[part.index[there]])
            np.testing.assert_array_equal(part.tokens[there, 0], part.index[there])
        assert rows.min() >= 0 or len(own) < max(counts)  # rows are missing only where there are too few


def test_micro_batches_by_tokens_are_even() -> None:
    lengths = np.full(10, 10)
    rows = MicroBatch(np.zeros((10, 10), np.int64), np.arange(10), roles=Roles(lengths * 0, lengths))
    assert [len(part.index) for part in rows.by_tokens(90, lambda own: own)] == [5, 5]
    assert [len(part.index) for part in rows.by_tokens(90, lambda own: 3)] == [4, 4, 2]
    assert [len(part.index) for part in rows.by_tokens(90, lambda own: 7)] == [1, 1, 1, 1, 2, 2, 2]


def test_a_shard_is_decoded_at_most_once_a_step_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker serves 64 streams, and no decoded shard is kept; windows of 4,096 rows are ten times as long."""
    sizes, loads = [1000] * 33, []
    reader = ShardReader(str(tmp_path), make_shards(tmp_path, sizes), "train", cache_bytes=1)
    order = ReadingOrder(sizes, batch=64, streams=64, window=400, seed=0)
    load = reader._load

    def counted(file: ShardFile, verify: bool) -> pa.Table:
        loads.append(file.name)
        return load(file, verify)

    monkeypatch.setattr(reader, "_load", counted)
    steps = order.steps_per_epoch - 1  # the next epoch is not begun
    feed = batches(reader, order, 0, 0, 1, 64)
    for step in range(steps):
        tokens = np.concatenate([micro.tokens for micro in next(feed)])
        if step % 50 == 0:
            np.testing.assert_array_equal(tokens[:, 0], order.rows_of_step(step))
    feed.close()
    assert 33 <= len(loads) <= steps


def test_labels_go_with_their_rows(tmp_path: Path) -> None:
    """Also in missing rows, which repeat one that exists."""
    reader = ShardReader(str(tmp_path), make_shards(tmp_path, SIZES, classes=7), "train")
    stream = batches(reader, make_order(), 0, 2, 3, 4)  # 8 streams for 3 workers: the last one has fewer
    parts = next(stream)
    stream.close()
    assert any((part.index == MISSING).any() for part in parts)
    for part in parts:
        assert part.labels is not None
        np.testing.assert_array_equal(part.labels, part.tokens[:, 0] % 7)
        assert part.labels.dtype == np.int64
    unlabelled = batches(make_reader(tmp_path / "x"), make_order(), 0, 0, 1, 24)
    assert next(unlabelled)[0].labels is None
    unlabelled.close()


def test_an_error_while_reading_ahead_reaches_the_consumer(tmp_path: Path) -> None:
    manifest, order = make_shards(tmp_path, SIZES), make_order()
    reader = ShardReader(str(tmp_path), manifest, "train")
    good = len(list(islice(batches(reader, order, 0, 0, 8, 3), 2)))
    assert good == 2
    (tmp_path / "train-00002.parquet").unlink()
    fresh = ShardReader(str(tmp_path), manifest, "train")
    with pytest.raises(DataError, match=r"train-00002.parquet: shard is missing"):
        list(islice(batches(fresh, order, 0, 0, 1, 24), 7))
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
