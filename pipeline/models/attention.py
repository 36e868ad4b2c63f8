"""Attention inside segments: sequences packed along one axis, each of which reads only its own key segment.

Training and sampling, self- and cross-attention all go through `attend` or, with stored keys and values,
through `Cache`. Which kernel runs (varlen flash, SDPA over equal segments, one masked batch, SDPA per segment)
is decided in this module and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Heads = Float[Tensor, "T N D"]  # queries, keys or values of packed tokens
# Below this mean segment length one masked batch is faster on CPUs than one call per segment.
SHORT = 64

# cuDNN's attention makes a plan for every new shape, which takes about 60 ms, and every step of sampling with stored
# keys and values has new shapes. The flash and memory-efficient kernels need none. For the whole process.
torch.backends.cuda.enable_cudnn_sdp(False)


class Segments:
    """Lengths of sequences packed one after the other along one axis.

    Args:
        lengths: tokens of every segment, 0 allowed; host integers, so that choosing a kernel never waits for a
            device.
        device: where index tensors are needed.
        window: size of the windows that the axis divides into, if no segment crosses the edge of a window; the
            masked kernel then views the axis as windows instead of padding it.

    Attributes:
        total: tokens of all segments.
        longest: tokens of the longest segment.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", window: int | None = None):
        self.lengths = list(lengths)
        self.device = torch.device(device)
        self.total = sum(self.lengths)
        self.longest = max(self.lengths, default=0)
        self.window = window
        assert window is None or self.total % max(window, 1) == 0, (self.total, window)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all segments have the same length."""
        return all(length == self.longest for length in self.lengths)

    @cached_property
    def boundaries(self) -> Int[Tensor, "S_plus_1"]:
        """Cumulative lengths from 0, in int32 as the flash kernels expect them."""
        sums = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return sums.to(self.device, non_blocking=True)

    @cached_property
    def counts(self) -> Int[Tensor, "S"]:
        """Tokens of every segment, on the device."""
        return torch.tensor(self.lengths).to(self.device, non_blocking=True)

    @cached_property
    def filled(self) -> Bool[Tensor, "S 1 1 longest"]:
        """Which entries of a padded segment it fills; of an empty one the first, so that attention gives no 0/0."""
        places = torch.arange(self.longest, device=self.device)
        return (places < self.counts.clamp(min=1)[:, None])[:, None, None]

    @cached_property
    def ids(self) -> Int[Tensor, "T"]:
        """Segment index of every packed token."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(lengths, output_size=self.total).to(self.device, non_blocking=True)

    @cached_property
    def offsets(self) -> Int[Tensor, "T"]:
        """Index of every packed token within its segment."""
        starts = self.boundaries[:-1].long()
        return torch.arange(self.total, device=self.device) - starts[self.ids]


def attend(
    q: Float[Tensor, "Tq N D"],
    k: Float[Tensor, "Tk N D"],
    v: Float[Tensor, "Tk N D"],
    q_segments: Segments,
    k_segments: Segments,
    causal: bool = False,
) -> Float[Tensor, "Tq N D"]:
    """Compute softmax attention of query segment i over key segment i, for all i.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: of the queries.
        k_segments: of the keys and values, as many as query segments.
        causal: query j of a segment reads keys 0 to j only; requires equal query and key segments.

    Shape:
        q: [Tq, N, D]; k, v: [Tk, N, D].

    Returns:
        [Tq, N, D]. With every kernel, a query whose key segment is empty has output 0 and zero gradients.

    Source:
        arXiv 2505.18883, section 4 (attention within and across groups); docs/method.md section 2, "One
        formulation for training and sampling" (packed segments).
    """
    assert len(q_segments) == len(k_segments), (len(q_segments), len(k_segments))
    assert q.shape[0] == q_segments.total, (q.shape, q_segments.total)
    assert k.shape[0] == k_segments.total, (k.shape, k_segments.total)
    assert not causal or q_segments.lengths == k_segments.lengths, "causal attention is self-attention"
    if not any(map(min, zip(q_segments.lengths, k_segments.lengths, strict=True))):  # no query reads any key
        return q * 0 + (k.sum() + v.sum()) * 0  # stays in the graph: every parameter gets a (zero) gradient
    if _flash(q):
        return _varlen(q, k, v, q_segments, k_segments, causal)
    if q_segments.equal and k_segments.equal:
        return _equal(q, k, v, len(q_segments), causal)
    if max(q_segments.total, k_segments.total) < SHORT * len(q_segments):
        return _masked(q, k, v, q_segments, k_segments, causal)
    return _each(q, k, v, q_segments, k_segments, causal)


def _flash(q: Float[Tensor, "Tq N D"]) -> bool:
    """Whether the flash kernels support these: half precision, head size 8, 16, ... 256, Ampere or newer."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = q.shape[-1]
    return size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """Flash kernels over ragged segments, without a mask tensor."""
    from torch.nn.attention.varlen import varlen_attn  # absent from CPU-only builds of some platforms

    bounds = q_segments.boundaries, k_segments.boundaries, q_segments.longest, k_segments.longest
    out: Any = varlen_attn(q, k, v, *bounds, window_size=(-1, 0 if causal else -1))
    return out if min(k_segments.lengths) else torch.where(_has_keys(q_segments, k_segments), out, 0)


def _equal(q: Tensor, k: Tensor, v: Tensor, count: int, causal: bool = False) -> Tensor:
    """All segments have the same length: a plain batch."""
    q, k, v = (x.unflatten(0, (count, -1)) for x in (q, k, v))  # [S, T/S, N, D]
    return _sdpa(q, k, v, causal=causal).flatten(0, 1)


def _each(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """One call per segment: the least arithmetic and the most calls."""
    outs = []
    # `split`, because the backward pass of a slice fills a tensor of the whole size.
    parts = (q.split(q_segments.lengths), k.split(k_segments.lengths), v.split(k_segments.lengths))
    for q_i, k_i, v_i in zip(*parts, strict=True):
        seen = len(q_i) and len(k_i)
        outs.append(_sdpa(q_i[None], k_i[None], v_i[None], causal=causal)[0] if seen else q_i * 0)
    return torch.cat(outs)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """Many short segments: one batch of windows (or of padded segments) with a boolean mask."""
    windowed = bool(q_segments.window and k_segments.window)
    if q_segments.window and k_segments.window:
        q_shape, k_shape = (-1, q_segments.window), (-1, k_segments.window)
        q, k, v = q.unflatten(0, q_shape), k.unflatten(0, k_shape), v.unflatten(0, k_shape)
        mask = (
            q_segments.ids.view(q_shape)[:, :, None] == k_segments.ids.view(k_shape)[:, None]
        )  # [R, Wq, Wk]
    else:
        q, k, v = _pad(q, q_segments), _pad(k, k_segments), _pad(v, k_segments)
        filled = k_segments.counts
        mask = (torch.arange(k_segments.longest, device=q.device) < filled[:, None])[:, None, :]  # [S, 1, Tk]
    if causal:  # queries and keys lie alike in windows or in padded segments
        mask = mask & mask.new_ones(q.shape[1], k.shape[1]).tril()
    # A query without keys would give 0/0: let it read everything, and set its output to 0 afterwards.
    any_key = mask.any(-1, keepdim=True)
    mask = (mask | ~any_key)[:, None]  # [R, 1, Wq or 1, Wk]
    out = _sdpa(q, k, v, mask)
    if 0 in k_segments.lengths:
        out = torch.where(any_key[..., None], out, 0)
    return out.flatten(0, 1) if windowed else out[q_segments.ids, q_segments.offsets]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Float[Tensor, "R Tq N D"]:
    """Attention of rows in the layout [R, T, N, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _pad(x: Float[Tensor, "T N D"], segments: Segments) -> Float[Tensor, "S longest N D"]:
    """One row for each packed segment, filled up with zeros."""
    padded = x.new_zeros(len(segments), segments.longest, *x.shape[1:])
    return padded.index_put((segments.ids, segments.offsets), x)


def _has_keys(q_segments: Segments, k_segments: Segments) -> Bool[Tensor, "Tq 1 1"]:
    """Whether each query has any key to read."""
    return (k_segments.counts > 0)[q_segments.ids][:, None, None]


def flat_index(lengths: Sequence[int], starts: Sequence[int], stride: int) -> Int[Tensor, "T"]:
    """Compute the flat indices of consecutive entries in the rows of a [B, stride] tensor.

    Args:
        lengths: number of entries in every row.
        starts: first entry in every row.
        stride: entries of a row.

    Returns:
        [T] host integers, row after row.
    """
    counts = torch.tensor(lengths, dtype=torch.int64)
    first = torch.arange(len(counts)) * stride + torch.tensor(starts, dtype=torch.int64)
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.repeat_interleave(first, counts) + within


class CacheAppend:
    """Indices for appending `new[b]` entries to row b of a key/value cache that holds `old[b]`.

    Args:
        old: entries that every row of the cache holds, host integers.
        new: entries to append to every row, host integers.
        capacity: entries that a row of the cache has room for.
        device: of the cache.
        causal: a new token reads the old ones, those before it and itself; else it reads all new ones too.

    Attributes:
        segments: of the new tokens, one a row.
        ends: entries of every row afterwards.
        longest: entries of the fullest row afterwards.
    """

    def __init__(
        self, old: Sequence[int], new: Sequence[int], capacity: int, device: torch.device, causal: bool = True
    ):
        self.segments = Segments(new, device)
        self.ends = [before + added for before, added in zip(old, new, strict=True)]
        self.longest = max(self.ends, default=0)
        assert self.longest <= capacity, f"{self.longest} entries are beyond the capacity of {capacity}"
        self._old, self._capacity, self._device, self._causal = list(old), capacity, device, causal
        # Rows that are all alike, as in most sampling, are sliced: no index tensors, no mask for one token.
        self._uniform = self.segments.equal and len({*old}) == 1

    @cached_property
    def slots(self) -> Int[Tensor, "T"]:
        """Index of every new token in its row of the cache."""
        if self._uniform:
            return torch.arange(self._old[0], self.longest, device=self._device).repeat(len(self.segments))
        return self._index % self._capacity

    @cached_property
    def _index(self) -> Int[Tensor, "T"]:
        """Index of every new token in the flattened cache."""
        return flat_index(self.segments.lengths, self._old, self._capacity).to(
            self._device, non_blocking=True
        )

    def take(self, rows: Shaped[Tensor, "B capacity *rest"]) -> Shaped[Tensor, "T *rest"]:
        """Select the entries of the new tokens.

        Args:
            rows: a field with one entry for each slot of the cache.

        Returns:
            [T, ...] entries, packed row after row.
        """
        if self._uniform:
            return rows[:, self._old[0] : self.longest].flatten(0, 1)
        return rows.flatten(0, 1)[self._index]

    def put(self, rows: Shaped[Tensor, "B capacity *rest"], packed: Shaped[Tensor, "T *rest"]) -> None:
        """Write the entries of the new tokens.

        Args:
            rows: a field with one entry for each slot of the cache, which is changed in place.
            packed: entries of the new tokens, row after row.
        """
        if self._uniform:
            rows[:, self._old[0] : self.longest] = packed.unflatten(0, (len(rows), -1))
        else:
            rows.flatten(0, 1).index_copy_(0, self._index, packed)

    @cached_property
    def mask(self) -> Bool[Tensor, "_ 1 longest_new longest"] | None:
        """Which entries each new token reads, in every row or in all rows alike; None if it reads all of them."""
        if self._uniform and (not self._causal or self.segments.longest == 1):
            return None
        if self._uniform:
            last = torch.arange(self._old[0], self.longest, device=self._device)[None]
            return (torch.arange(self.longest, device=self._device) <= last[..., None])[:, None]
        last = self.slots  # the last entry that each new token reads: its own, or the last one of its row
        if not self._causal:
            last = torch.tensor([end - 1 for end in self.ends], device=self._device)[self.segments.ids]
        padded = last.new_zeros(len(self.segments), self.segments.longest)  # padding reads entry 0
        padded = padded.index_put((self.segments.ids, self.segments.offsets), last)
        return (torch.arange(self.longest, device=self._device) <= padded[..., None])[:, None]


class EqualSegments(Segments):
    """Segments of one length, whose indices are made on the device.

    Args:
        count: number of segments.
        length: tokens of each.
        device: where index tensors are needed.
    """

    def __init__(self, count: int, length: int, device: torch.device):
        super().__init__([length] * count, device)
        self.ids = torch.arange(count * length, device=device) // max(length, 1)


class Filled(Segments):
    """The first entries of every row of a cache, in numbers that only the device knows.

    Args:
        counts: entries of every row. A row without entries reads the first, which a cache begins with as zeros.
        capacity: entries that a row has room for.
    """

    def __init__(self, counts: Int[Tensor, "B"], capacity: int):
        super().__init__([capacity] * len(counts), counts.device)
        places = torch.arange(capacity, device=counts.device)
        self.filled = (places < counts.clamp(min=1)[:, None])[:, None, None]

    @property
    def equal(self) -> bool:
        """False: the counts may differ."""
        return False


class FixedAppend(CacheAppend):
    """As `CacheAppend` with as many new tokens in every row, at slots that only the device knows.

    All shapes follow from the arguments' shapes, and nothing is copied from the host, so that a step of sampling can
    be compiled or captured as a CUDA graph. A new token reads its own slot and all before it.

    Args:
        slots: of the new tokens in their rows; -1 is the last slot of a row, which no token may need.
        capacity: entries that a row of the cache has room for.
    """

    def __init__(self, slots: Int[Tensor, "B new"], capacity: int):
        rows, new = slots.shape
        self.segments = EqualSegments(rows, new, slots.device)
        self.longest, self._uniform, self._last = capacity, False, slots % capacity

    def put(self, rows: Shaped[Tensor, "B capacity *rest"], packed: Shaped[Tensor, "T *rest"]) -> None:
        """Write the entries of the new tokens.

        Args:
            rows: a field with one entry for each slot of the cache, which is changed in place. It must be a tensor
                of its own and no view, or compiled code would copy it.
            packed: entries of the new tokens, row after row.
        """
        rows.index_put_((self.segments.ids, self._last.flatten()), packed)

    @property
    def mask(self) -> Bool[Tensor, "B 1 new capacity"]:
        """Which entries each new token reads."""
        places = torch.arange(self.longest, device=self._last.device)
        return (places <= self._last[..., None])[:, None]


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, in preallocated rows that are written once and read in place.

    Attributes:
        keys: [B, capacity, N, D].
        values: [B, capacity, N, D].
    """

    keys: Float[Tensor, "B capacity N D"]
    values: Float[Tensor, "B capacity N D"]

    def put(self, k: Heads, v: Heads, append: CacheAppend) -> None:
        """Store the keys and values of new tokens.

        Args:
            k: packed keys.
            v: packed values.
            append: where they are stored.
        """
        append.put(self.keys, k)
        append.put(self.values, v)

    def attend(self, q: Heads, k: Heads, v: Heads, append: CacheAppend) -> Heads:
        """Store the new tokens' keys and values, and compute their attention over old and new entries.

        Args:
            q: queries of the new tokens.
            k: keys of the new tokens.
            v: values of the new tokens.
            append: where they are stored, and which entries each of them reads.

        Shape:
            q, k, v: [T, N, D].

        Returns:
            [T, N, D].
        """
        self.put(k, v, append)
        return self._attend(q, append.segments, append.longest, append.mask)

    def read(self, q: Heads, q_segments: Segments, filled: Segments) -> Heads:
        """Compute what `attend` gives for the first `filled.lengths[b]` keys and values of every row b.

        Args:
            q: packed queries, [T, N, D].
            q_segments: of the queries, one a row.
            filled: entries of every row to read, 0 allowed.

        Returns:
            [T, N, D], 0 for queries of rows without entries.
        """
        if not filled.total:
            return q * 0
        mask = None
        if not filled.equal:
            mask = filled.filled  # the output of a row without entries is set to 0 below
        out = self._attend(q, q_segments, filled.longest, mask)
        return out if min(filled.lengths) else torch.where(_has_keys(q_segments, filled), out, 0)

    def _attend(self, q: Heads, segments: Segments, longest: int, mask: Tensor | None) -> Heads:
        """Attention of packed queries over the first `longest` entries of their rows."""
        rows = q.unflatten(0, (len(segments), -1)) if segments.equal else _pad(q, segments)  # [B, Tq, N, D]
        out = _sdpa(rows, self.keys[:, :longest], self.values[:, :longest], mask)
        return out.flatten(0, 1) if segments.equal else out[segments.ids, segments.offsets]
