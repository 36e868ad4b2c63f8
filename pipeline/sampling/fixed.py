"""Steps of fixed shape, which can be compiled and captured as CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipeline.compiling import compiled
from pipeline.errors import CapabilityError
from pipeline.models.batch import NewTokens, State
from pipeline.models.denoiser import CachedDenoiser, Denoiser
from pipeline.models.layers import ClassVectors
from pipeline.sampling.logits import Filters, Guidance, draw_tokens
from pipeline.sampling.orders import PLANNED, Order

DEVICES = ("cuda",)  # on a CPU, attention over whole caches would cost more than it saves

# Shapes that one process compiles the step for: a few widths of every model and batch.
_SHAPES = 64


class Plan(NamedTuple):
    """What every step reveals. The tokens of all rows are sorted by step, then by row, then by their order.

    Attributes:
        counts: tokens that each step reveals in every row.
        rows: row of every token.
        positions: position of every token.
        noise: uniform number that every token is drawn with.
    """

    counts: Int[np.ndarray, "steps B"]
    rows: Int[np.ndarray, "U"]
    positions: Int[np.ndarray, "U"]
    noise: Float[np.ndarray, "U"]


def check(model: Denoiser, order: Order) -> None:
    """Check that sampling has steps of fixed shape.

    Args:
        model: the model.
        order: the order of revelation.

    Raises:
        CapabilityError: a model whose stored outputs change or are not in caches, or an order that is not
            planned.
    """
    if not (isinstance(model, CachedDenoiser) and model.fixed_steps):
        raise CapabilityError(
            f"compile: True for {type(model).__name__}; expected False, since only AR, and a PGM with a causal "
            "encoder and without pooled swaps, have steps of fixed shape"
        )
    if order.name not in PLANNED:
        raise CapabilityError(f"compile: True in order {order.name!r}; expected one of {', '.join(PLANNED)}")


def widths(needed: Sequence[int]) -> list[int]:
    """Choose how many tokens of a row each step computes, so that there are few different numbers.

    Args:
        needed: tokens that each step needs at least.

    Returns:
        For each step at least what it needs and less than twice that.
    """
    chosen: list[int] = []
    for width in sorted({*needed}, reverse=True):
        if width and (not chosen or 2 * width <= chosen[-1]):
            chosen.append(width)
    return [min((width for width in chosen if width >= need), default=0) if need else 0 for need in needed]


def room(length: int) -> int:
    """Compute the known tokens that a state must have room for.

    Args:
        length: L.

    Returns:
        One more than L, rounded up to a multiple of 8, as attention kernels with a mask need it.
    """
    return -(-(length + 1) // 8) * 8


def follow(
    model: CachedDenoiser,
    state: State,
    plan: Plan,
    filters: Filters,
    guidance: Float[Tensor, "steps"] | None,
) -> Iterator[tuple[Int[Tensor, "T"], Int[Tensor, "T"]]]:
    """Draw what a plan says, each step in one compiled call; on CUDA it is a CUDA graph.

    Args:
        model: in eval mode, with `fixed_steps`.
        state: rows with room for `room(L)` tokens; with guidance, once with their class and then without.
        plan: of the rows.
        filters: changes to the distributions.
        guidance: weight at every step, on the model's device; None: no guidance.

    Yields:
        For each step the cells, `row * L + position`, and the tokens drawn there. Cell B L stands for none.
    """
    (steps, rows), device, copies = plan.counts.shape, state.tokens.device, 1 if guidance is None else 2
    width = widths(plan.counts.max(1, initial=0).tolist())
    new = model.encode(state, next(filter(None, width), 1))
    sizes = plan.counts.ravel()  # of the groups of tokens that a row reveals in a step
    group = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]
    base = np.array(state.memory.done).reshape(copies, rows)[:1]
    ends = base + plan.counts.cumsum(0)
    before = (ends - plan.counts).ravel()[group] + within

    def table(values: Shaped[np.ndarray, "U"], fill: int) -> Shaped[Tensor, "steps B widest"]:
        """Spread values over steps and rows on the device, padded with `fill`."""
        padded = np.full((steps * rows, max(width, default=0)), fill, dtype=values.dtype)
        padded[group, within] = values
        return torch.from_numpy(padded.reshape(steps, rows, -1)).to(device)

    cells = table(plan.rows * model.length + plan.positions, rows * model.length)
    positions, slots, noise = table(plan.positions, 0), table(before, -1), table(plan.noise, 0)
    filled = torch.from_numpy(ends).to(device)
    vectors = model.class_vectors(state.condition, copies * rows)
    call = compiled_step(state.memory)
    for step, wide in enumerate(width):
        slot, uniform, cell = (x[step, :, :wide].contiguous() for x in (slots, noise, cells))
        drawn = cell[:, :0]
        if wide:
            places = positions[step, :, :wide].repeat(copies, 1)
            weight = None if guidance is None else guidance[step]
            drawn = call(model, state.memory, vectors, new, places, uniform, filters, weight)
            ids, slot, ends = drawn.repeat(copies, 1), slot.repeat(copies, 1), filled[step].repeat(copies)
            new = NewTokens(ids, places, slot, ends)
        yield cell.flatten(), drawn.flatten()


def _step(
    model: CachedDenoiser,
    memory: Any,
    vectors: ClassVectors,
    new: NewTokens,
    positions: Int[Tensor, "rows width"],
    noise: Float[Tensor, "samples width"],
    filters: Filters,
    weight: Float[Tensor, ""] | None,
) -> Int[Tensor, "samples width"]:
    """Add tokens to what the model keeps, and draw the next ones."""
    hidden, guidance = model.hidden_fixed(memory, vectors, new, positions), None
    if weight is not None:
        hidden, unconditional = hidden.chunk(2)
        guidance = Guidance(unconditional, weight)
    own = None if model.head.modalities is None else positions[: len(noise)].flatten()
    return draw_tokens(model.head, hidden, noise.flatten(), filters, guidance, places=own).tokens.view_as(
        noise
    )


def compiled_step(memory: Any) -> Callable[..., Int[Tensor, "samples width"]]:
    """Make the step that is compiled when it is first called with new shapes.

    Args:
        memory: what the model keeps; a CUDA graph reads and writes it in place.

    Returns:
        A function of the arguments of `_step`.
    """
    for tensor in _tensors(memory):
        torch._dynamo.mark_static_address(tensor)

    def step(*inputs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return _compiled(*inputs).clone()  # the next call of a CUDA graph overwrites its output

    return step


_compiled = compiled(_step, _SHAPES, mode="reduce-overhead")  # one for all models


def _tensors(kept: Any) -> Iterator[Tensor]:
    """All tensors in nested dataclasses and tuples."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, list | tuple):
        for part in kept:
            yield from _tensors(part)
    elif is_dataclass(kept):
        yield from _tensors([*vars(kept).values()])
