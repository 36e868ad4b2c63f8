"""What a model computes of a batch ahead of its forward pass, in the thread that reads rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser

SIZE = {"hidden": 16, "heads": 2, "dropout": 0.0}
CONFIGS = {
    "pgm": PGMConfig(encoder_blocks=1, decoder_blocks=1, registers=2, **SIZE),
    "causal": PGMConfig(encoder_blocks=1, decoder_blocks=1, encoder="causal", **SIZE),
    "mdlm": MDLMConfig(kind="mdlm", blocks=1, **SIZE),
    "ar": ARConfig(kind="ar", blocks=1, **SIZE),
}
B, L, V = 4, 12, 11


def batch_of(model: Denoiser) -> Batch:
    draws = partition.draw(DiffusionConfig(), seed=0, step=3, shape=(B, L), bos=False)
    objective = Objective(DiffusionConfig(), False, model.both_groups, model.left_to_right)
    tokens = np.random.default_rng(0).integers(0, V, (B, L))
    order = partition.draw_order([0], range(B), L, bos=False) if model.causal else None
    divisor, present = objective.normaliser(draws.groups), np.ones(B, bool)
    return objective.batch(tokens, draws, present, divisor=divisor, order=order, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prepared_batch_leaves_no_sorting_to_the_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build(CONFIGS[name], V, L, None)
    expected = model(batch_of(model))
    ahead = batch_of(model)
    model.prepare(ahead)

    def sort(*_: object, **__: object) -> None:
        raise AssertionError("sorted in the forward pass")

    monkeypatch.setattr(torch.Tensor, "argsort", sort)
    assert torch.equal(model(ahead), expected)
    assert torch.equal(model(replace(ahead, weights=ahead.weights)), expected), "a copy keeps it"


def test_models_pack_the_same_batch_in_their_own_ways() -> None:
    torch.manual_seed(0)
    models = [build(CONFIGS[name], V, L, None) for name in ("pgm", "causal")]
    shared = batch_of(models[1])
    for model in models:
        expected = model(batch_of(models[1]))
        model.prepare(shared)
        assert torch.equal(model(shared), expected)
