"""The one sampling loop: pick positions, predict only those, draw, append."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.denoiser import Denoiser
from pipeline.sampling import orders
from pipeline.sampling.logits import Drawn, Filters, draw_ids, draw_tokens
from pipeline.sampling.orders import Order

Progress = Callable[[int, int], None]  # (steps done, steps)


@torch.inference_mode()
def sample(
    model: Denoiser,
    num_samples: int,
    steps: int,
    seed: int,
    order: str | Order = "uniform",
    bos: int | None = None,
    condition: Int[Tensor, "B"] | None = None,
    first: int | Sequence[int] = 0,
    progress: Progress | None = None,
    filters: Filters = Filters(),
    known: tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]] | None = None,
    refresh_every: int = 1,
    guidance: float = 0.0,
    revealed_at: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw rows of tokens: from nothing, from BOS, or around any given tokens.

    Sample i of the call depends on (seed, first + i) only, or on (seed, first[i]): its order and its noise are the
    same in any batch.

    Args:
        model: in eval mode.
        steps: forward passes at most; the positions are spread over them.
        order: a name with its default settings, or an `Order`.
        bos: id that stands known at position 0.
        condition: [B] class labels.
        first: index of the first sample, for batches of a longer list; or an index for every sample.
        progress: called with (steps done, steps) after every step.
        known: tokens and where they are given; all other positions are drawn.
        refresh_every: encode known tokens anew at every so many steps, and between them only new ones (PGM;
            1 is exact, more is approximate).
        guidance: w of classifier-free guidance at the last step, reached linearly from 0 at the first; needs
            `condition`. Every row is then in the model twice, with its class and without, in the same calls.
        revealed_at: filled with the step at which every position was drawn, from 1; 0 for given ones.

    Shape:
        Returns [num_samples, L] ids, BOS included.

    Raises:
        ConfigError: unknown order, or more steps than positions.
        CapabilityError: class labels that the model has no vectors for, or an order that it cannot follow.

    Source: method.md section 4; arXiv 2207.12598 (guidance).
    """
    order = Order(order) if isinstance(order, str) else order
    device, length = model.head.weight.device, model.length
    tokens = torch.zeros(num_samples, length, dtype=torch.int64)
    given = torch.zeros(num_samples, length, dtype=torch.bool)
    if known is not None:
        given = given | known[1].cpu()
        tokens = torch.where(given, known[0].cpu(), tokens)
    if bos is not None:
        tokens[:, 0], given[:, 0] = bos, True
    unknown = [np.flatnonzero(row) for row in (~given).numpy()]
    orders.check(order, steps, max(map(len, unknown), default=0), length - (bos is not None))
    index = range(first, first + num_samples) if isinstance(first, int) else first
    generators = [np.random.default_rng([seed, i]) for _, i in zip(range(num_samples), index, strict=True)]

    held = _Rows(model, num_samples, condition, refresh_every, guidance, filters)
    if given.any():
        rows, positions = (index.to(device) for index in given.nonzero(as_tuple=True))
        tokens = tokens.to(device)
        held.extend(tokens[rows, positions], positions, given.sum(1).tolist())
    tokens = tokens.to(device)
    if order.name in orders.PLANNED:
        plans = [
            orders.plan(order, places, steps, rng, bos is not None)
            for places, rng in zip(unknown, generators, strict=True)
        ]
        when = _follow(held, tokens, plans, generators, progress)
    else:
        when = _choose(held, tokens, ~given.to(device), steps, order, generators, progress)
    if revealed_at is not None:
        revealed_at.copy_(when)
    return tokens


class _Rows:
    """The rows being sampled as the model holds them: once, or under guidance with class and without."""

    def __init__(
        self,
        model: Denoiser,
        count: int,
        condition: Int[Tensor, "B"] | None,
        refresh_every: int,
        guidance: float,
        filters: Filters,
    ):
        self._model, self._filters, self._guidance = model, filters, guidance
        if guidance:
            if condition is None or model.classes is None:
                raise ConfigError(
                    f"guidance: {guidance} without class labels; expected labels, or guidance 0"
                )
            none = torch.full_like(condition, model.classes.num_embeddings - 1)
            condition = torch.cat([condition, none])
        self._copies = 2 if guidance else 1
        self._state = model.open(self._copies * count, condition, model.length, refresh_every)

    def extend(self, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]) -> None:
        """Make packed tokens known, `lengths[b]` of them in row b."""
        copies = self._copies
        self._model.extend(
            self._state, tokens.repeat(copies), positions.repeat(copies), list(lengths) * copies
        )

    def draw(
        self,
        positions: Int[Tensor, "Q"],
        lengths: Sequence[int],
        noise: Float[Tensor, "Q"],
        progress: float,
    ) -> Drawn:
        """Tokens at packed positions, after a share `progress` of the steps, and how sure the model is."""
        hidden, other = self._hidden(positions, lengths)
        return draw_tokens(self._model.head, hidden, noise, self._filters, other, progress * self._guidance)

    def draw_ids(
        self,
        positions: Int[Tensor, "Q"],
        lengths: Sequence[int],
        noise: Float[Tensor, "Q"],
        progress: float,
    ) -> Int[Tensor, "Q"]:
        """The tokens of `draw` alone."""
        hidden, other = self._hidden(positions, lengths)
        return draw_ids(self._model.head, hidden, noise, self._filters, other, progress * self._guidance)

    def _hidden(
        self, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> tuple[Float[Tensor, "Q H"], Float[Tensor, "Q H"] | None]:
        """Vectors with class, and under guidance those without."""
        copies = self._copies
        hidden = self._model.hidden(self._state, positions.repeat(copies), list(lengths) * copies)
        own, *without = hidden.chunk(copies)
        return own, without[0] if without else None


def _follow(
    rows: _Rows,
    tokens: Int[Tensor, "B L"],
    plans: list[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "steps"]]],
    generators: list[np.random.Generator],
    progress: Progress | None,
) -> Int[Tensor, "B L"]:
    """Reveal by plans that were made before the first step; ragged, and without a loop over rows."""
    batch, length = tokens.shape
    noise = np.stack([rng.random(length) for rng in generators]).ravel()
    counts = np.stack([count for _, count in plans], axis=1)  # [steps, B]
    # All rows' positions, sorted by step and in it by row: every step takes the next few.
    when = np.concatenate([np.repeat(np.arange(len(count)), count) for _, count in plans])
    by_step = when.argsort(kind="stable")
    position = np.concatenate([sequence for sequence, _ in plans])[by_step]
    cell = np.repeat(np.arange(batch), counts.sum(0))[by_step] * length + position
    revealed_at = np.zeros(batch * length, dtype=np.int64)
    revealed_at[cell] = when[by_step] + 1
    places = (torch.from_numpy(x).to(tokens.device) for x in (position, cell, noise[cell]))
    parts = zip(*(x.split(counts.sum(1).tolist()) for x in places), strict=True)
    for step, (lengths, (position, cell, uniform)) in enumerate(zip(counts.tolist(), parts, strict=True)):
        if any(lengths):  # a step in which no row reveals anything is not run
            done = step / max(len(counts) - 1, 1)
            drawn = rows.draw_ids(position, lengths, uniform, done)
            tokens.view(-1)[cell] = drawn
            rows.extend(drawn, position, lengths)
        if progress is not None:
            progress(step + 1, len(counts))
    return torch.from_numpy(revealed_at).view(batch, length)


def _choose(
    rows: _Rows,
    tokens: Int[Tensor, "B L"],
    unknown: Bool[Tensor, "B L"],
    steps: int,
    order: Order,
    generators: list[np.random.Generator],
    progress: Progress | None,
) -> Int[Tensor, "B L"]:
    """Predict all unknown positions at every step and keep some of them."""
    schedule = orders.schedule_of(order)
    left = unknown.sum(1).tolist()
    counts = [orders.step_counts(n, steps, schedule) for n in left]
    revealed_at = torch.zeros_like(tokens)
    for step in range(steps):
        if any(left):
            row, position = unknown.nonzero(as_tuple=True)
            noise = _noise(generators, unknown)
            drawn = rows.draw(position, left, noise[0][row, position], step / max(steps - 1, 1))
            canvas = _on_canvas(drawn, unknown)
            # Confidence keeps to the schedule; entropy may run ahead of it, but must end with it.
            done = [int(count[: step + 1].sum()) for count in counts]
            least = [max(0, d - int(c.sum()) + n) for d, c, n in zip(done, counts, left, strict=True)]
            keep = orders.choose(
                order, unknown, canvas.log_prob, canvas.entropy, noise[1], least, step / steps
            )
            kept = keep.sum(1).tolist()
            tokens[keep] = canvas.tokens[keep]
            revealed_at[keep] = step + 1
            rows.extend(tokens[keep], keep.nonzero(as_tuple=True)[1], kept)
            unknown = unknown & ~keep
            left = [n - k for n, k in zip(left, kept, strict=True)]
        if progress is not None:
            progress(step + 1, steps)
    return revealed_at


def _noise(
    generators: list[np.random.Generator], like: Tensor
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """A step's uniforms and Gumbel noise, each row's from its own generator."""
    drawn = np.stack([rng.random((2, like.shape[1])) for rng in generators])  # [B, 2, L]
    uniform, other = torch.from_numpy(drawn).to(like.device).unbind(1)
    return uniform, -(-other.clamp(min=1e-300).log()).log()


def _on_canvas(drawn: Drawn, unknown: Bool[Tensor, "B L"]) -> Drawn:
    """Packed values back at their positions, 0 elsewhere."""
    return Drawn(*(torch.zeros_like(unknown, dtype=x.dtype).masked_scatter(unknown, x) for x in drawn))


def sample_long(
    model: Denoiser,
    num_samples: int,
    length: int,
    stride: int,
    steps: int,
    seed: int,
    order: str | Order = "uniform",
    bos: int | None = None,
    condition: Int[Tensor, "B"] | None = None,
    filters: Filters = Filters(),
    known: tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]] | None = None,
    stop: int | None = None,
) -> Int[Tensor, "B length"]:
    """Rows of any length, window by window: the end of what is there is the next window's given beginning.

    Args:
        length: tokens of a row.
        stride: new tokens of every window after the first.
        steps: of a full window; a window of `stride` new tokens takes its share.
        known: given tokens of the first window.
        stop: an id at which a row ends; it and what would follow are filled with it.

    Raises:
        ConfigError: a stride that leaves no context, or a length below the model's.
    """
    window, start = model.length, int(bos is not None)
    if not 1 <= stride < window - start:
        raise ConfigError(f"stride: {stride}; expected 1 to {window - start - 1} for windows of {window}")
    if length < window:
        raise ConfigError(f"length: {length}; expected at least the model's {window}")
    given = int(known[1].any(0).nonzero().max()) + 1 if known is not None and known[1].any() else start
    rows = sample(model, num_samples, steps, seed, order, bos, condition, 0, None, filters, known)
    index = 1
    while rows.shape[1] < length and not _ended(rows, stop, given).all():
        new = min(stride, length - rows.shape[1])
        context = rows[:, rows.shape[1] - (window - start - new) :]
        tokens = torch.zeros(num_samples, window, dtype=torch.int64, device=rows.device)
        tokens[:, start : start + context.shape[1]] = context
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, start : start + context.shape[1]] = True
        share = max(1, min(new, round(steps * new / (window - start))))
        share = new if model.left_to_right else share
        # Other windows, other noise: the window's index is part of the seed.
        drawn = sample(
            model,
            num_samples,
            share,
            _mixed(seed, index),
            order,
            bos,
            condition,
            0,
            None,
            filters,
            (tokens, mask),
        )
        rows = torch.cat([rows, drawn[:, window - new :]], dim=1)
        index += 1
    if stop is None:
        return rows
    rows = torch.where(_ended(rows, stop, given, inclusive=True), stop, rows)
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=stop)


def _ended(
    rows: Int[Tensor, "B T"], stop: int | None, given: int, inclusive: bool = False
) -> Bool[Tensor, "B T"] | Bool[Tensor, "B"]:
    """Which rows hold `stop` behind the given tokens; with `inclusive`, at which positions it has come."""
    if stop is None:
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    hits = rows.eq(stop)
    hits[:, :given] = False
    return hits.cummax(1).values if inclusive else hits.any(1)


def _mixed(seed: int, index: int) -> int:
    """A seed for window `index` that no other (seed, index) shares."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def ragged_known(
    prompts: Sequence[dict[int, int]], length: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """`{position: token}` of every row as tokens and mask.

    Raises:
        ConfigError: a position outside the row.
    """
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for position, token in prompt.items():
            if not 0 <= position < length:
                raise ConfigError(
                    f"known: position {position}; expected 0 to {length - 1} for rows of {length}"
                )
            tokens[row, position], mask[row, position] = token, True
    return tokens, mask
