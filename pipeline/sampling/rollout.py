"""Two ancestral steps of a teacher from partly hidden rows: the source of the targets of distillation."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.diffusion.partition import by_rank
from pipeline.models.batch import State
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.logits import draw_tokens


@torch.no_grad()
def roll_out(
    teacher: Denoiser,
    tokens: Int[Tensor, "B L"],
    hidden: Bool[Tensor, "B L"],
    *,
    time: Float[Tensor, "B"],
    dt: float,
    noise: Float[Tensor, "B 2 L"],
    order: Int[Tensor, "B L"] | None = None,
    state: State | None = None,
) -> Float[Tensor, "Q H"]:
    """Compute the teacher's vectors at all hidden positions, each from the step that reveals the position.

    The first step, from `time` to `time - dt`, reveals a hidden position with the posterior's probability
    `(alpha(s - dt) - alpha(s)) / (1 - alpha(s)) = dt / s` of the log-linear schedule, and only those are predicted
    and drawn. The second, from there to `time - 2 dt`, predicts all others: those that it reveals and those that
    stay hidden use its prediction alike, so which is which is never drawn.

    Args:
        teacher: in eval mode.
        tokens: ids.
        hidden: positions that the teacher does not know; it knows all others but padding.
        time: at which the rows are hidden, at least 2 dt.
        dt: length of a step.
        noise: float64 uniforms in [0, 1): the first of each row decide what the first step reveals, from the second
            tokens are drawn.
        order: ranks by which the tokens of a row are revealed; None: ascending positions.
        state: of the teacher, opened with classes and lengths of the rows, without known tokens; None: they have
            neither.

    Shape:
        tokens, hidden, order: [B, L]; time: [B]; noise: [B, 2, L]; all on the host.

    Returns:
        [Q, H], row by row in ascending positions.

    Source:
        arXiv 2410.21035, algorithm 1, on the correct time grid (docs/method.md section 5).
    """
    device = teacher.head.weight.device
    first = hidden & (noise[:, 0] < dt / time[:, None])
    state = state or teacher.open(len(tokens))
    known = ~hidden
    if state.extents is not None:
        known &= torch.arange(tokens.shape[1]) < torch.tensor(state.extents)[:, None]

    def locate(where: Bool[Tensor, "B L"]) -> tuple[Int[Tensor, "T"], list[int]]:
        return where.nonzero(as_tuple=True)[1].to(device, non_blocking=True), where.sum(1).tolist()

    def reveal(where: Bool[Tensor, "B L"]) -> None:
        index = by_rank(where, order).to(device, non_blocking=True)
        teacher.extend(state, canvas.view(-1)[index], index % where.shape[1], where.sum(1).tolist())

    canvas = tokens.to(device, copy=True, non_blocking=True)
    reveal(known)
    parts, rest = [], hidden & ~first
    if first.any():
        places, counts = locate(first)
        parts.append(teacher.hidden(state, places, counts))
        uniforms = noise[:, 1][first].to(device, non_blocking=True)
        drawn = draw_tokens(teacher.head, parts[0], uniforms, places=places).tokens
        canvas.view(-1)[by_rank(first, None).to(device, non_blocking=True)] = drawn
        reveal(first)
    if rest.any():
        parts.append(teacher.hidden(state, *locate(rest)))
    if not parts:
        return teacher.head.weight.new_empty(0, teacher.head.weight.shape[1])
    # The parts hold the first step's positions, then the others: sort them back by row and position.
    by_step = first[hidden].long().argsort(descending=True, stable=True)
    return torch.cat(parts)[by_step.argsort().to(device, non_blocking=True)]
