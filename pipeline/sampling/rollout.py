"""Two ancestral steps of a teacher from partly hidden rows: where the targets of distillation come from."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models.denoiser import Denoiser
from pipeline.sampling.logits import draw_tokens


@torch.no_grad()
def roll_out(
    teacher: Denoiser,
    tokens: Int[Tensor, "B L"],
    hidden: Bool[Tensor, "B L"],
    time: Float[Tensor, "B"],
    dt: float,
    uniforms: Float[Tensor, "B L"],
    noise: Float[Tensor, "B L"],
    condition: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "Q H"]:
    """The teacher's vectors at all hidden positions, each from the step at which the position was revealed.

    The first step, from `time` to `time - dt`, reveals a hidden position with the posterior's probability
    `(alpha(s - dt) - alpha(s)) / (1 - alpha(s)) = dt / s` of the log-linear schedule, and only those are
    predicted and drawn. The second, from there to `time - 2 dt`, predicts all the others: those that it
    reveals and those that stay hidden take its prediction alike, so which are which is never drawn.

    Args:
        hidden: positions that the teacher does not know; it knows all others.
        time: at which the rows are hidden, at least 2 dt.
        uniforms: in [0, 1), decide what the first step reveals.
        noise: float64 in [0, 1), from which tokens are drawn.

    Shape:
        tokens, hidden, uniforms, noise: [B, L] on the host. Returns [Q, H], row by row, ascending positions.

    Source: arXiv 2410.21035, algorithm 1, on the right time grid (method.md section 5).
    """
    device = teacher.head.weight.device
    first = hidden & (uniforms < dt / time[:, None])
    state = teacher.open(len(tokens), condition)

    def extend(known: Bool[Tensor, "B L"], values: Int[Tensor, "T"]) -> None:
        positions = known.nonzero(as_tuple=True)[1].to(device)
        teacher.extend(state, values.to(device), positions, known.sum(1).tolist())

    def vectors(asked: Bool[Tensor, "B L"]) -> Float[Tensor, "q H"]:
        positions = asked.nonzero(as_tuple=True)[1].to(device)
        return teacher.hidden(state, positions, asked.sum(1).tolist())

    extend(~hidden, tokens[~hidden])
    parts = []
    for asked in (first, hidden & ~first):
        if asked.any():
            parts.append((asked, vectors(asked)))
        if asked is first and parts:
            extend(first, draw_tokens(teacher.head, parts[0][1], noise[first].to(device)).tokens)
    if not parts:
        return teacher.head.weight.new_empty(0, teacher.head.weight.shape[1])
    found = parts[0][1].new_empty(int(hidden.sum()), parts[0][1].shape[1])
    for asked, values in parts:
        found[asked[hidden].to(device)] = values
    return found
