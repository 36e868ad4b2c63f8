"""Classifier-free guidance: the mixed distribution, its ramp, and one call for both passes."""

import numpy as np
import pytest
import torch

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig, SwapConfig
from pipeline.errors import ConfigError
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Head
from pipeline.sampling.logits import Filters, Guidance, draw_tokens
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.small_models import randomised

SIZES = {"hidden": 16, "heads": 2, "dropout": 0.0, "classes": 3}
KINDS = [
    PGMConfig(encoder_blocks=1, decoder_blocks=1, registers=2, swap=SwapConfig(), **SIZES),
    MDLMConfig(kind="mdlm", blocks=1, registers=1, **SIZES),
    ARConfig(kind="ar", blocks=1, **SIZES),
]
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(params=KINDS, ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest) -> Denoiser:
    return randomised(request.param).double().eval()


def in_two_passes(model: Denoiser, label: int, seed: int, index: int, scale: float) -> list[int]:
    """The left-to-right sampling of one row, one token a step, from two states that know nothing of each other."""
    length, none = model.length, model.classes.num_embeddings - 1
    noise = np.random.default_rng([seed, index]).random(length)
    states = [model.open(1, torch.tensor([c])) for c in (label, none)]
    tokens: list[int] = []
    with torch.inference_mode():
        for place in range(length):
            at = torch.tensor([place])
            given, free = (model.head(model.hidden(state, at, [1]))[0].log_softmax(-1) for state in states)
            w = scale * place / (length - 1)
            mixed = ((1 + w) * given - w * free).softmax(-1).cumsum(-1)
            token = int((mixed <= noise[place] * mixed[-1]).sum())
            for state in states:
                model.extend(state, torch.tensor([token]), at, [1])
            tokens.append(token)
    return tokens


def test_one_call_equals_two_passes(model: Denoiser) -> None:
    drawn = sample(
        model, SamplingRequest(3, model.length, 5, "left_to_right", condition=LABELS, guidance=2.5)
    )
    alone = [in_two_passes(model, int(label), 5, row, 2.5) for row, label in enumerate(LABELS)]
    assert drawn.tolist() == alone
    plain = sample(model, SamplingRequest(3, model.length, 5, "left_to_right", condition=LABELS))
    assert not torch.equal(plain, drawn)


@pytest.mark.parametrize("order", ["uniform", "binomial", "halton", "confidence", "entropy"])
def test_a_guided_row_does_not_depend_on_its_batch(order: str) -> None:
    model = randomised(KINDS[0]).double().eval()
    together = sample(model, SamplingRequest(3, 5, 1, Order(order), condition=LABELS, guidance=3.0))
    alone = [
        sample(
            model,
            SamplingRequest(1, 5, 1, Order(order), condition=LABELS[i : i + 1], guidance=3.0, indices=[i]),
        )
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_the_mixed_distribution() -> None:
    torch.manual_seed(0)
    head = Head(8, 5).double()
    torch.nn.init.normal_(head.weight)
    given, free = torch.randn(2, 1, 8, dtype=torch.float64)
    draws = 20_000
    noise = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    with torch.inference_mode():
        guidance = Guidance(free.expand(draws, -1), 1.5)
        drawn = draw_tokens(head, given.expand(draws, -1), noise, Filters(temperature=0.7), guidance)
        share = drawn.tokens.bincount(minlength=5) / draws
        p, q = (head(h)[0].softmax(-1) for h in (given, free))
    expected = (p**2.5 / q**1.5) ** (1 / 0.7)
    assert share.double().numpy() == pytest.approx((expected / expected.sum()).numpy(), abs=2e-4)


def test_guidance_needs_labels(model: Denoiser) -> None:
    order, steps = ("left_to_right", model.length) if model.left_to_right else ("uniform", 1)
    with pytest.raises(ConfigError, match=r"guidance: 1\.0 without class labels"):
        sample(model, SamplingRequest(1, steps, 0, order, guidance=1.0))


def test_a_single_step_has_the_whole_weight() -> None:
    """The ramp ends at w at the last step, which here is the first one too."""
    model = randomised(KINDS[1]).double().eval()
    labels, none = LABELS, torch.full((3,), 3)
    drawn = sample(model, SamplingRequest(3, 1, 5, "left_to_right", condition=labels, guidance=2.0))
    with torch.inference_mode():
        places = torch.arange(model.length)
        logits = [
            torch.stack(
                [model.head(model.hidden(model.open(1, c[None]), places, [model.length])) for c in row]
            )
            for row in (labels, none)
        ]
    given, free = (values.log_softmax(-1) for values in logits)
    mixed = (3 * given - 2 * free).softmax(-1).cumsum(-1)
    noise = torch.stack(
        [torch.from_numpy(np.random.default_rng([5, i]).random(model.length)) for i in range(3)]
    )
    expected = (mixed <= noise[..., None] * mixed[..., -1:]).sum(-1)
    assert torch.equal(drawn, expected)
