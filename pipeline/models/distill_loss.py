"""Divergence of a student's distributions from a teacher's, never holding more than a chunk of either."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "total_variation", "mse"]


@dataclass(frozen=True)
class DistillTargets:
    """What a teacher says about a batch's targets.

    Attributes:
        hidden: [Q, H] the teacher's vectors, in the order of `Batch.target_index`.
        head: turns a chunk of them into float32 logits.
        divergence: how far from them the student is, by position.
    """

    hidden: Float[Tensor, "Q H_teacher"]
    head: Callable[[Tensor], Tensor]
    divergence: Divergence


def divergence(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], kind: Divergence
) -> Float[Tensor, "T"]:
    """Divergence of two sets of distributions, given as logits; gradients reach whichever asks for them.

    reverse_kl: KL(student || teacher), nats. forward_kl: KL(teacher || student), nats. total_variation: half
    the sum of absolute differences. mse: mean over V of squared differences of log-probabilities.

    Source: arXiv 2410.21035, section 4.
    """
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "reverse_kl":
        return (ours.exp() * (ours - theirs)).sum(-1)
    if kind == "forward_kl":
        return (theirs.exp() * (theirs - ours)).sum(-1)
    if kind == "total_variation":
        return (ours.exp() - theirs.exp()).abs().sum(-1) / 2
    return (ours - theirs).square().mean(-1)


def matched(
    hidden: Float[Tensor, "T H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"],
    teaching: DistillTargets,
    chunk: int,
) -> Float[Tensor, "T"]:
    """`divergence` of a linear head's rows from the teacher's, `chunk` rows at a time in both passes.

    The backward pass makes every chunk's logits again, so memory grows with the chunk and not with the rows;
    values and gradients are those of the direct computation. All in the tensors' own precision.
    """
    result: Tensor = _Matched.apply(hidden, weight, bias, teaching, chunk)
    return result


class _Matched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, teaching: DistillTargets, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.teaching, ctx.chunk = teaching, chunk
        rows = zip(hidden.split(chunk), teaching.hidden.split(chunk), strict=True)
        values = [
            divergence(F.linear(x, weight, bias), teaching.head(y), teaching.divergence) for x, y in rows
        ]
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        teaching, chunk = ctx.teaching, ctx.chunk
        to_hidden, to_weight, to_bias = (torch.zeros_like(t) for t in (hidden, weight, bias))
        parts = (x.split(chunk) for x in (hidden, to_hidden, teaching.hidden, grads[0]))
        for x, to_x, y, upstream in zip(*parts, strict=True):
            with torch.no_grad():
                logits, theirs = F.linear(x, weight, bias), teaching.head(y)
            with torch.enable_grad():
                value = divergence(logits.requires_grad_(), theirs, teaching.divergence)
                (to_logits,) = torch.autograd.grad(value, logits, upstream)
            to_x.copy_(to_logits @ weight)
            to_weight.addmm_(to_logits.T, x)
            to_bias += to_logits.sum(0)
        return to_hidden, to_weight, to_bias, None, None
