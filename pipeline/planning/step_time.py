"""Predict the time of forward and backward passes on one GPU: a roofline of every part of the work.

Operations are counted by `models.flops`. Bytes are those of inputs and results of every kernel, once each. What is
not among the counted operations is given as passes over the tokens: one pass reads or writes a value for each token
and unit of the hidden size. Passes and launches were counted on the kernels that the blocks ask for; a test compares
them with the kernels of the code as it is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from pipeline.config.model import ModelConfig
from pipeline.config.schema import TrainConfig
from pipeline.models.flops import head_work, training_targets, training_work
from pipeline.models.head import CHUNK_LOGITS
from pipeline.planning.gpus import GPU

PRODUCTS, ATTENTION, ELEMENTWISE, HEAD, LOSS = (
    "products of blocks",
    "attention",
    "elementwise",
    "products of the head",
    "softmax and loss",
)
# Seconds of the host for a launch, an assumption: a step takes at least as long as its launches.
LAUNCH = 8e-6
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Passes:
    """Passes over tokens and launches of a block, forward and backward, beside products, attention, norms and GELU.

    Attributes:
        queries: passes over the tokens that the block transforms.
        keys: passes over the encoder outputs that it reads.
        dropout: passes of dropout, of those that the block transforms.
        classes: passes more, of the same, for modulation that depends on a class.
        launches: all kernels, with products, attention, norms and GELU.
        dropout_launches: kernels of dropout among them.
        class_launches: kernels more with classes.
    """

    queries: float
    keys: float = 0.0
    dropout: float = 0.0
    classes: float = 0.0
    launches: int = 0
    dropout_launches: int = 0
    class_launches: int = 0


# Rotation (30 passes with the parts' gradients), residual sums and their gradients (12), gradients of biases (5).
SELF = Passes(47, dropout=10, classes=38, launches=62, dropout_launches=4, class_launches=11)
# Rotation of queries (10) and keys (10) and the parts' gradients, residual sums, biases, gradient of the encoder.
CROSS = Passes(27, keys=18, dropout=10, classes=37, launches=75, dropout_launches=4, class_launches=11)
SWAP = Passes(0, keys=25, launches=65)
OUTSIDE = Passes(20, launches=56)  # embedding, position codes, final norm, head without its chunks
CHUNK_LAUNCHES = 11  # of the head, for every chunk of logits
NORM_PASSES = 5  # of norms and GELU: input and result, and in the backward pass the input and both gradients
CONVERSIONS = 10  # bytes per entry of the head's weight: conversions of gradients of head and embedding
PRODUCT_PASSES = 3  # forward, and the two products of the backward pass
ATTENTION_BACKWARD = 2.5  # forward passes: flash attention computes the scores again


@dataclass(frozen=True)
class Part:
    """Operations and bytes of a part of the work.

    Attributes:
        flops: floating-point operations, two for each multiply-add.
        moved: bytes that are read and written.
    """

    flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Part") -> "Part":
        """Add operations and bytes."""
        return Part(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, factor: float) -> "Part":
        """Repeat the part."""
        return Part(self.flops * factor, self.moved * factor)


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch asks of a GPU, forward and backward.

    Attributes:
        parts: the work by part.
        launches: number of kernels.
        half: computed in bf16.
    """

    parts: Mapping[str, Part]
    launches: float
    half: bool

    @property
    def moved(self) -> float:
        """Bytes that are read and written."""
        return sum(part.moved for part in self.parts.values())

    def seconds(self, gpu: GPU) -> dict[str, float]:
        """Predict the time of every part on a GPU.

        Args:
            gpu: its rates, and the shares of them that are reached.

        Returns:
            Seconds by part; "launches" are those by which the launches exceed all parts. The sum is the time.
        """
        peak = 1e12 * (gpu.bf16 if self.half else gpu.fp32)
        share = {ATTENTION: gpu.attention if self.half else gpu.products}
        times = {
            name: max(
                part.flops / (peak * share.get(name, gpu.products)),
                part.moved / (1e9 * gpu.bandwidth * gpu.reached),
            )
            for name, part in self.parts.items()
        }
        return times | {"launches": max(0.0, self.launches * LAUNCH - sum(times.values()))}


def count(
    model: ModelConfig, vocab_size: int, groups: Bool[np.ndarray, "B L"], train: TrainConfig
) -> Callable[[float], MicroBatch]:
    """Count what training asks of a GPU.

    Args:
        model: the architecture.
        vocab_size: V.
        groups: of many rows, for mean sizes of segments.
        train: precision and activation checkpointing.

    Returns:
        A function from the rows of a micro-batch to its work.
    """
    half, hidden, rows_counted = train.precision == "bf16", model.hidden, len(groups)
    value, again = 2 if half else FLOAT32, int(train.activation_checkpointing)
    targets = training_targets(model, groups)
    head = head_work(model, vocab_size, targets)
    # Per row, but for the weights that products read; the loss is counted below.
    products, attention, weights = Part(), Part(), 0.0
    normed = sum(op.shape[0] * op.shape[1] * n for op, n in head.items() if op.kind == "norm")
    for op, n in (training_work(model, vocab_size, groups) - head).items():
        if op.kind == "gemm":
            rows, inner, outer = op.shape
            times = n * (PRODUCT_PASSES + again)
            products += Part(op.flops, rows * (inner + outer) * value) * times
            weights += inner * outer * value * times
        elif op.kind in ("attention", "causal"):
            segments, heads, queries, keys, size = op.shape
            moved = (
                2 * segments * heads * size * (queries + keys) * value
            )  # queries and results, keys and values
            attention += Part(op.flops * (1 + ATTENTION_BACKWARD + again), moved * (3 + again)) * n
        else:
            normed += op.shape[0] * op.shape[1] * n
    passes, launches = _blocks(model, groups, targets)
    forward = 1 + again / 3  # of all passes and launches, a third is the forward pass
    elementwise = (passes * hidden + normed * NORM_PASSES) * value * forward
    logits, weight = targets * vocab_size, vocab_size * hidden
    product = sum(op.flops * n for op, n in head.items() if op.kind == "gemm") * PRODUCT_PASSES

    def micro_batch(rows: float) -> MicroBatch:
        share = rows / rows_counted
        chunks = max(1, math.ceil(share * logits / CHUNK_LOGITS["cuda"]))
        # Logits are written in float32, their gradient is read twice; so is the weight, whose gradient is float32.
        moved = share * logits * (FLOAT32 + 2 * value) + chunks * weight * (2 * value + FLOAT32)
        # Log-softmax and the exponential function; sums of the weight's gradient.
        loss = share * logits * (3 * FLOAT32 + value) + chunks * weight * 3 * FLOAT32
        parts = {
            PRODUCTS: products * share + Part(0, weights),
            ATTENTION: attention * share,
            ELEMENTWISE: Part(0, share * elementwise + CONVERSIONS * weight),
            HEAD: Part(share * product, moved),
            LOSS: Part(0, loss),
        }
        return MicroBatch(parts, launches * forward + chunks * CHUNK_LAUNCHES, half)

    return micro_batch


def _blocks(model: ModelConfig, groups: Bool[np.ndarray, "B L"], targets: int) -> tuple[float, int]:
    """Count the passes over tokens of all rows, and the launches of all blocks."""
    rows, length = groups.shape
    tokens = rows * (length + model.registers)
    if model.kind == "pgm":
        swaps = model.decoder_blocks if model.swap.every_block else 1
        kinds = [
            (SELF, model.encoder_blocks, tokens),
            (CROSS, model.decoder_blocks, targets),
            (SWAP, swaps, 0),
        ]
    else:
        tokens *= 2 if model.kind == "mdlm" and model.complementary else 1
        kinds = [(SELF, model.blocks, tokens)]
    passes, launches = 0.0, 0
    for kind, count, queries in [*kinds, (OUTSIDE, 1, tokens)]:
        of_queries, of_kind = kind.queries, kind.launches
        if model.classes is not None:
            of_queries, of_kind = of_queries + kind.classes, of_kind + kind.class_launches
        if model.dropout:
            of_queries += kind.dropout
        else:
            of_kind -= kind.dropout_launches
        passes += count * (of_queries * queries + kind.keys * tokens)
        launches += count * of_kind
    return passes, launches
