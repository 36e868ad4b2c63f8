"""Divergence between the distributions of a student and a teacher, computed in chunks of rows."""

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
    """The teacher's predictions at a batch's targets.

    Attributes:
        hidden: [Q, H] the teacher's vectors, in the order of `Batch.target_index`.
        head: maps a chunk of them to float32 logits.
        divergence: the loss at every position.
    """

    hidden: Float[Tensor, "Q H_teacher"]
    head: Callable[[Tensor], Tensor]
    divergence: Divergence


def divergence(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], kind: Divergence
) -> Float[Tensor, "T"]:
    """Compute the divergence between two distributions in every row.

    Args:
        student: logits.
        teacher: logits; gradients reach both arguments.
        kind: "reverse_kl" is KL(student || teacher) and "forward_kl" is KL(teacher || student), in nats;
            "total_variation" is half the sum of absolute differences; "mse" is the mean over V of squared
            differences of log-probabilities.

    Returns:
        [T].

    Source:
        arXiv 2410.21035, section 4.
    """
    student_log, teacher_log = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "reverse_kl":
        return (student_log.exp() * (student_log - teacher_log)).sum(-1)
    if kind == "forward_kl":
        return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    if kind == "total_variation":
        return (student_log.exp() - teacher_log.exp()).abs().sum(-1) / 2
    return (student_log - teacher_log).square().mean(-1)


def chunked_divergence(
    hidden: Float[Tensor, "T H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"],
    targets: DistillTargets,
    chunk: int,
) -> Float[Tensor, "T"]:
    """Compute `divergence` of a linear head's logits from the teacher's, a chunk of rows at a time.

    The backward pass computes every chunk's logits again, so memory grows with the chunk and not with the rows.
    Values and gradients are those of the direct computation, in the tensors' own precision.

    Args:
        hidden: the student's vectors.
        weight: of the student's head.
        bias: of the student's head.
        targets: the teacher's vectors for the same rows, its head and the kind of divergence.
        chunk: rows whose logits are held together.

    Returns:
        [T].
    """
    result: Tensor = _ChunkedDivergence.apply(hidden, weight, bias, targets, chunk)
    return result


class _ChunkedDivergence(torch.autograd.Function):
    """`chunked_divergence` with a backward pass that recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: DistillTargets, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.targets, ctx.chunk = targets, chunk
        rows = zip(hidden.split(chunk), targets.hidden.split(chunk), strict=True)
        return torch.cat(
            [divergence(F.linear(x, weight, bias), targets.head(y), targets.divergence) for x, y in rows]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        targets = ctx.targets
        hidden_grad, weight_grad, bias_grad = (torch.zeros_like(t) for t in (hidden, weight, bias))
        parts = (x.split(ctx.chunk) for x in (hidden, hidden_grad, targets.hidden, grads[0]))
        for x, x_grad, y, upstream in zip(*parts, strict=True):
            with torch.no_grad():
                logits, teacher_logits = F.linear(x, weight, bias), targets.head(y)
            with torch.enable_grad():
                value = divergence(logits.requires_grad_(), teacher_logits, targets.divergence)
                (logits_grad,) = torch.autograd.grad(value, logits, upstream)
            x_grad.copy_(logits_grad @ weight)
            weight_grad.addmm_(logits_grad.T, x)
            bias_grad += logits_grad.sum(0)
        return hidden_grad, weight_grad, bias_grad, None, None
