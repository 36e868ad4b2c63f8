"""Compares compiled training steps with eager ones: `python -m tests.support.compiled_blocks` prints a report.

A module of its own, since the hook that checks shapes in tests cannot be compiled.
"""

import json
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from pipeline.config.model import PGMConfig
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from tests.support.rehearsal import CODES, IMAGES, PGM, L, batch_of
from tests.support.small_models import shake

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def step(model: Denoiser, batch: Batch, seed: int = 0) -> Step:
    """Losses and gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(batch)
    losses.sum().backward()
    return losses.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def difference(one: Step, other: Step) -> float:
    """Largest relative difference of the losses and of the gradient of any parameter."""
    pairs = [(one[0], other[0]), *((grad, other[1][name]) for name, grad in one[1].items())]
    assert one[1].keys() == other[1].keys()
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)


def prepared(config: PGMConfig) -> tuple[Denoiser, Batch]:
    """A model with dropout, and a batch for it."""
    torch.manual_seed(0)
    config = config.model_copy(update={"encoder_blocks": 2, "decoder_blocks": 2, "dropout": 0.1})
    model = shake(build(config, CODES, L, CODES + 1), 0.1).train()
    return model, replace(batch_of(model), device=torch.device("cpu"))


def against_eager(config: PGMConfig) -> float:
    """Difference of compiled and eager steps, with the dropout of eager kernels."""
    model, batch = prepared(config)
    eager = step(model, batch)
    model.compile_blocks()
    with torch._inductor.config.patch(fallback_random=True):
        return difference(eager, step(model, batch))


def dropout(config: PGMConfig) -> dict[str, float]:
    """Differences of compiled steps with the dropout of compiled code."""
    torch._dynamo.reset()
    model, batch = prepared(config)
    model.compile_blocks()
    first, again, other = (step(model, batch, seed) for seed in (0, 0, 1))
    model.recompute = True
    return {
        "again": difference(first, again),
        "other seed": difference(first, other),
        "recomputed": difference(first, step(model, batch)),
    }


def main() -> None:
    """Compare a text model and an image model."""
    report = {"text": against_eager(PGM), "images": against_eager(IMAGES), **dropout(PGM)}
    report["graph breaks"] = sum(counters["graph_break"].values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
