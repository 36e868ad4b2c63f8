"""Exponential moving average of the float32 master weights, each rank its own slices."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.training import slices
from pipeline.training.slices import Slices

AVERAGE = "ema"  # start of the names of files in a checkpoint


class EMA:
    """An exponential moving average of the weights in float32: `ema = decay * ema + (1 - decay) * weights`.

    Replicated at ZeRO stage 0; at stages 1 and 2 a rank averages its partition of the optimiser, at stage 3 its
    partition of the parameters. Saved as slices keyed by (name, flat offset), which any number of ranks can read.

    Args:
        masters: float32 weights that this rank owns; the average starts as a copy of them.
        decay: weight of the past in an update.

    Attributes:
        slices: the average, with the keys of the masters.
    """

    def __init__(self, masters: Slices, decay: float):
        self.decay = decay
        self.slices: Slices = {key: values.clone() for key, values in masters.items()}

    @torch.no_grad()
    def update(self, masters: Slices) -> None:
        """Update the average after an optimiser step.

        Args:
            masters: float32 weights that this rank owns.
        """
        torch._foreach_lerp_(
            list(self.slices.values()), [masters[key] for key in self.slices], 1 - self.decay
        )

    def save(self, file: Path) -> None:
        """Write this rank's slices as safetensors with keys `name@offset`."""
        slices.save(file, {"": self.slices})


def read_averages(folder: Path) -> dict[str, Tensor]:
    """Read the averages that any number of ranks saved.

    Args:
        folder: of a checkpoint, with files that `EMA.save` wrote.

    Returns:
        A flat float32 tensor for every parameter name; it ends where the first slice is missing.
    """
    return slices.read_whole(folder, AVERAGE)
