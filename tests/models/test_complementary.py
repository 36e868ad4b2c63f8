"""Complementary MDLM: one doubled pass is two passes of plain MDLM, one a masking."""

import pytest
import torch

from pipeline.config.model import MDLMConfig
from pipeline.models import build
from pipeline.models.batch import Batch
from tests.support.small_models import MDLM, random_rows, randomised

V, L = 11, 16
BOTH = MDLM.model_copy(update={"complementary": True})
DRESSED = BOTH.model_copy(update={"classes": 3, "registers": 1})


@pytest.mark.parametrize("config", [BOTH, DRESSED], ids=["plain", "classes and a register"])
def test_one_pass_is_two(config: MDLMConfig) -> None:
    """Losses and gradients, rows all of whose tokens are in one group among them."""
    model = randomised(config, V, L).double()
    plain = build(config.model_copy(update={"complementary": False}), V, L).double()
    plain.load_state_dict(model.state_dict())
    tokens, groups = random_rows(5, L, V)
    groups[1], groups[2] = True, False
    labels = None if config.classes is None else torch.tensor([0, 1, 2, 3, 0])
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(tokens.shape, generator=generator) < 0.8
    weights = torch.rand(tokens.shape, generator=generator)
    losses = model(Batch(tokens, groups, targets, weights, labels))
    halves = [plain(Batch(tokens, masked, targets & masked, weights, labels)) for masked in (groups, ~groups)]
    torch.testing.assert_close(losses, sum(halves))
    grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
    wanted = torch.autograd.grad(sum(halves).sum(), list(plain.parameters()))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-5)


def test_a_validation_batch_is_one_masking() -> None:
    """Where only group 1 is asked the batch is not doubled."""
    model = randomised(BOTH, V, L)
    tokens, groups = random_rows(4, L, V)
    sizes = []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    weights = torch.ones(tokens.shape)
    model(Batch(tokens, groups, groups, weights))
    model(Batch(tokens, groups, torch.ones_like(groups), weights))
    assert sizes == [4 * L, 8 * L]
