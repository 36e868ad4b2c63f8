"""The operations that a pass of a model needs, by shape: what it costs, whatever code runs it.

Counted are matrix products, attention, GELU and norms. Gathers, residual sums, rotary codes, modulation by
constants and the loss behind the logits are not: they are what a measured share of the roofline pays for.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from pipeline.config.schema import ARConfig, MDLMConfig, ModelConfig, PGMConfig, TrunkConfig
from pipeline.models.layers import LOGITS_AT_ONCE

BACKWARD = 2  # a product's backward pass is two products of its size: the gradients of its two operands


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: what it computes.
        shape: gemm: (rows, inner, outer). attention and causal: (segments, N, Tq, Tk, D). gelu, norm: (rows, width).
    """

    kind: Literal["gemm", "attention", "causal", "gelu", "norm"]
    shape: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Of the forward pass, two for a multiply-add; those of GELU and norms are left out."""
        if self.kind == "gemm":
            rows, inner, outer = self.shape
            return 2 * rows * inner * outer
        if self.kind in ("attention", "causal"):
            segments, heads, queries, keys, size = self.shape
            pairs = queries * (queries + 1) // 2 if self.kind == "causal" else queries * keys
            return 4 * segments * heads * pairs * size  # scores, and the weighted sum of values
        return 0


Work = Counter[Op]


def flops(work: Work, backward: bool = False) -> int:
    """Needed floating point operations of a forward pass, or of a forward and a backward pass."""
    return sum(op.flops * count for op, count in work.items()) * (1 + BACKWARD * backward)


def training_work(config: ModelConfig, vocab_size: int, groups: Bool[np.ndarray, "B L"]) -> Work:
    """The forward pass of a training step on rows that are split like this.

    Args:
        vocab_size: V.
        groups: True = group 1, as in `Batch`; all positions are targets, or those that the model learns from.
    """
    rows, length = groups.shape
    ones = groups.sum(1).tolist()
    if isinstance(config, PGMConfig):
        half, width = config.registers // 2, length + config.registers
        known = [n for one in ones for n in (width - one - half, one + half)]
        return _pgm(config, vocab_size, known, known, [n for one in ones for n in (one, length - one)], width)
    if isinstance(config, MDLMConfig):
        passes = rows * (2 if config.complementary else 1)
        asked = rows * length if config.complementary else sum(ones)
        return _trunk(config, vocab_size, config.blocks, [length + config.registers] * passes, asked)
    width = [config.registers + length] * rows
    return _trunk(config, vocab_size, config.blocks, width, rows * length, causal=True)


def sampling_work(
    config: PGMConfig | MDLMConfig,
    vocab_size: int,
    length: int,
    rows: int,
    counts: Sequence[int],
    refresh_every: int = 1,
) -> Work:
    """All passes that draw rows from nothing, revealing `counts[s]` positions of every row at step s.

    Args:
        vocab_size: V.
        length: L.
        refresh_every: as in `sample`; steps between it encode only what is new.
    """
    work: Work = Counter()
    known = encoded = 0
    for step, count in enumerate(counts):
        if isinstance(config, MDLMConfig):
            width = [length + config.registers] * rows
            work += _trunk(config, vocab_size, config.blocks, width, rows * count)
        else:
            stored, own = known + config.registers // 2, 0 if step % refresh_every == 0 else encoded
            new, there, asked = ([width] * rows for width in (stored - own, stored, count))
            work += _pgm(config, vocab_size, new, there, asked, length + config.registers)
            encoded = stored
        known += count
    return work


def _pgm(
    config: PGMConfig,
    vocab_size: int,
    new: Sequence[int],
    known: Sequence[int],
    asked: Sequence[int],
    extent: int,
) -> Work:
    """Segments of `known` tokens, `new` of them to encode and to make keys of, read at `asked` positions."""
    hidden, tokens, queries = config.hidden, sum(new), sum(asked)
    work: Work = Counter()
    for op, count in _self_block(config, new, known).items():
        work[op] += count * config.encoder_blocks
    cross: Work = Counter()
    cross += _products(queries, hidden, hidden, 2)  # queries, output
    cross += _products(tokens, hidden, 2 * hidden)
    cross += _attention(config, asked, known)
    block = cross + _norms(queries, hidden, 2) + _norms(tokens, hidden) + _mlp(queries, hidden)
    block += _modulation(config, 6, len(asked))
    for op, count in block.items():
        work[op] += count * config.decoder_blocks
    # Without pooling the swap's queries depend on the position alone, so rows share them.
    raw = min(queries, extent) if config.swap.pooling == "none" else queries
    wide = 4 * hidden if config.swap.query == "mlp4" else 0
    swap = cross - _products(queries, hidden, hidden) + _norms(raw, hidden)
    swap += (
        _products(raw, hidden, wide) + _products(raw, wide, hidden)
        if wide
        else _products(raw, hidden, hidden)
    )
    for op, count in swap.items():
        work[op] += count * (config.decoder_blocks if config.swap.every_block else 1)
    return work + _final(config, vocab_size, queries)


def _trunk(
    config: MDLMConfig | ARConfig,
    vocab_size: int,
    blocks: int,
    widths: Sequence[int],
    asked: int,
    causal: bool = False,
) -> Work:
    """Self-attention blocks over whole rows, and a head on the `asked` positions."""
    block = _self_block(config, widths, widths, causal)
    return Counter({op: count * blocks for op, count in block.items()}) + _final(config, vocab_size, asked)


def _self_block(config: TrunkConfig, new: Sequence[int], known: Sequence[int], causal: bool = False) -> Work:
    hidden, tokens = config.hidden, sum(new)
    work = _products(tokens, hidden, 3 * hidden) + _products(tokens, hidden, hidden)
    work += _attention(config, new, known, causal) + _norms(tokens, hidden, 2) + _mlp(tokens, hidden)
    return work + _modulation(config, 6, len(new))


def _mlp(rows: int, hidden: int) -> Work:
    work = _products(rows, hidden, 4 * hidden) + _products(rows, 4 * hidden, hidden)
    return work + Counter({Op("gelu", (rows, 4 * hidden)): 1} if rows else {})


def _final(config: TrunkConfig, vocab_size: int, rows: int) -> Work:
    """Final norm and head, whose logits are made for some rows at a time."""
    at_once = max(1, LOGITS_AT_ONCE["cpu"] // vocab_size)
    work = _norms(rows, config.hidden) + _modulation(config, 2, rows)
    work += _products(at_once, config.hidden, vocab_size, rows // at_once)
    return work + _products(rows % at_once, config.hidden, vocab_size)


def _attention(config: TrunkConfig, asked: Sequence[int], read: Sequence[int], causal: bool = False) -> Work:
    """Equal segments are one operation, others one each; pairs without queries or keys are none."""
    size = config.hidden // config.heads
    kind: Literal["causal", "attention"] = "causal" if causal else "attention"
    pairs = Counter(pair for pair in zip(asked, read, strict=True) if all(pair))
    if len(pairs) == 1 and pairs.total() == len(asked):
        return Counter({Op(kind, (n, config.heads, *pair, size)): 1 for pair, n in pairs.items()})
    return Counter({Op(kind, (1, config.heads, *pair, size)): n for pair, n in pairs.items()})


def _modulation(config: TrunkConfig, vectors: int, rows: int) -> Work:
    """The map of class vectors to shifts, scales and gates, at most once for every class there is."""
    if config.classes is None:
        return Counter()
    return _products(min(rows, config.classes + 1), config.hidden, vectors * config.hidden)


def _products(rows: int, inner: int, outer: int, count: int = 1) -> Work:
    return Counter({Op("gemm", (rows, inner, outer)): count} if rows and count else {})


def _norms(rows: int, hidden: int, count: int = 1) -> Work:
    return Counter({Op("norm", (rows, hidden)): count} if rows else {})
