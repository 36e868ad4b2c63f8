"""Where the time of a step goes: stamps between a model's parts, in the forward and in the backward pass."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.denoiser import Denoiser
from pipeline.models.pgm import PGM

PARTS = ("batch", "embedding", "attention", "MLP", "head + loss", "draw", "optimiser")


class PhaseTimer:
    """A stopwatch inside a model. Every mark gives the time since the one before it to a part.

    The backward pass runs the forward pass's operations in reverse, so a stamp that the gradient passes ends
    what lies behind it. Norms, residual sums and GroupSwap count as attention, the final norm as head, and of
    sampling everything between head and embedding as draw.

    Args:
        model: hooks are put into it, which cost microseconds, and do nothing before `start`.
        now: the clock.
    """

    def __init__(self, model: Denoiser, now: Callable[[], float]):
        self._now, self._running = now, False
        self._last, self._part = 0.0, ""
        self._ends: list[str] = []  # parts that the stamps of this forward pass end, in its order
        self.seconds: defaultdict[str, float] = defaultdict(float)
        model.embedding.register_forward_pre_hook(self._before_embedding)
        model.head.register_forward_pre_hook(self._before_head)
        model.head.register_forward_hook(lambda *_: self.mark("head + loss"))
        ends: list[tuple[nn.Module, str]] = [(model.embedding, "embedding")]
        if isinstance(model, PGM):
            ends += [(swap, "attention") for swap in (model.swap, *model.later_swaps)]
        for module in model.modules():
            if isinstance(getattr(module, "mlp", None), nn.Module):
                ends += [(module.norm2, "attention"), (module.mlp, "MLP")]  # type: ignore[list-item]
        for module, part in ends:
            module.register_forward_hook(self._after(part))

    def start(self) -> None:
        """Forget the last run and begin."""
        self.seconds, self._part, self._running = defaultdict(float), "", True
        self._ends.clear()
        self._last = self._now()

    def stop(self, part: str) -> dict[str, float]:
        """End the run and its last part; returns seconds by part, which sum to all time since `start`."""
        self.mark(part)
        self._running = False
        return dict(self.seconds)

    def mark(self, part: str) -> None:
        """The time since the last mark was this part's."""
        if self._running:
            now = self._now()
            self.seconds[part] += now - self._last
            self._last, self._part = now, part

    def passed(self, index: int) -> None:
        """The gradient has come to stamp number `index`."""
        self.mark(self._ends[index + 1] if index + 1 < len(self._ends) else "head + loss")

    def _before_embedding(self, *_: Any) -> None:
        self.mark("batch" if torch.is_grad_enabled() else "draw")

    def _before_head(self, *_: Any) -> None:
        # Further chunks of rows come straight from the draws of the ones before.
        self.mark("draw" if self._part == "head + loss" else "head + loss")

    def _after(self, part: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if not self._running:
                return None
            self.mark(part)
            if not output.requires_grad:
                return None
            self._ends.append(part)
            return _Stamp.apply(output, self, len(self._ends) - 1)

        return hook


class _Stamp(torch.autograd.Function):
    """The identity, which tells when the gradient passes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: PhaseTimer, index: int) -> Tensor:
        ctx.parts, ctx.index = parts, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.parts.passed(ctx.index)
        return gradient, None, None
