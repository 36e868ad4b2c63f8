"""The one sampling loop: choose positions, predict only those, draw their tokens, add them to what is known."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import arguments
from pipeline.config.evaluation import LARGEST_SETTING, SamplingConfig
from pipeline.diffusion.partition import by_rank, draw_order
from pipeline.errors import CapabilityError, ConfigError
from pipeline.models.denoiser import CachedDenoiser, Denoiser
from pipeline.sampling import fixed, orders
from pipeline.sampling.logits import Drawn, Filters, Guidance, draw_tokens
from pipeline.sampling.orders import Order
from pipeline.seeds import mix_seed

MOST_SAMPLES = 10**6  # of one call, whose rows are in memory together
Progress = Callable[[int, int], None]  # (steps done, steps)
Known = dict[int, int] | list[dict[int, int]] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SamplingRequest:
    """What to sample.

    Attributes:
        num_samples: number of rows.
        steps: number of forward passes, over which the positions are spread.
        seed: sample i depends on (seed, i) only: its order and its noise are the same in any batch.
        order: the name of an order, or an `Order` with its settings.
        bos: id that stands known at position 0, or None.
        condition: [num_samples] class labels, or None.
        known: [num_samples, L] tokens, and where they are given; all other positions are drawn.
        filters: temperature, top-k and nucleus.
        guidance: weight w of classifier-free guidance at the last step, reached linearly from 0 at the first; a
            single step has all of w. Requires `condition`. The model then holds every row twice, with its class and
            without.
        refresh_every: steps from one encoding of all known tokens to the next; the steps between encode only new
            ones (PGM; 1 is exact, more is approximate).
        indices: the index i of every sample in a longer list; None: 0 to num_samples - 1.
        compile: on CUDA, compile steps of fixed shape and run them as CUDA graphs; elsewhere nothing changes. For
            AR and for causal PGM without pooled swaps, in planned orders.
        extents: tokens of every row; what lies behind them is padding, which is never drawn or read; None: L.
    """

    num_samples: int
    steps: int
    seed: int = 0
    order: str | Order = "uniform"
    bos: int | None = None
    condition: Int[Tensor, "B"] | None = None
    known: tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]] | None = None
    filters: Filters = Filters()
    guidance: float = 0.0
    refresh_every: int = 1
    indices: Sequence[int] | None = None
    compile: bool = False
    extents: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Take integers of numpy and torch as int."""
        for name in ("num_samples", "steps", "seed", "refresh_every"):
            object.__setattr__(self, name, arguments.plain(getattr(self, name)))

    @classmethod
    def of(cls, settings: SamplingConfig, bos: int | None) -> "SamplingRequest":
        """Make the request of a sampling config, without class labels.

        Args:
            settings: the config.
            bos: id that stands known at position 0, or None.

        Returns:
            The request for all samples of the config.
        """
        return cls(
            settings.num_samples,
            settings.steps,
            settings.seed,
            order=Order(settings.order, settings.schedule, gumbel=settings.gumbel, gamma=settings.gamma),
            bos=bos,
            filters=Filters(settings.temperature, settings.top_k, settings.top_p),
            guidance=settings.guidance,
            refresh_every=settings.refresh_every,
            compile=settings.compile,
        )


@torch.inference_mode()
def sample(
    model: Denoiser,
    request: SamplingRequest,
    progress: Progress | None = None,
    revealed_at: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw rows of tokens: from nothing, from BOS, or around given tokens.

    Args:
        model: in eval mode.
        request: what to sample.
        progress: called with (steps done, steps) after every step.
        revealed_at: filled with the step at which every position was drawn, from 1; 0 for given ones.

    Returns:
        [num_samples, L] ids, BOS included, on the model's device.

    Raises:
        ConfigError: a value that is outside its bounds, more steps than positions, a given token that the model
            cannot draw, another one than BOS in BOS's place, or guidance without labels.
        CapabilityError: class labels that the model has no vectors for, or an order that it cannot follow.

    Source:
        docs/method.md section 4; arXiv 2207.12598 (guidance).
    """
    rows = _Rows(model, request)
    planned = rows.follow_fixed if rows.fixed else rows.follow
    steps = planned() if rows.order.name in orders.PLANNED else rows.choose()
    for done, _ in enumerate(steps, 1):
        if progress is not None:
            progress(done, request.steps)
    if revealed_at is not None:
        revealed_at.copy_(rows.revealed_at)
    return rows.tokens


class _Rows:
    """Rows that are being sampled, and the model's state of them.

    Attributes:
        order: the order of the request.
        fixed: steps have fixed shapes and are compiled.
        tokens: [B, L] tokens so far, 0 where unknown, on the model's device.
        revealed_at: [B, L] the step at which every position is drawn, from 1.
    """

    def __init__(self, model: Denoiser, request: SamplingRequest):
        known = _check(model, request)
        self._model, self._request = model, request
        # Positions before those of the grid, or of the text.
        modalities = model.head.modalities
        self._start = int(request.bos is not None) if modalities is None else modalities.places
        self._copies = 2 if request.guidance else 1  # with class, and without
        self.order = Order(request.order) if isinstance(request.order, str) else request.order
        rows, device = request.num_samples, model.head.weight.device
        tokens = torch.zeros(rows, model.length, dtype=torch.int64)
        given = torch.zeros(rows, model.length, dtype=torch.bool)
        if known is not None:
            tokens, given = torch.where(known[1], known[0], 0), known[1].clone()
        if request.bos is not None:
            tokens[:, 0], given[:, 0] = request.bos, True
        unknown, extents = ~given, None
        if request.extents is not None:
            extents = [*request.extents]
            unknown &= torch.arange(model.length) < torch.tensor(extents)[:, None]
            extents *= self._copies
        length = model.length - self._start
        # A short row among longer ones reveals nothing in the last steps, so any row may have fewer tokens.
        most = int(unknown.sum(1).max()) if extents is None or model.left_to_right else length
        orders.check(self.order, request.steps, most, length)
        if model.left_to_right and request.steps != most:
            raise CapabilityError(
                f"steps: {request.steps} for {most} positions; an autoregressive model draws one at a step"
            )
        indices = range(rows) if request.indices is None else request.indices
        assert len(indices) == rows, (len(indices), rows)
        self._generators = [np.random.default_rng([request.seed, index]) for index in indices]
        condition = request.condition
        if request.guidance:
            if condition is None or model.classes is None:
                raise ConfigError(
                    f"guidance: {request.guidance} without class labels; expected labels, or guidance 0"
                )
            condition = torch.cat([condition, torch.full_like(condition, model.classes.num_embeddings - 1)])
        if request.compile:
            fixed.check(model, self.order)
        self.fixed = request.compile and device.type in fixed.DEVICES and model.foldable
        capacity = fixed.room(model.length) if self.fixed else None
        self._state = model.open(self._copies * rows, condition, request.refresh_every, capacity, extents)
        self._unknown, self.tokens = unknown, tokens.to(device, non_blocking=True)
        self.revealed_at = torch.zeros_like(tokens)
        if given.any():
            order = None
            if model.causal:  # given tokens count as revealed in an order that the sample's seed fixes
                ranks = draw_order([request.seed, 0, 1], indices, model.length, request.bos is not None)
                order = torch.from_numpy(ranks)
            index = by_rank(given, order)
            places = (index % model.length).to(device, non_blocking=True)
            self._extend(tokens.flatten()[index].to(device, non_blocking=True), places, given.sum(1).tolist())

    def follow(self) -> Iterator[None]:
        """Reveal by plans that are made before the first step; yields after every step.

        Rows may reveal different numbers of tokens. No loop over rows runs after the plans are made.
        """
        plan, device = self._plan(), self.tokens.device
        cells = plan.rows * self.tokens.shape[1] + plan.positions
        fields = [
            torch.from_numpy(x).to(device, non_blocking=True) for x in (plan.positions, cells, plan.noise)
        ]
        parts = zip(*(x.split(plan.counts.sum(1).tolist()) for x in fields), strict=True)
        for step, (lengths, (places, cell, uniform)) in enumerate(
            zip(plan.counts.tolist(), parts, strict=True)
        ):
            if any(lengths):  # a step in which no row reveals anything is not run
                drawn = self._draw(places, lengths, uniform, step).tokens
                self.tokens.view(-1)[cell] = drawn
                self._extend(drawn, places, lengths)
            yield

    def follow_fixed(self) -> Iterator[None]:
        """As `follow`, in compiled steps of fixed shape; yields after every step."""
        request, model, guidance = self._request, self._model, None
        assert isinstance(model, CachedDenoiser)
        if request.guidance:
            weights = [self._weight(step) for step in range(request.steps)]
            guidance = torch.tensor(weights, device=self.tokens.device)
        canvas = F.pad(self.tokens.flatten(), (0, 1))  # the last cell takes what is drawn for no token
        for cells, drawn in fixed.follow(model, self._state, self._plan(), request.filters, guidance):
            canvas[cells] = drawn
            self.tokens = canvas[:-1].view_as(self.tokens)
            yield

    def _plan(self) -> fixed.Plan:
        """Plan the steps of all rows, and note the step of every position."""
        (rows, length), steps = self.tokens.shape, self._request.steps
        plans = [
            orders.plan(self.order, np.flatnonzero(unknown), steps, rng=rng, start=self._start, length=length)
            for unknown, rng in zip(self._unknown.numpy(), self._generators, strict=True)
        ]
        noise = np.stack([rng.random(length) for rng in self._generators]).ravel()
        counts = np.stack([count for _, count in plans], axis=1)  # [steps, B]
        step_of = np.concatenate([np.repeat(np.arange(steps), count) for _, count in plans])
        by_step = step_of.argsort(kind="stable")
        positions = np.concatenate([sequence for sequence, _ in plans])[by_step]
        row = np.repeat(np.arange(rows), counts.sum(0))[by_step]
        cells = row * length + positions
        self.revealed_at.view(-1)[cells] = torch.from_numpy(step_of[by_step] + 1)
        return fixed.Plan(counts, row, positions, noise[cells])

    def choose(self) -> Iterator[None]:
        """Predict all unknown positions at every step and keep some of them; yields after every step."""
        steps, device, length = self._request.steps, self.tokens.device, self.tokens.shape[1]
        unknown, schedule = self._unknown.to(device), orders.schedule_of(self.order)
        self.revealed_at = torch.zeros_like(self.tokens)
        remaining = unknown.sum(1).tolist()
        counts = [orders.step_counts(n, steps, schedule) for n in remaining]
        for step in range(steps):
            if any(remaining):
                row, position = unknown.nonzero(as_tuple=True)
                noise = np.stack([rng.random((2, length)) for rng in self._generators])  # [B, 2, L]
                uniform, other = torch.from_numpy(noise).to(device).unbind(1)
                gumbel = -(-other.clamp(min=1e-300).log()).log()
                drawn = self._draw(position, remaining, uniform[row, position], step, certainty=True)
                canvas = Drawn(
                    *(torch.zeros_like(unknown, dtype=x.dtype).masked_scatter(unknown, x) for x in drawn)
                )
                # Confidence keeps to the schedule; entropy may be ahead of it, but must end with it.
                least = [max(0, n - int(c[step + 1 :].sum())) for n, c in zip(remaining, counts, strict=True)]
                progress = self._progress(step)
                keep = orders.choose(self.order, unknown, canvas, gumbel, counts=least, progress=progress)
                kept = keep.sum(1).tolist()
                self.tokens[keep] = canvas.tokens[keep]
                self.revealed_at[keep] = step + 1
                self._extend(self.tokens[keep], keep.nonzero(as_tuple=True)[1], kept)
                unknown = unknown & ~keep
                remaining = [n - k for n, k in zip(remaining, kept, strict=True)]
            yield

    def _weight(self, step: int) -> float:
        """Weight of guidance at a step."""
        return self._progress(step) * self._request.guidance

    def _progress(self, step: int) -> float:
        """0 at the first step, 1 at the last, and 1 at an only one."""
        last = self._request.steps - 1
        return step / last if last else 1.0

    def _extend(self, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]) -> None:
        """Give the model packed tokens, `lengths[b]` of them in row b."""
        n = self._copies
        self._model.extend(self._state, tokens.repeat(n), positions.repeat(n), list(lengths) * n)

    def _draw(
        self,
        positions: Int[Tensor, "Q"],
        lengths: Sequence[int],
        noise: Float[Tensor, "Q"],
        step: int,
        certainty: bool = False,
    ) -> Drawn:
        """Draw tokens at packed positions, `lengths[b]` of them in row b."""
        request, copies, guidance = self._request, self._copies, None
        hidden = self._model.hidden(self._state, positions.repeat(copies), list(lengths) * copies)
        if copies > 1:
            hidden, unconditional = hidden.chunk(copies)
            guidance = Guidance(unconditional, self._weight(step))
        head = self._model.head
        places = None if head.modalities is None else positions
        return draw_tokens(head, hidden, noise, request.filters, guidance, certainty, places)


def sample_long(
    model: Denoiser,
    request: SamplingRequest,
    *,
    length: int,
    stride: int,
    stop: int | None = None,
    progress: Progress | None = None,
) -> Int[Tensor, "B length"]:
    """Draw rows of any length, window by window: the end of a window is given at the start of the next.

    Args:
        model: in eval mode.
        request: the first window; `steps` are those of a full window, and later windows take their share.
        length: tokens of a row.
        stride: new tokens of every window after the first.
        stop: an id at which a row ends; it and everything after it are filled with it.
        progress: called with (steps done, steps of all windows) after every step, and once more where all rows
            have ended before.

    Returns:
        [num_samples, length] ids, BOS included.

    Raises:
        ConfigError: a stride that leaves no context, or a length below the model's.
    """
    window, start, known = model.length, int(request.bos is not None), request.known
    if not 1 <= stride < window - start:
        raise ConfigError(f"stride: {stride}; expected 1 to {window - start - 1} for windows of {window}")
    if length < window:
        raise ConfigError(f"length: {length}; expected at least the model's {window}")
    given = int(known[1].any(0).nonzero().max()) + 1 if known is not None and known[1].any() else start
    news = [min(stride, length - end) for end in range(window, length, stride)]
    full = model.left_to_right
    shares = [n if full else max(1, min(n, round(request.steps * n / (window - start)))) for n in news]
    before, total = 0, request.steps + sum(shares)

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    rows = sample(model, request, report)
    before = request.steps
    for index, (new, steps) in enumerate(zip(news, shares, strict=True), 1):
        if stop is not None and _ended(rows, stop, given)[:, -1].all():
            report(total - before, 0)
            break
        tokens = F.pad(rows[:, rows.shape[1] - (window - start - new) :], (start, new))
        places = torch.arange(window, device=rows.device)
        context = ((places >= start) & (places < window - new)).expand_as(tokens)
        # Each window has its own noise: its index is part of the seed.
        seed = mix_seed(request.seed, index)
        drawn = sample(model, replace(request, steps=steps, seed=seed, known=(tokens, context)), report)
        rows, before = torch.cat([rows, drawn[:, window - new :]], dim=1), before + steps
    if stop is None:
        return rows
    rows = torch.where(_ended(rows, stop, given), stop, rows)
    return F.pad(rows, (0, length - rows.shape[1]), value=stop)


def _ended(rows: Int[Tensor, "B T"], stop: int, given: int) -> Bool[Tensor, "B T"]:
    """Positions at and after the first `stop` behind the given tokens."""
    hits = rows.eq(stop)
    hits[:, :given] = False
    return hits.cummax(1).values


def known_tokens(
    known: Known | None, rows: int, length: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]] | None:
    """Convert given tokens of any form to tensors.

    Args:
        known: `{position: token}` for all rows, a list of one for each, or (tokens, mask).
        rows: number of rows, B.
        length: L.

    Returns:
        [B, L] tokens, and [B, L] where they are given; None if none are given.

    Raises:
        ConfigError: another form, or a position outside the row.
    """
    if known is None:
        return None
    if isinstance(known, tuple):
        if len(known) != 2:
            raise ConfigError(f"known: a tuple of {len(known)}; expected (tokens, mask)")
        tokens = arguments.integers("known: tokens", known[0], rows, length)
        return tokens, arguments.booleans("known: mask", known[1], rows, length)
    arguments.instance("known", known, dict, list)
    prompts = [known] * rows if isinstance(known, dict) else known
    if len(prompts) != rows:
        raise ConfigError(f"known: {len(prompts)} prompts for {rows} samples; expected one for each")
    return ragged_known(prompts, length)


def ragged_known(
    prompts: Sequence[dict[int, int]], length: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Convert the given tokens of every row to tensors.

    Args:
        prompts: `{position: token}` of every row.
        length: L.

    Returns:
        [B, L] tokens, 0 where none is given, and [B, L] where they are given.

    Raises:
        ConfigError: a position outside the row, or a token that is no id.
    """
    for prompt in prompts:
        arguments.instance("known", prompt, dict)
        for position, token in prompt.items():
            arguments.integer("known: position", position, 0, length - 1)
            arguments.integer(f"known: token at position {position}", token, 0)
    tokens = [[prompt.get(position, 0) for position in range(length)] for prompt in prompts]
    mask = [[position in prompt for position in range(length)] for prompt in prompts]
    return torch.tensor(tokens), torch.tensor(mask)


def _check(
    model: Denoiser, request: SamplingRequest
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]] | None:
    """Refuse a request that the model cannot follow, and return its known tokens on the host."""
    rows = arguments.integer("num_samples", request.num_samples, 1, MOST_SAMPLES)
    arguments.integer("seed", request.seed, 0)
    arguments.integer("refresh_every", request.refresh_every, 1)
    arguments.number("guidance", request.guidance, 0, LARGEST_SETTING)
    arguments.instance("order", request.order, str, Order)
    arguments.instance("filters", request.filters, Filters)
    arguments.instance("compile", request.compile, bool)
    name = request.order if isinstance(request.order, str) else request.order.name
    if model.left_to_right and name in orders.ORDERS and name != "left_to_right":
        raise CapabilityError(f"order: {name!r}; an autoregressive model draws 'left_to_right'")
    known = known_tokens(request.known, rows, model.length)
    start = int(request.bos is not None)
    if start:
        arguments.integer("bos", request.bos, 0, model.embedding.num_embeddings - model.registers - 1)
    if known is None:
        return None
    tokens, mask = (values.cpu() for values in known)
    other = tokens[:, :start][mask[:, :start] & (tokens[:, :start] != request.bos)]
    if len(other):
        raise ConfigError(
            f"known: token {int(other[0])} at position 0; expected BOS, {request.bos}, or no token"
        )
    arguments.check_below("known: token", tokens[:, start:][mask[:, start:]], model.vocab_size)
    return tokens, mask
