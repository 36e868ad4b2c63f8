"""Exponential moving average of the float32 master weights, each rank its own slices."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.training.engine import Slices


class EMA:
    """`ema = decay * ema + (1 - decay) * weights` in float32.

    Replicated at ZeRO stage 0; at stages 1 and 2 a rank averages its optimiser partition, at stage 3 its
    parameter partition. Saved as slices keyed by (name, flat offset), which any number of ranks can read.
    """

    def __init__(self, masters: Slices, decay: float):
        self.decay = decay
        self.slices: Slices = {key: values.clone() for key, values in masters.items()}

    @torch.no_grad()
    def update(self, masters: Slices) -> None:
        """Move towards the weights after an optimiser step."""
        torch._foreach_lerp_(
            list(self.slices.values()), [masters[key] for key in self.slices], 1 - self.decay
        )

    @torch.no_grad()
    def restart(self, masters: Slices) -> None:
        """Forget the past: the average is the weights as they are."""
        for key, values in self.slices.items():
            values.copy_(masters[key])

    def save(self, file: Path) -> None:
        """Write this rank's slices as safetensors with keys `name@offset`."""
        save_file(
            {f"{name}@{offset}": v.cpu().contiguous() for (name, offset), v in self.slices.items()}, file
        )

    @torch.no_grad()
    def load(self, files: Iterable[Path]) -> None:
        """Fill the slices from files that any number of ranks wrote.

        Raises:
            CheckpointError: an entry of a slice is in none of the files.
        """
        stored = read_slices(files)
        for (name, offset), values in self.slices.items():
            filled = 0
            for start, part in stored.get(name, ()):
                low, high = max(start, offset), min(start + part.numel(), offset + values.numel())
                if low < high:
                    values[low - offset : high - offset] = part[low - start : high - start].to(values.device)
                    filled += high - low
            if filled != values.numel():
                raise CheckpointError(
                    f"EMA of {name!r}: {filled} of {values.numel()} values from {offset} stored"
                )


def join_slices(stored: dict[str, list[tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """Slices put together to flat tensors."""
    return {name: torch.cat([values for _, values in parts]) for name, parts in stored.items()}


def read_slices(files: Iterable[Path]) -> dict[str, list[tuple[int, Tensor]]]:
    """All distinct slices of the files: name -> (offset, values)."""
    stored: dict[str, dict[int, Tensor]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                name, _, offset = key.rpartition("@")
                stored.setdefault(name, {})[int(offset)] = tensors.get_tensor(key)
    return {name: sorted(parts.items()) for name, parts in stored.items()}
