"""Attention inside segments: sequences packed along one axis that see only their own partner.

Everything attends through `attend`: training and sampling, self- and cross-attention. Which kernel runs
(varlen flash, SDPA over equal segments, one masked batch, SDPA per segment) is decided here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# Below this mean segment length one masked batch beats a call per segment on CPUs.
SHORT = 64


class Segments:
    """Lengths of sequences packed one after the other along one axis.

    Args:
        lengths: tokens of every segment, 0 allowed; host integers: no kernel choice waits for a device.
        device: where index tensors are needed.
        window: if the axis is a concatenation of windows of this many tokens and no segment crosses a
            window's edge, the masked kernel can view the axis instead of padding it.
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
        """Whether all segments have one length."""
        return all(length == self.longest for length in self.lengths)

    @cached_property
    def boundaries(self) -> Int[Tensor, "S_plus_1"]:
        """Cumulative lengths from 0, int32 as the flash kernels want them."""
        sums = torch.zeros(len(self.lengths) + 1, dtype=torch.int32)
        sums[1:] = torch.tensor(self.lengths, dtype=torch.int32).cumsum(0)
        return sums.to(self.device, non_blocking=True)

    @cached_property
    def ids(self) -> Int[Tensor, "T"]:
        """Segment of every packed token."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(lengths, output_size=self.total).to(self.device, non_blocking=True)

    @cached_property
    def offsets(self) -> Int[Tensor, "T"]:
        """Index of every packed token inside its segment."""
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
    """Softmax attention of query segment i over key segment i, for all i.

    A query whose key segment is empty gets output 0 and contributes finite (zero) gradients, in every kernel.

    Args:
        causal: the j-th query of a segment sees its first j keys and its own; for self-attention only.

    Shape:
        q: [Tq, N, D]; k, v: [Tk, N, D]; returns [Tq, N, D].

    Source: arXiv 2505.18883, section 4 (partition-wise attention), as packed segments (method.md section 2).
    """
    assert len(q_segments) == len(k_segments), (len(q_segments), len(k_segments))
    assert q.shape[0] == q_segments.total, (q.shape, q_segments.total)
    assert k.shape[0] == k_segments.total, (k.shape, k_segments.total)
    assert not causal or q_segments.lengths == k_segments.lengths, "causal attention is self-attention"
    if not any(map(min, zip(q_segments.lengths, k_segments.lengths, strict=True))):  # no query sees any key
        return q * 0 + (k.sum() + v.sum()) * 0  # stays in the graph: every parameter gets a (zero) gradient
    if _flash(q):
        return _varlen(q, k, v, q_segments, k_segments, causal)
    if q_segments.equal and k_segments.equal:
        return _equal(q, k, v, len(q_segments), causal)
    if max(q_segments.total, k_segments.total) < SHORT * len(q_segments):
        return _masked(q, k, v, q_segments, k_segments, causal)
    return _each(q, k, v, q_segments, k_segments, causal)


def _flash(q: Float[Tensor, "Tq N D"]) -> bool:
    """Whether the flash kernels take these: half precision, heads of 8, 16, ... 256 entries, Ampere or newer."""
    if (
        not q.is_cuda
        or q.dtype not in (torch.float16, torch.bfloat16)
        or q.shape[-1] % 8
        or q.shape[-1] > 256
    ):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """Flash kernels over ragged segments, no mask tensor."""
    from torch.nn.attention.varlen import varlen_attn  # absent from CPU-only builds of some platforms

    out: Any = varlen_attn(
        q,
        k,
        v,
        q_segments.boundaries,
        k_segments.boundaries,
        q_segments.longest,
        k_segments.longest,
        window_size=(-1, 0 if causal else -1),
    )
    return out if min(k_segments.lengths) else torch.where(_has_keys(q_segments, k_segments), out, 0)


def _equal(q: Tensor, k: Tensor, v: Tensor, count: int, causal: bool = False) -> Tensor:
    """All segments of one length: a plain batch."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [S, N, T/S, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)


def _each(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """One call per segment: least arithmetic, most calls (`split`: a slice's backward fills a tensor)."""
    outs = []
    parts = zip(
        q.split(q_segments.lengths), k.split(k_segments.lengths), v.split(k_segments.lengths), strict=True
    )
    for q_i, k_i, v_i in parts:
        if len(q_i) and len(k_i):
            q_i, k_i, v_i = (x.transpose(0, 1).unsqueeze(0) for x in (q_i, k_i, v_i))  # [1, N, T_i, D]
            y = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=causal)
            outs.append(y.squeeze(0).transpose(0, 1))
        else:
            outs.append(q_i * 0)
    return torch.cat(outs)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, causal: bool = False
) -> Tensor:
    """Many short segments: one batch of windows (or of padded segments) with a boolean mask."""
    q_ids, k_ids = q_segments.ids, k_segments.ids
    if q_segments.window and k_segments.window:
        q_shape, k_shape = (-1, q_segments.window), (-1, k_segments.window)
        q_pad, k_pad, v_pad = q.unflatten(0, q_shape), k.unflatten(0, k_shape), v.unflatten(0, k_shape)
        mask = q_ids.view(q_shape)[:, :, None] == k_ids.view(k_shape)[:, None, :]  # [R, Wq, Wk]
    else:
        q_pad = _pad(q, q_segments)
        k_pad, v_pad = _pad(k, k_segments), _pad(v, k_segments)
        filled = torch.tensor(k_segments.lengths, device=q.device)
        mask = (torch.arange(k_segments.longest, device=q.device) < filled[:, None])[:, None, :]  # [S, 1, Tk]
    if causal:  # queries and keys lie alike in windows or in padded segments
        mask = mask & mask.new_ones(q_pad.shape[1], k_pad.shape[1]).tril()
    # A row without keys would be 0/0: let it see everything, and set its output to 0 afterwards.
    any_key = mask.any(-1, keepdim=True)
    mask = (mask | ~any_key)[:, None]  # [R, 1, Wq or 1, Wk]
    out = F.scaled_dot_product_attention(
        q_pad.transpose(1, 2), k_pad.transpose(1, 2), v_pad.transpose(1, 2), attn_mask=mask
    ).transpose(1, 2)
    if 0 in k_segments.lengths:
        out = torch.where(any_key[..., None], out, 0)
    if q_segments.window and k_segments.window:
        return out.flatten(0, 1)
    return out[q_ids, q_segments.offsets]


def _pad(x: Float[Tensor, "T N D"], segments: Segments) -> Float[Tensor, "S longest N D"]:
    """Packed -> one row a segment, zeros behind."""
    padded = x.new_zeros(len(segments), segments.longest, *x.shape[1:])
    return padded.index_put((segments.ids, segments.offsets), x)


def _has_keys(q_segments: Segments, k_segments: Segments) -> Bool[Tensor, "Tq 1 1"]:
    lengths = torch.tensor(k_segments.lengths, device=q_segments.device)
    return (lengths > 0)[q_segments.ids][:, None, None]


class CacheAppend:
    """How rows of a key/value cache grow by one call: `new[b]` tokens behind the `old[b]` there are.

    Args:
        old, new: tokens of every row, host integers.
        capacity: tokens that a row of the cache has room for.
        causal: new tokens see each other only backwards, else all of them.
    """

    def __init__(
        self,
        old: Sequence[int],
        new: Sequence[int],
        capacity: int,
        device: torch.device,
        causal: bool = True,
    ):
        self.segments = Segments(new, device)
        self.longest = max(a + b for a, b in zip(old, new, strict=True))
        assert self.longest <= capacity, (self.longest, capacity)
        self._old, self._capacity, self._device, self._causal = list(old), capacity, device, causal
        # Rows that are all alike, as in most sampling, are sliced: no index tensors, no mask for one token.
        self._alike = self.segments.equal and min(old) == max(old)

    @cached_property
    def slots(self) -> Int[Tensor, "T"]:
        """Place in its row of every new token."""
        if self._alike:
            return torch.arange(self._old[0], self.longest, device=self._device).repeat(len(self.segments))
        return torch.tensor(self._old, device=self._device)[self.segments.ids] + self.segments.offsets

    @cached_property
    def _index(self) -> Int[Tensor, "T"]:
        return self.segments.ids * self._capacity + self.slots

    def take(self, rows: Shaped[Tensor, "B capacity *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The entries of the new tokens, packed."""
        if self._alike:
            return rows[:, self._old[0] : self.longest].flatten(0, 1)
        return rows.flatten(0, 1)[self._index]

    def put(self, rows: Shaped[Tensor, "B capacity *rest"], packed: Shaped[Tensor, "T *rest"]) -> None:
        """Write the entries of the new tokens."""
        if self._alike:
            rows[:, self._old[0] : self.longest] = packed.unflatten(0, (len(rows), -1))
        else:
            rows.flatten(0, 1).index_copy_(0, self._index, packed)

    @cached_property
    def mask(self) -> Bool[Tensor, "B 1 longest_new longest"] | None:
        """Which keys a new token sees; None where that is all there are."""
        if self._alike and (not self._causal or self.segments.longest == 1):
            return None
        # The last key that each new token sees: its own, or its row's last.
        last = self.slots
        if not self._causal:
            new = self.segments.lengths
            ends = [a + b - 1 for a, b in zip(self._old, new, strict=True)]
            last = torch.tensor(ends, device=self._device)[self.segments.ids]
        seen = last.new_zeros(len(self.segments), self.segments.longest)  # padding sees key 0
        seen = seen.index_put((self.segments.ids, self.segments.offsets), last)
        return (torch.arange(self.longest, device=self._device) <= seen[..., None])[:, None]


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, in preallocated rows that are written once and read in place."""

    keys: Float[Tensor, "B capacity N D"]
    values: Float[Tensor, "B capacity N D"]

    def attend(
        self,
        q: Float[Tensor, "T N D"],
        k: Float[Tensor, "T N D"],
        v: Float[Tensor, "T N D"],
        growth: CacheAppend,
    ) -> Float[Tensor, "T N D"]:
        """Store the new tokens' keys and values, and let them attend to what `growth` says."""
        self.put(k, v, growth)
        return self._attend(q, growth.segments, growth.longest, growth.mask)

    def put(self, k: Float[Tensor, "T N D"], v: Float[Tensor, "T N D"], growth: CacheAppend) -> None:
        """Store the new tokens' keys and values."""
        growth.put(self.keys, k)
        growth.put(self.values, v)

    def read(self, q: Float[Tensor, "T N D"], asked: Segments, filled: Segments) -> Float[Tensor, "T N D"]:
        """What `attend` gives for the first `filled.lengths[b]` keys and values of every row b."""
        if not filled.total:
            return q * 0
        mask = None
        if not filled.equal:
            counts = torch.tensor(filled.lengths, device=q.device)[:, None, None, None]
            # A row without keys would be 0/0: let it see one, and set its output to 0 afterwards.
            mask = torch.arange(filled.longest, device=q.device) < counts.clamp(min=1)
        out = self._attend(q, asked, filled.longest, mask)
        return out if min(filled.lengths) else torch.where(_has_keys(asked, filled), out, 0)

    def _attend(
        self, q: Float[Tensor, "T N D"], asked: Segments, longest: int, mask: Tensor | None
    ) -> Float[Tensor, "T N D"]:
        """Packed queries to the first `longest` keys of their rows."""
        rows = q.unflatten(0, (len(asked), -1)) if asked.equal else _pad(q, asked)  # [B, longest asked, N, D]
        out = F.scaled_dot_product_attention(
            rows.transpose(1, 2),
            self.keys[:, :longest].transpose(1, 2),
            self.values[:, :longest].transpose(1, 2),
            attn_mask=mask,
        ).transpose(1, 2)
        return out.flatten(0, 1) if asked.equal else out[asked.ids, asked.offsets]
