"""What a machine can do: the operations of a pass timed alone, and its largest matrix product."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.flops import Op, Work

CUBE = 2048
_CALLS = 3  # of one operation in one turn, of which the median counts


def clock(kind: str) -> Callable[[], float]:
    """Seconds by the wall, or of this process's CPU, which other processes slow down less."""
    return time.perf_counter if kind == "wall" else time.process_time


def matmul_peak(now: Callable[[], float]) -> float:
    """Floating point operations a second of a float32 product of two 2048-square matrices."""
    a, b = torch.randn(CUBE, CUBE), torch.randn(CUBE, CUBE)
    return 2 * CUBE**3 / _median(lambda: a @ b, now)


def roofline(work: Work, backward: bool, now: Callable[[], float]) -> float:
    """Seconds of all operations if each ran as fast as it does alone, with warm caches and nothing around it.

    Args:
        backward: each with its backward pass.
    """
    return sum(seconds(op, backward, now) * count for op, count in work.items())


def seconds(op: Op, backward: bool, now: Callable[[], float]) -> float:
    """Seconds of one operation in float32, alone."""
    inputs, function = _prepared(op)
    if not backward:
        with torch.inference_mode():
            return _median(lambda: function(*inputs), now)
    inputs = tuple(x.requires_grad_() for x in inputs)
    gradient = torch.randn_like(function(*inputs))
    return _median(lambda: torch.autograd.grad(function(*inputs), inputs, gradient), now)


def _prepared(op: Op) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Random operands, and the call."""
    if op.kind == "gemm":
        rows, inner, outer = op.shape
        return (torch.randn(rows, inner), torch.randn(outer, inner)), F.linear
    if op.kind == "gelu":
        return (torch.randn(op.shape),), lambda x: F.gelu(x, approximate="tanh")
    if op.kind == "norm":
        width = op.shape[-1:]
        return (torch.randn(op.shape), torch.ones(width), torch.zeros(width)), (
            lambda x, weight, bias: F.layer_norm(x, width, weight, bias)
        )
    segments, heads, queries, keys, size = op.shape
    q, k, v = (torch.randn(segments, heads, length, size) for length in (queries, keys, keys))
    causal = op.kind == "causal"
    return (q, k, v), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _median(run: Callable[[], object], now: Callable[[], float]) -> float:
    """Of a few calls behind one that warms up."""
    run()
    taken = []
    for _ in range(_CALLS):
        began = now()
        run()
        taken.append(now() - began)
    return sorted(taken)[_CALLS // 2]
