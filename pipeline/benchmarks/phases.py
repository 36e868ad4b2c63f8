"""Where the time of a step goes: time stamps between a model's parts, in the forward and in the backward pass."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.models.denoiser import Denoiser
from pipeline.models.pgm import PGM

PHASES = ("batch", "embedding", "attention", "MLP", "head + loss", "draw", "model", "optimiser")


class PhaseTimer:
    """A stopwatch inside a model: every mark assigns the time since the mark before to a phase.

    The backward pass runs the operations of the forward pass in reverse, so a stamp that the gradient passes ends the
    phase of what follows it in the forward pass. Norms, residual sums and GroupSwap count as attention, the final
    norm as head, and in sampling everything between head and embedding as draw.

    Args:
        model: hooks are registered in it; they cost microseconds, and do nothing before `start`.
        now: the clock.
        parts: give the parts of the model phases of their own. Else there are no marks inside of it, at each of which
            a clock that waits for a GPU would take time.

    Attributes:
        seconds: by phase, since `start`.
    """

    def __init__(self, model: Denoiser, now: Callable[[], float], parts: bool = True):
        self._now, self._running = now, False
        self._last, self._phase = 0.0, ""
        self._stamps: list[str] = []  # phases that the stamps of this forward pass end, in its order
        self.seconds: defaultdict[str, float] = defaultdict(float)
        if parts:
            self._add_marks(model)

    def _add_marks(self, model: Denoiser) -> None:
        """Mark the ends of the model's parts."""
        model.embedding.register_forward_pre_hook(
            lambda *_: self.mark("batch" if torch.is_grad_enabled() else "draw")
        )
        model.head.register_forward_pre_hook(  # further chunks of rows follow the draws of the chunk before
            lambda *_: self.mark("draw" if self._phase == "head + loss" else "head + loss")
        )
        model.head.register_forward_hook(lambda *_: self.mark("head + loss"))
        ends: list[tuple[nn.Module, str]] = [(model.embedding, "embedding")]
        if isinstance(model, PGM):
            ends += [(swap, "attention") for swap in (model.swap, *model.later_swaps)]
        for module in model.modules():
            if isinstance(mlp := getattr(module, "mlp", None), nn.Module):
                mlp.register_forward_pre_hook(lambda _, inputs: self._end("attention", inputs[0]))
                ends.append((mlp, "MLP"))
        for module, phase in ends:
            module.register_forward_hook(lambda _module, _, output, phase=phase: self._end(phase, output))

    def start(self) -> None:
        """Forget the last run and begin a new one."""
        self.seconds, self._phase, self._running = defaultdict(float), "", True
        self._stamps.clear()
        self._last = self._now()

    def stop(self, phase: str) -> dict[str, float]:
        """End the run.

        Args:
            phase: the run's last phase.

        Returns:
            Seconds by phase, whose sum is all time since `start`.
        """
        self.mark(phase)
        self._running = False
        return dict(self.seconds)

    def mark(self, phase: str) -> None:
        """Assign the time since the last mark to a phase."""
        if self._running:
            now = self._now()
            self.seconds[phase] += now - self._last
            self._last, self._phase = now, phase

    def _end(self, phase: str, output: Tensor) -> None:
        """End a phase with a tensor that it gave; the backward pass ends it where the gradient reaches the tensor."""
        if self._running:
            self.mark(phase)
            if output.requires_grad:
                self._stamps.append(phase)
                following = len(self._stamps)
                output.register_hook(lambda _: self.mark([*self._stamps, "head + loss"][following]))
