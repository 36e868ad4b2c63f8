"""The one sampling loop: pick positions, predict only those, draw, append."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.models.denoiser import Denoiser
from pipeline.sampling import orders
from pipeline.sampling.logits import draw_tokens


@torch.inference_mode()
def sample(
    model: Denoiser,
    num_samples: int,
    steps: int,
    seed: int,
    order: str = "uniform",
    bos: int | None = None,
    condition: Int[Tensor, "B"] | None = None,
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw rows of tokens from nothing (or from BOS, where the data has one).

    Sample i of the call depends on (seed, first + i) only: its order and its noise are the same in any batch.

    Args:
        model: in eval mode.
        steps: forward passes; the positions are spread over them as evenly as they go.
        order: "uniform" or "left_to_right"; an autoregressive model takes the latter, one token a step.
        bos: id that stands known at position 0.
        condition: [B] class labels.
        first: index of the first sample, for batches of a longer list.
        progress: called with (steps done, steps) after every step.

    Shape:
        Returns [num_samples, L] ids, BOS included.

    Raises:
        ConfigError: unknown order, or more steps than positions.
        CapabilityError: class labels that the model has no vectors for, or an order that it cannot follow.
    """
    device = model.head.weight.device
    length, start = model.length, int(bos is not None)
    orders.check(order, steps, length - start)
    generators = [np.random.default_rng([seed, first + i]) for i in range(num_samples)]
    plans = [orders.plan(order, np.arange(start, length), steps, rng) for rng in generators]
    noise = torch.from_numpy(np.stack([rng.random(length) for rng in generators])).to(device)  # [B, L]
    rows = torch.arange(num_samples, device=device)

    tokens = torch.zeros(num_samples, length, dtype=torch.int64, device=device)
    state = model.open(num_samples, condition, capacity=length)
    if bos is not None:
        tokens[:, 0] = bos
        model.extend(state, tokens[:, 0], torch.zeros_like(rows), [1] * num_samples)
    for step in range(steps):
        positions = torch.from_numpy(np.stack([plan[step] for plan in plans])).to(device)  # [B, n]
        counts = [positions.shape[1]] * num_samples
        hidden = model.hidden(state, positions.flatten(), counts)
        drawn = draw_tokens(model.head, hidden, noise.gather(1, positions).flatten())
        tokens.scatter_(1, positions, drawn.view_as(positions))
        model.extend(state, drawn, positions.flatten(), counts)
        if progress is not None:
            progress(step + 1, steps)
    return tokens
