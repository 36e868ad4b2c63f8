"""The operations that a pass of a model needs, by shape, whatever code runs it.

Counted are matrix products, attention, GELU and norms. Gathers, residual sums, rotary codes, modulation by
constants, and the loss after the logits are not counted: a measured share of the roofline includes their time.
`torch.utils.flop_counter` is no substitute: it counts what a kernel computes (padded segments, causal attention in
full) rather than what is needed, does not know the fused loss, and keeps no shapes, which the roofline needs. The
tests compare both where they must agree.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from pipeline.config.model import MDLMConfig, ModelConfig, PGMConfig, TrunkConfig
from pipeline.models.head import CHUNK_LOGITS

BACKWARD = 2  # a product's backward pass is two products of its size: the gradients of its two operands


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: what it computes.
        shape: of a gemm: (rows, inner, outer); of attention and causal attention: (segments, N, Tq, Tk, D); of gelu
            and norm: (rows, width).
    """

    kind: Literal["gemm", "attention", "causal", "gelu", "norm"]
    shape: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Operations of the forward pass, 2 for each multiply-add; those of GELU and norms are left out."""
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
    """Sum the floating-point operations of a forward pass.

    Args:
        work: the operations of the forward pass.
        backward: add those of the backward pass.

    Returns:
        The number of operations.
    """
    return sum(op.flops * count for op, count in work.items()) * (1 + BACKWARD * backward)


def training_work(config: ModelConfig, vocab_size: int, groups: Bool[np.ndarray, "B L"]) -> Work:
    """List the operations of a training step's forward pass.

    Args:
        config: the model.
        vocab_size: V.
        groups: True = group 1, as in `Batch`; all positions that the model can learn from are targets.

    Returns:
        The number of times that each operation runs.
    """
    rows, length = groups.shape
    ones, width = groups.sum(1).tolist(), length + config.registers
    final = head_work(config, vocab_size, training_targets(config, groups))
    if isinstance(config, PGMConfig):
        half = config.registers // 2
        known = [n for one in ones for n in (width - one - half, one + half)]
        targets = [n for one in ones for n in (one, length - one)]
        return _pgm(config, known, known, targets, width) + final
    both = config.kind == "mdlm" and config.complementary
    widths = [width] * rows * (2 if both else 1)
    block = _self_block(config, widths, widths, causal=config.kind == "ar")
    return _times(block, config.blocks) + final


def training_targets(config: ModelConfig, groups: Bool[np.ndarray, "B L"]) -> int:
    """Count the positions that a training step predicts.

    Args:
        config: the model.
        groups: as in `training_work`.
    """
    if config.kind == "mdlm" and not config.complementary:
        return int(groups.sum())
    return groups.size


def sampling_work(
    config: PGMConfig | MDLMConfig,
    vocab_size: int,
    length: int,
    rows: int,
    counts: Sequence[int],
    refresh_every: int = 1,
) -> Work:
    """List the operations of sampling rows from nothing.

    Args:
        config: the model.
        vocab_size: V.
        length: L.
        rows: number of rows.
        counts: positions of every row that each step reveals.
        refresh_every: as in `SamplingRequest`; the steps between encode only what is new.

    Returns:
        The number of times that each operation runs.
    """
    work: Work = Counter()
    known, encoded, width = 0, 0, length + config.registers
    for step, count in enumerate(counts):
        if isinstance(config, MDLMConfig):
            work += _times(_self_block(config, [width] * rows, [width] * rows), config.blocks)
        else:
            keeps = config.encoder == "causal" or step % refresh_every
            filled, kept = known + config.registers // 2, encoded if keeps else 0
            new, read, targets = ([n] * rows for n in (filled - kept, filled, count))
            # With stored keys, the swaps' queries of all places are computed once.
            stored = config.encoder == "causal" or refresh_every > 1
            work += _pgm(config, new, read, targets, width, (0 if step else width) if stored else None)
            encoded = filled
        work += head_work(config, vocab_size, rows * count)
        known += count
    return work


def _pgm(
    config: PGMConfig,
    new: Sequence[int],
    known: Sequence[int],
    targets: Sequence[int],
    extent: int,
    places: int | None = None,
) -> Work:
    """Segments of `known` tokens, `new` of them to encode and to make keys of, read from `targets` positions.

    With a causal encoder, the new tokens' pairs among each other are counted in full where older tokens exist.
    """
    hidden, tokens, queries, swap = config.hidden, sum(new), sum(targets), config.swap
    cross = _products(tokens, hidden, 2 * hidden) + _attention(config, targets, known)
    cross += _products(queries, hidden, hidden)  # output
    block = cross + _products(queries, hidden, hidden) + _norms(queries, hidden, 2) + _norms(tokens, hidden)
    block += _mlp(queries, hidden) + _modulation(config, 6, len(targets))
    # Without pooling, the swap's queries depend on the position alone: rows share those of `places`.
    raw = queries
    if swap.pooling == "none":
        raw = min(queries, extent) if places is None else places
    cross += _norms(raw, hidden)
    if swap.query == "mlp4":
        cross += _products(raw, hidden, 4 * hidden) + _products(raw, 4 * hidden, hidden)
    else:
        cross += _products(raw, hidden, hidden)
    causal = config.encoder == "causal" and list(new) == list(known)
    work = _times(_self_block(config, new, known, causal), config.encoder_blocks)
    work += _times(block, config.decoder_blocks)
    return work + _times(cross, config.decoder_blocks if swap.every_block else 1)


def _self_block(config: TrunkConfig, new: Sequence[int], known: Sequence[int], causal: bool = False) -> Work:
    """One self-attention block."""
    hidden, tokens = config.hidden, sum(new)
    work = _products(tokens, hidden, 3 * hidden) + _products(tokens, hidden, hidden)
    work += _attention(config, new, known, causal) + _norms(tokens, hidden, 2) + _mlp(tokens, hidden)
    return work + _modulation(config, 6, len(new))


def _mlp(rows: int, hidden: int) -> Work:
    """One MLP."""
    work = _products(rows, hidden, 4 * hidden) + _products(rows, 4 * hidden, hidden)
    return work + Counter({Op("gelu", (rows, 4 * hidden)): min(rows, 1)})


def head_work(config: TrunkConfig, vocab_size: int, rows: int) -> Work:
    """List the operations of the final norm and the head, whose logits are computed in chunks of rows.

    Args:
        config: the model.
        vocab_size: V.
        rows: vectors that the head maps.
    """
    chunk = max(1, CHUNK_LOGITS["cpu"] // vocab_size)
    work = _norms(rows, config.hidden) + _modulation(config, 2, rows)
    work += _products(chunk, config.hidden, vocab_size, rows // chunk)
    return work + _products(rows % chunk, config.hidden, vocab_size)


def _attention(
    config: TrunkConfig, queries: Sequence[int], keys: Sequence[int], causal: bool = False
) -> Work:
    """Equal segments are one operation, others one each; pairs without queries or keys are none."""
    kind: Literal["causal", "attention"] = "causal" if causal else "attention"
    pairs = Counter(pair for pair in zip(queries, keys, strict=True) if all(pair))
    equal = len(pairs) == 1 and pairs.total() == len(queries)
    work: Work = Counter()
    for pair, n in pairs.items():
        segments, count = (n, 1) if equal else (1, n)
        work[Op(kind, (segments, config.heads, *pair, config.hidden // config.heads))] = count
    return work


def _modulation(config: TrunkConfig, vectors: int, rows: int) -> Work:
    """The map of class vectors to shifts, scales and gates, at most once for every class."""
    if config.classes is None:
        return Counter()
    return _products(min(rows, config.classes + 1), config.hidden, vectors * config.hidden)


def _products(rows: int, inner: int, outer: int, count: int = 1) -> Work:
    """Matrix products of one shape; none of no rows."""
    return Counter({Op("gemm", (rows, inner, outer)): count} if rows and count else {})


def _norms(rows: int, hidden: int, count: int = 1) -> Work:
    """Norms of one shape; none of no rows."""
    return Counter({Op("norm", (rows, hidden)): count} if rows else {})


def _times(work: Work, times: int) -> Work:
    """The same operations several times."""
    return Counter({op: count * times for op, count in work.items()})
