"""The most that a machine can reach: the operations of a pass timed alone, a large matrix product, and a copy."""

import statistics
import time
import timeit
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.attention import Segments, attend
from pipeline.models.flops import Op, Work

_CALLS = 3  # of one operation in one turn; the median counts


@dataclass(frozen=True)
class Place:
    """Where something is measured.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def cube(self) -> int:
        """Rows of the square matrices whose product counts as the peak."""
        return 8192 if self.device.type == "cuda" else 2048

    def randn(self, *shape: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


CPU = Place(torch.device("cpu"))


def clock(kind: str, device: torch.device = CPU.device) -> Callable[[], float]:
    """Return a clock in seconds; on a GPU it waits until all work is done.

    Args:
        kind: "wall", or "cpu" for the CPU time of this process, which other processes slow down less.
        device: whose work is timed.
    """
    if device.type != "cuda":
        return time.perf_counter if kind == "wall" else time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def matmul_peak(now: Callable[[], float], place: Place = CPU) -> float:
    """Measure the FLOP/s of a product of two large square matrices.

    Args:
        now: the clock.
        place: device and precision.
    """
    a, b = (place.randn(place.cube, place.cube) for _ in range(2))
    return 2 * place.cube**3 / _median(lambda: a @ b, now)


def copy_rate(now: Callable[[], float], place: Place = CPU) -> float:
    """Measure the bytes a second that are read and written in a copy of 128 MiB (on a GPU 1 GiB).

    Args:
        now: the clock.
        place: device and precision.
    """
    source = torch.ones(
        2**30 if place.device.type == "cuda" else 2**27, dtype=torch.uint8, device=place.device
    )
    target = torch.empty_like(source)
    return 2 * len(source) / _median(lambda: target.copy_(source), now)


def roofline(work: Work, backward: bool, now: Callable[[], float], place: Place = CPU) -> float:
    """Compute the seconds of all operations if each runs as fast as it does alone, with warm caches.

    Args:
        work: the operations.
        backward: include the backward pass of each.
        now: the clock.
        place: device and precision.
    """
    if place.device.type != "cuda":
        return sum(seconds(op, backward, now, place) * count for op, count in work.items())
    # A GPU computes the attention of all segments in one kernel, alone none of them would fill it.
    attention: defaultdict[tuple[str, int, int, int], list[Op]] = defaultdict(list)
    total = 0.0
    for op, count in work.items():
        if op.kind in ("attention", "causal"):
            attention[op.kind, op.shape[1], op.shape[4], count].append(op)
        else:
            total += seconds(op, backward, now, place) * count
    for (_, _, _, count), ops in attention.items():
        total += _timed(*_packed_attention(ops, place), backward, now) * count
    return total


def seconds(op: Op, backward: bool, now: Callable[[], float], place: Place = CPU) -> float:
    """Measure the seconds of one operation, alone.

    Args:
        op: the operation.
        backward: include its backward pass.
        now: the clock.
        place: device and precision.
    """
    return _timed(*_prepared(op, place), backward, now)


def _timed(
    inputs: tuple[Tensor, ...], function: Callable[..., Tensor], backward: bool, now: Callable[[], float]
) -> float:
    """Measure the seconds of a function, or of it and its backward pass."""
    if not backward:
        with torch.inference_mode():
            return _median(lambda: function(*inputs), now)
    inputs = tuple(x.requires_grad_() for x in inputs)
    gradient = torch.randn_like(function(*inputs))
    return _median(lambda: torch.autograd.grad(function(*inputs), inputs, gradient), now)


def _prepared(op: Op, place: Place) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Random operands, and the function that takes them."""
    if op.kind == "gemm":
        rows, inner, outer = op.shape
        return (place.randn(rows, inner), place.randn(outer, inner)), F.linear
    if op.kind == "gelu":
        return (place.randn(*op.shape),), lambda x: F.gelu(x, approximate="tanh")
    if op.kind == "norm":
        width = op.shape[-1:]
        operands = place.randn(*op.shape), place.randn(*width), place.randn(*width)
        return operands, lambda x, weight, bias: F.layer_norm(x, width, weight, bias)
    segments, heads, queries, keys, size = op.shape
    q, k, v = (place.randn(segments, heads, length, size) for length in (queries, keys, keys))
    causal = op.kind == "causal"
    return (q, k, v), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _packed_attention(ops: list[Op], place: Place) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Random operands of all segments together, and the function that takes them."""
    shapes = [op.shape for op in ops for _ in range(op.shape[0])]
    queries, keys = (Segments([shape[i] for shape in shapes], place.device) for i in (2, 3))
    heads, size, causal = shapes[0][1], shapes[0][4], ops[0].kind == "causal"
    q, k, v = (place.randn(segments.total, heads, size) for segments in (queries, keys, keys))
    return (q, k, v), lambda q, k, v: attend(q, k, v, queries, keys, causal)


def _median(run: Callable[[], object], now: Callable[[], float]) -> float:
    """Median seconds of a few calls after one that warms up."""
    run()
    return statistics.median(timeit.repeat(run, timer=now, repeat=_CALLS, number=1))
