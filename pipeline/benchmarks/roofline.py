"""The most that a machine can reach: the operations of a pass timed alone, and its largest matrix product."""

import statistics
import time
import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.flops import Op, Work

CUBE = 2048
_CALLS = 3  # of one operation in one turn; the median counts


def clock(kind: str) -> Callable[[], float]:
    """Return a clock in seconds.

    Args:
        kind: "wall", or "cpu" for the CPU time of this process, which other processes slow down less.
    """
    return time.perf_counter if kind == "wall" else time.process_time


def matmul_peak(now: Callable[[], float]) -> float:
    """Measure the FLOP/s of a float32 product of two 2048-square matrices.

    Args:
        now: the clock.
    """
    a, b = torch.randn(CUBE, CUBE), torch.randn(CUBE, CUBE)
    return 2 * CUBE**3 / _median(lambda: a @ b, now)


def roofline(work: Work, backward: bool, now: Callable[[], float]) -> float:
    """Compute the seconds of all operations if each runs as fast as it does alone, with warm caches.

    Args:
        work: the operations.
        backward: include the backward pass of each.
        now: the clock.
    """
    return sum(seconds(op, backward, now) * count for op, count in work.items())


def seconds(op: Op, backward: bool, now: Callable[[], float]) -> float:
    """Measure the seconds of one operation in float32, alone.

    Args:
        op: the operation.
        backward: include its backward pass.
        now: the clock.
    """
    inputs, function = _prepared(op)
    if not backward:
        with torch.inference_mode():
            return _median(lambda: function(*inputs), now)
    inputs = tuple(x.requires_grad_() for x in inputs)
    gradient = torch.randn_like(function(*inputs))
    return _median(lambda: torch.autograd.grad(function(*inputs), inputs, gradient), now)


def _prepared(op: Op) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Random operands, and the function that takes them."""
    if op.kind == "gemm":
        rows, inner, outer = op.shape
        return (torch.randn(rows, inner), torch.randn(outer, inner)), F.linear
    if op.kind == "gelu":
        return (torch.randn(op.shape),), lambda x: F.gelu(x, approximate="tanh")
    if op.kind == "norm":
        width = op.shape[-1:]
        operands = torch.randn(op.shape), torch.ones(width), torch.zeros(width)
        return operands, lambda x, weight, bias: F.layer_norm(x, width, weight, bias)
    segments, heads, queries, keys, size = op.shape
    q, k, v = (torch.randn(segments, heads, length, size) for length in (queries, keys, keys))
    causal = op.kind == "causal"
    return (q, k, v), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _median(run: Callable[[], object], now: Callable[[], float]) -> float:
    """Median seconds of a few calls after one that warms up."""
    run()
    return statistics.median(timeit.repeat(run, timer=now, repeat=_CALLS, number=1))
