"""A thousand workers, simulated without torch: what each of them computes of a step, and asks of a store."""

import time

import numpy as np
import pytest

from pipeline.config.schema import DiffusionConfig
from pipeline.data.reading_order import MISSING, ReadingOrder
from pipeline.diffusion import partition

LENGTH = 128
SIZES = [1000] * 90
# Workers, batch, streams.
GROUPS = [(1, 512, 512), (16, 512, 512), (64, 512, 512), (512, 512, 512), (1000, 8192, 8192)]


@pytest.mark.parametrize(("workers", "batch", "streams"), GROUPS)
def test_workers_together_compute_the_step_of_one(workers: int, batch: int, streams: int) -> None:
    """Rows, times and groups are those of one worker, and a worker's share of the work is its share of the rows."""
    order = ReadingOrder(SIZES, batch, streams, 16, seed=1)
    whole = ReadingOrder(SIZES, batch, streams, 16, seed=1)
    shape, config = (batch, LENGTH), DiffusionConfig()
    step = whole.steps_per_epoch + 1  # of the second epoch
    rows = whole.rows_of_step(step)
    t, groups = partition.draw(config, seed=1, step=step, shape=shape, bos=False)
    order.rows_of_step(step, range(1))  # permutes the shards of the epoch
    seconds, served = [], 0
    for rank in range(workers):
        own, slots = order.streams_of(rank, workers), order.slots(rank, workers)
        slots = slots[slots != MISSING]
        windows, began = order._cached_window.cache_info().misses, time.perf_counter()
        mine = order.rows_of_step(step, own)
        drawn = partition.draw(config, seed=1, step=step, shape=shape, bos=False, rows=slots)
        seconds.append(time.perf_counter() - began)
        assert order._cached_window.cache_info().misses - windows <= len(
            own
        )  # a window of each of its streams
        np.testing.assert_array_equal(mine, rows[slots])
        np.testing.assert_array_equal(drawn.t, t[slots])
        np.testing.assert_array_equal(drawn.groups, groups[slots])
        served += len(slots)
    assert served == batch
    held = len(order.streams_of(0, workers)) * order.window * LENGTH * 2
    milliseconds = 1e3 * float(np.median(seconds))
    print(f"\n{workers:5} workers, batch {batch:5}: {milliseconds:7.2f} ms and {held:9,} bytes a worker")
