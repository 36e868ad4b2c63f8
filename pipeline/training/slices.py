"""Slices of flat tensors in files of safetensors: written by one group of workers, read in part by any other."""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError

# (parameter name, offset into the flattened parameter) -> float32 values from there on that this rank owns.
Slices = dict[tuple[str, int], Tensor]
Index = dict[str, list[tuple[int, int, int]]]  # parameter name -> (rank, offset, number of values), by offset

SHAPES = "shapes"  # of the parameters by name, among the facts of a file, as JSON

_HEADER = 1 << 16  # bytes that hold most headers, read at once
_BYTES = 4  # of a float32
_THREADS = 8


@torch.no_grad()
def fill(slices: Slices, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into slices.

    Args:
        slices: of this rank, which are overwritten.
        weights: full weights by parameter name, in any shape.

    Raises:
        CheckpointError: a value of a slice is not among the weights.
    """
    for (name, offset), values in slices.items():
        stored = weights.get(name, values[:0]).flatten()[offset : offset + values.numel()]
        if stored.numel() != values.numel():
            raise CheckpointError(
                f"weights of {name!r}: {stored.numel()} of {values.numel()} values from {offset} on are stored"
            )
        values.copy_(stored)


def save(file: Path, kinds: Mapping[str, Slices], facts: Mapping[str, str] | None = None) -> None:
    """Write slices with the keys `KINDname@offset`.

    Args:
        file: to write.
        kinds: slices by what stands before their names.
        facts: kept in the file's header.
    """
    tensors = {
        f"{kind}{name}@{offset}": values.cpu().contiguous()
        for kind, slices in kinds.items()
        for (name, offset), values in slices.items()
    }
    save_file(tensors, file, dict(facts or {}))
    storage.follow_umask(file)


def read_whole(folder: Path, stem: str, kind: str = "") -> dict[str, Tensor]:
    """Read what any number of ranks saved as whole tensors.

    Args:
        folder: of a checkpoint.
        stem: of the files' names.
        kind: what stands before the names of the slices.

    Returns:
        A float32 tensor for every parameter name, flat if its shape is not among the facts; it ends where the first
        slice is missing.
    """
    pieces: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    shapes: dict[str, list[int]] = {}
    for file in folder.glob(f"{stem}_*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= json.loads((opened.metadata() or {}).get(SHAPES, "{}"))
            for key in opened.keys():  # noqa: SIM118  it is no mapping
                if key.startswith(kind):
                    name, _, start = key.removeprefix(kind).rpartition("@")
                    pieces[name][int(start)] = opened.get_tensor(key)
    whole = {}
    for name, parts in pieces.items():
        joined: list[Tensor] = [torch.empty(0)]
        for offset in sorted(parts):
            if offset == sum(part.numel() for part in joined):
                joined.append(parts[offset])
        flat = torch.cat(joined)
        shape = shapes.get(name, [-1])
        whole[name] = flat.view(shape) if -1 in shape or math.prod(shape) == len(flat) else flat
    return whole


def writer(index: Index, slices: Slices) -> int | None:
    """Return the rank that stored these slices and no others; None if there is none.

    Args:
        index: which rank stored which slices.
        slices: of this rank.
    """
    stored: defaultdict[int, set[tuple[str, int, int]]] = defaultdict(set)
    for name, parts in index.items():
        for rank, offset, count in parts:
            stored[rank].add((name, offset, count))
    own = {(*key, values.numel()) for key, values in slices.items()}
    return next((rank for rank, parts in stored.items() if parts == own), None)


class _Piece(NamedTuple):
    """A part of a stored slice that a slice of this rank needs.

    Attributes:
        key: of the stored slice, without its kind.
        start: first value of the part in the stored slice.
        place: first value of the part in this rank's slice.
        size: number of values.
        into: this rank's slice, by its key.
    """

    key: str
    start: int
    place: int
    size: int
    into: tuple[str, int]


def _pieces(index: Index, slices: Slices) -> dict[int, list[_Piece]]:
    """Find the parts of stored slices that make up slices, by the rank that stored them."""
    pieces: defaultdict[int, list[_Piece]] = defaultdict(list)
    for (name, first), values in slices.items():
        end, covered = first + values.numel(), 0
        for rank, offset, count in index.get(name, ()):
            start, stop = max(first, offset), min(end, offset + count)
            if start < stop:
                pieces[rank].append(
                    _Piece(f"{name}@{offset}", start - offset, start - first, stop - start, (name, first))
                )
                covered += stop - start
        if covered != values.numel():
            raise CheckpointError(
                f"{name!r}: {covered} of {values.numel()} values from {first} on are stored"
            )
    return pieces


@torch.no_grad()
def read(folder: str, stem: str, index: Index, kinds: Mapping[str, Slices]) -> dict[str, str]:
    """Fill slices from what any number of ranks saved, reading only the parts that they need.

    Args:
        folder: of a checkpoint, local or remote.
        stem: of the files' names.
        index: which rank stored which slices.
        kinds: slices by what stands before their names, all with the same keys; they are overwritten.

    Returns:
        The facts in the headers of the files.

    Raises:
        CheckpointError: a value is not stored.
    """
    wanted = _pieces(index, next(iter(kinds.values())))

    def read_file(rank: int) -> dict[str, str]:
        file = storage.join(folder, f"{stem}_{rank:05d}.safetensors")
        header, begin = _read_header(file)
        parts = [
            (begin + header[f"{kind}{piece.key}"]["data_offsets"][0] + _BYTES * piece.start, kind, piece)
            for kind in kinds
            for piece in wanted[rank]
        ]
        parts.sort(key=lambda part: part[0])
        ranges = [(start, start + _BYTES * piece.size) for start, _, piece in parts]
        for data, (_, kind, piece) in zip(_read_joined(file, ranges), parts, strict=True):
            values = torch.frombuffer(bytearray(data), dtype=torch.float32)
            kinds[kind][piece.into][piece.place : piece.place + piece.size].copy_(values)
        return header.get("__metadata__", {})

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        facts = list(pool.map(read_file, wanted))
    return facts[0] if facts else {}


def _read_header(file: str) -> tuple[dict[str, dict], int]:
    """Read the header of a file of safetensors, and where its data begins."""
    (start,) = storage.read_ranges(file, [(0, _HEADER)])
    (size,) = struct.unpack("<Q", start[:8])
    if 8 + size > len(start):
        start += storage.read_ranges(file, [(len(start), 8 + size)])[0]
    return json.loads(start[8 : 8 + size]), 8 + size


def _read_joined(file: str, ranges: list[tuple[int, int]]) -> Iterator[memoryview]:
    """Read ascending ranges of a file, neighbours in one call, and give each of them."""
    joined: list[list[int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    blocks = storage.read_ranges(file, [(start, stop) for start, stop in joined])
    block = 0
    for start, stop in ranges:
        while stop > joined[block][1]:
            block += 1
        yield memoryview(blocks[block])[start - joined[block][0] : stop - joined[block][0]]


def index_of(slices_of_ranks: list[list[tuple[str, int, int]]]) -> Index:
    """Make the index of what every rank stored.

    Args:
        slices_of_ranks: names, offsets and numbers of values, by rank.
    """
    index: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, slices in enumerate(slices_of_ranks):
        for name, offset, count in slices:
            index[name].append((rank, offset, count))
    return {name: sorted(parts, key=lambda part: part[1]) for name, parts in index.items()}
