"""Mixtures: every row of the plan has a source, in the right proportions, whatever the number of workers."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import MixedOrder, order_of
from pipeline.data.prepare import prepare as preparation
from pipeline.data.reading_order import batches
from pipeline.data.shards import ShardReader
from pipeline.errors import DataError
from tests.support.messy_text import prepare_here

SIZES = [[30, 20], [7], [64, 64, 5]]
WEIGHTS = [0.5, 0.2, 0.3]
BATCH = 12


def mixed(seed: int = 0, weights: list[float] = WEIGHTS) -> MixedOrder:
    return MixedOrder(SIZES, weights, BATCH, streams=4, window=16, seed=seed)


@pytest.mark.parametrize("weights", [WEIGHTS, [1, 1, 1], [0.001, 7, 2.5]])
def test_proportions_hold_after_any_number_of_steps(weights: list[float]) -> None:
    order, shares = mixed(weights=weights), np.array(weights) / sum(weights)
    counts = np.zeros(3)
    for step in range(1000):
        counts += np.bincount(order.sources_of_step(step), minlength=3)
        assert (abs(counts - shares * (step + 1) * BATCH) <= 1).all()
    assert counts.sum() == 1000 * BATCH
    assert (abs(order.read(10**9) - shares * 10**9 * BATCH) <= 8).all()  # the spacing of float64 there


def test_every_source_is_read_epoch_after_epoch() -> None:
    order, starts = mixed(), np.array([0, 50, 57])
    by_source: list[list[int]] = [[], [], []]
    for step in range(60):
        sources, rows = order.sources_of_step(step), order.rows_of_step(step)
        for source, row in zip(sources.tolist(), rows.tolist(), strict=True):
            by_source[source].append(row - int(starts[source]))
    for rows, size in zip(by_source, (50, 7, 133), strict=True):
        assert len(rows) > size
        for first in range(0, len(rows) - size + 1, size):
            assert sorted(rows[first : first + size]) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]


def test_the_plan_is_a_function_of_seed_and_step() -> None:
    first, again, other = mixed(), mixed(), mixed(seed=1)
    for step in (5, 0, 17):  # in any order, as a resumed run asks
        assert np.array_equal(first.rows_of_step(step), again.rows_of_step(step))
        assert not np.array_equal(first.rows_of_step(step), other.rows_of_step(step))
        assert not (np.diff(first.sources_of_step(step)) >= 0).all()  # no worker serves one source alone
    slots = np.concatenate([first.slots(rank, 3) for rank in range(3)])
    assert sorted(slots[slots >= 0]) == list(range(BATCH))


def test_workers_read_the_plan_from_the_folders_of_the_sources(tmp_path: Path) -> None:
    """The manifest names shards beside it; any number of workers reads the same rows, from any step on."""
    names = ("a", "b")
    for name in names:
        (tmp_path / f"{name}.txt").mkdir()
        for index in range(40):
            (tmp_path / f"{name}.txt" / f"{index:02d}.txt").write_text(f"{name}{index:02d}" * 3)
    data = TextDataConfig(
        mix=[
            {"source": str(tmp_path / f"{name}.txt"), "weight": weight}
            for name, weight in (("a", 3), ("b", 1))
        ],
        length=12,
        wrap="sentence",
        validation_documents=8,
        shard_rows=16,
    )
    paths = [preparation.data_path(part, str(tmp_path)) for part in data.parts]
    for part, folder in zip(data.parts, paths, strict=True):
        prepare_here(part, Path(folder)).publish(folder)
    path = preparation.data_path(data, str(tmp_path))
    manifest = preparation.ensure(data, path)  # of sources that other runs have prepared
    assert preparation.ensure(data, path) == Manifest.read(path) == manifest
    assert [*Path(path).glob("*.parquet")] == []
    assert manifest.rows("train") == 64
    assert manifest.rows("validation") == 16
    reader = ShardReader(path, manifest, "train")
    order = order_of(manifest, 8, data, seed=3)
    assert isinstance(order, MixedOrder)

    def read(start: int, stop: int, workers: int) -> list[list[list[int]]]:
        found = []
        streams = [batches(reader, order, start, rank, workers, micro_batch=2) for rank in range(workers)]
        for _ in range(start, stop):
            rows: dict[int, list[int]] = {}
            for stream in streams:
                for micro in next(stream):
                    pairs = zip(micro.index.tolist(), micro.tokens.tolist(), strict=True)
                    rows |= {index: row for index, row in pairs if index >= 0}
            found.append([rows[index] for index in range(8)])
        for stream in streams:
            stream.close()
        return found

    whole = read(0, 12, workers=1)
    assert read(7, 12, workers=3) == whole[7:]
    counts = [sum(row[1] == ord(name) for step in whole for row in step) for name in names]
    assert counts == [72, 24]
    files = Manifest.read(paths[1]).splits["train"].files
    Path(paths[1], "manifest.json").write_text(
        Path(paths[1], "manifest.json").read_text().replace(files[0].sha256, "0" * 64)
    )
    with pytest.raises(DataError, match=r"data\.mix: the sources are not what they were when"):
        preparation.ensure(data, path)


def test_mixtures_that_cannot_be_made() -> None:
    a, b = {"source": "a"}, {"source": "b"}
    for keys, says in (
        ({"mix": [a, b, a]}, "mix: source 'a' twice; expected every source once, with its whole weight"),
        ({"mix": []}, "expected at least one source, or null"),
        ({"mix": [a, b], "tokenizer": "bpe:300"}, "is trained on one source, and a mix has several"),
        ({"mix": [a, b], "validation_documents": "all"}, "leaves nothing to train on"),
        ({"mix": [a, {"source": "b", "weight": 0}]}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=says):
            TextDataConfig.model_validate(keys)
