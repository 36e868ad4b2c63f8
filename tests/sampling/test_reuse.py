"""Encoder reuse: exact where nothing is stale, stale in between, and fresh again when it is due."""

import pytest
import torch
from torch import Tensor

from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.errors import CapabilityError
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.small_models import PGM, randomised

V, L = 11, 16
TOKENS, PLACES = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 5, 2], [3, 1, 9]])
ASKED = torch.tensor([7, 8])


@pytest.fixture(params=[0, 2], ids=["plain", "registers"])
def model(request: pytest.FixtureRequest) -> Denoiser:
    config = PGMConfig(**{**PGM.model_dump(), "registers": request.param, "encoder_blocks": 2})
    return randomised(config, V, L, scale=0.5, seed=0).double().eval()


def predict(model: Denoiser, refresh_every: int, parts: list[slice], ask_between: bool = True) -> Tensor:
    """Hidden vectors after giving the known tokens in parts, with a prediction after each."""
    state = model.open(2, refresh_every=refresh_every)
    out = torch.empty(0)
    for part in parts:
        tokens, places = TOKENS[:, part], PLACES[:, part]
        model.extend(state, tokens.flatten(), places.flatten(), [tokens.shape[1]] * 2)
        if ask_between or part is parts[-1]:
            out = model.hidden(state, ASKED, [1, 1])
    return out


@torch.no_grad()
def test_all_at_once_is_exact(model: Denoiser):
    whole = [slice(0, 3)]
    torch.testing.assert_close(predict(model, 4, whole), predict(model, 1, whole), atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 0, 1], [2, 2, 2], [0, 0, 0]])
@pytest.mark.parametrize("swap", [{}, {"pooling": "mean", "every_block": True}], ids=["default", "pooled"])
def test_rows_of_any_length_read_their_own_tokens(swap: dict[str, object], lengths: list[int]):
    config = PGMConfig(**{**PGM.model_dump(), "decoder_blocks": 2, "swap": swap})
    model = randomised(config, V, L, scale=0.5, seed=0).double().eval()
    places = torch.tensor([place for length in lengths for place in range(length)], dtype=torch.int64)
    asked, counts = torch.tensor([7, 8, 9, 10, 11, 12]), [2, 1, 3]
    found = []
    for refresh_every in (1, 4):
        state = model.open(3, refresh_every=refresh_every)
        model.extend(state, (3 * places + 1) % V, places, lengths)
        found.append(model.hidden(state, asked, counts))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_old_tokens_do_not_see_new_ones_until_the_refresh(model: Denoiser):
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    exact = predict(model, 1, parts)
    assert (predict(model, 3, parts) - exact).abs().max() > 1e-3
    # With a refresh at every second prediction the third encodes everything again.
    torch.testing.assert_close(predict(model, 2, parts), exact, atol=1e-12, rtol=0)


@torch.no_grad()
def test_new_tokens_see_old_and_each_other(model: Denoiser):
    """A one-block encoder's new outputs are exact, since its keys are embeddings: only old outputs are stale."""
    one = randomised(PGMConfig(**{**PGM.model_dump(), "encoder_blocks": 1}), V, L, scale=0.5, seed=0).double()
    state, fresh = one.open(2, refresh_every=9), one.open(2, refresh_every=9)
    for part in (slice(0, 1), slice(1, 3)):
        tokens, places = TOKENS[:, part].flatten(), PLACES[:, part].flatten()
        count = [TOKENS[:, part].shape[1]] * 2
        for opened in (state, fresh):
            one.extend(opened, tokens, places, count)
        one.hidden(state, ASKED, [1, 1])
    one.hidden(fresh, ASKED, [1, 1])  # all three encoded together
    stale, whole = (s.memory.swaps[0].cache.values for s in (state, fresh))  # maps of encoder outputs
    new, exact = stale[:, 1:3], whole[:, 1:3]
    torch.testing.assert_close(new, exact, atol=1e-12, rtol=0)
    old = stale[:, 0] - whole[:, 0]
    assert old.abs().max() > 1e-3


@pytest.mark.parametrize("order", ["uniform", "binomial", "confidence"])
def test_sampling_with_reuse(model: Denoiser, order: str):
    tokens = sample(model, SamplingRequest(3, 8, seed=1, order=order, refresh_every=4))
    assert tokens.equal(sample(model, SamplingRequest(3, 8, seed=1, order=order, refresh_every=4)))
    assert sample(model, SamplingRequest(3, 8, seed=1, order=order)).equal(
        sample(model, SamplingRequest(3, 8, seed=1, order=order, refresh_every=1))
    )


def test_only_models_with_an_encoder_reuse():
    masked = build(MDLMConfig(kind="mdlm", hidden=16, heads=2, blocks=1, dropout=0), V, L).eval()
    with pytest.raises(CapabilityError, match="refresh_every: 2 for MDLM; expected 1"):
        sample(masked, SamplingRequest(1, 4, seed=0, refresh_every=2))
