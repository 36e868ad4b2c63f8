"""Weights and moments that one group of workers saved, read by a group of another size."""

from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.training import slices
from pipeline.training.slices import Index, Slices

SIZES = {f"block.{i}.weight": 997 + 131 * i for i in range(40)}
TOTAL = sum(SIZES.values())
KINDS = ("weight:", "exp_avg:")


def flat(workers: int, rank: int) -> list[tuple[str, int, int]]:
    """Name, offset and number of values of a rank's part of all weights in a row, as ZeRO stages 1 and 2 cut them."""
    share = -(-TOTAL // workers)
    parts, begin = [], 0
    for name, size in SIZES.items():
        start, stop = max(begin, rank * share), min(begin + size, (rank + 1) * share)
        if start < stop:
            parts.append((name, start - begin, stop - start))
        begin += size
    return parts


def of_every(workers: int, rank: int) -> list[tuple[str, int, int]]:
    """A share of every weight, as ZeRO stage 3 cuts them."""
    shares = {name: -(-size // workers) for name, size in SIZES.items()}
    parts = [(name, rank * share, min(share, SIZES[name] - rank * share)) for name, share in shares.items()]
    return [part for part in parts if part[2] > 0]


CUTS = {"flat": flat, "of every weight": of_every}


def values(name: str, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) * 1000 + SIZES[name])
    return torch.randn(SIZES[name], generator=generator)


def write(folder: Path, cut: str, workers: int) -> Index:
    for rank in range(workers):
        parts = CUTS[cut](workers, rank)
        kinds = {kind: {(n, o): values(n, kind)[o : o + c] for n, o, c in parts} for kind in KINDS}
        slices.save(folder / f"optimizer_{rank:05d}.safetensors", kinds, {"updates": "7"})
    return slices.index_of([CUTS[cut](workers, rank) for rank in range(workers)])


def empty(parts: list[tuple[str, int, int]]) -> Slices:
    return {(name, offset): torch.full((count,), torch.nan) for name, offset, count in parts}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3), (64, 16), (3, 50), (8, 8)])
@pytest.mark.parametrize("cut", CUTS)
def test_a_rank_reads_its_share_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, before: int, after: int
) -> None:
    index = write(tmp_path, cut, before)
    read: list[int] = []
    ranges_of = storage.read_ranges

    def counted(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        read.extend(stop - start for start, stop in ranges if start > 0)  # not the headers
        return ranges_of(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    for rank in range(after):
        parts = CUTS[cut](after, rank)
        own = {kind: empty(parts) for kind in KINDS}
        read.clear()
        assert slices.read(str(tmp_path), "optimizer", index, own)["updates"] == "7"
        for kind, of_kind in own.items():
            for (name, offset), got in of_kind.items():
                assert torch.equal(got, values(name, kind)[offset : offset + got.numel()])
        assert sum(read) == 4 * len(KINDS) * sum(count for _, _, count in parts)
        assert slices.writer(index, own[KINDS[0]]) == (rank if before == after else None)
    whole = slices.read_whole(tmp_path, "optimizer", "weight:")
    assert all(torch.equal(whole[name], values(name, "weight:")) for name in SIZES)


def test_a_whole_file_is_read_in_two_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in a file are one range, whatever number of weights they are."""
    index, calls = write(tmp_path, "of every weight", 4), []
    ranges_of = storage.read_ranges

    def counted(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        calls.append(len(ranges))
        return ranges_of(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    slices.read(str(tmp_path), "optimizer", index, {kind: empty(of_every(4, 2)) for kind in KINDS})
    assert calls == [1, 1], "the header, and the data"


def test_what_is_not_stored_is_named(tmp_path: Path) -> None:
    index = write(tmp_path, "flat", 2)
    name = next(iter(SIZES))
    index[name] = []
    with pytest.raises(CheckpointError, match=rf"'{name}': 0 of 997 values from 0 on are stored"):
        slices.read(str(tmp_path), "optimizer", index, {"weight:": empty(flat(1, 0))})
