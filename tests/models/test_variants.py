"""Every GroupSwap variant: no leak, the two forms agree, pooling of nothing is zero, and what pooling is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import PGMConfig, SwapConfig
from pipeline.models import attention, blocks, build
from pipeline.models.attention import Segments
from pipeline.models.batch import Batch
from pipeline.models.blocks import pool
from pipeline.models.denoiser import Denoiser
from tests.models.test_leaks import CHECKS, V, partitioned
from tests.support.small_models import CAUSAL, PGM, random_rows, randomised, shake


def with_swap(**changes: object) -> PGMConfig:
    return PGM.model_copy(update={"swap": SwapConfig.model_validate(changes)})


VARIANTS = {
    "mean": with_swap(pooling="mean"),
    "logsumexp": with_swap(pooling="logsumexp"),
    "no positions": with_swap(positional=False),
    "only pooled": with_swap(positional=False, pooling="mean"),
    "mlp4": with_swap(query="mlp4"),
    "rms": with_swap(norm="rms"),
    "every block": with_swap(every_block=True),
    "all at once": with_swap(pooling="logsumexp", query="mlp4", norm="rms", every_block=True),
    "causal": CAUSAL,
    "causal, all at once": CAUSAL.model_copy(
        update={"swap": SwapConfig(pooling="logsumexp", query="mlp4", norm="rms", every_block=True)}
    ),
    "1 + 3 blocks": PGM.model_copy(update={"encoder_blocks": 1, "decoder_blocks": 3}),
    "3 + 1 blocks": PGM.model_copy(update={"encoder_blocks": 3, "decoder_blocks": 1}),
}
EVERY = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
POOLED = [name for name, config in VARIANTS.items() if config.swap.pooling != "none"]


@EVERY
@pytest.mark.parametrize("check", CHECKS)
def test_no_variant_leaks(config: PGMConfig, check: Callable[..., None]) -> None:
    model = randomised(config, V, 16)
    check(model, *partitioned(5, 16, equal=False))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("check", CHECKS)
def test_pooling_the_own_group_is_found(
    name: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that pooling invites: queries that sum up their own group in place of the other."""

    def crossed(x: Tensor, segments: Segments, how: str) -> Tensor:
        return pool(x, segments, how).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    monkeypatch.setattr(blocks, "pool", crossed)
    with pytest.raises(AssertionError, match="leak"):
        check(randomised(VARIANTS[name], V, 16), *partitioned(5, 16, equal=False))


@EVERY
def test_predicting_is_the_training_form(config: PGMConfig) -> None:
    """From ragged known tokens: none, some, all; only some of the rest asked."""
    model = Model(randomised(config, V, 16).double())
    tokens, groups = random_rows(4, 16, V)
    groups[0], groups[1] = True, False
    groups[1, 3] = True
    known = [row[~group] for row, group in zip(tokens, groups, strict=True)]
    places = [(~group).nonzero().squeeze(1) for group in groups]
    asked = [group.nonzero().squeeze(1)[::2] for group in groups]
    padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (known, places, asked)]
    lengths, counts = (torch.tensor([len(row) for row in rows]) for rows in (known, asked))
    predicted = model.predict(padded[0], padded[1], lengths, padded[2], counts)
    expected = model.logits(tokens, groups)
    for row, positions in enumerate(asked):
        got = predicted[row, : len(positions)]
        torch.testing.assert_close(got, expected[row, positions], atol=1e-9, rtol=0)


@EVERY
def test_empty_groups_train(config: PGMConfig) -> None:
    """Rows all of whose tokens are in one group: finite losses and gradients, and each row's own."""
    model = randomised(config, V, 16).double()
    tokens, groups = random_rows(3, 16, V)
    groups[0], groups[1] = True, False
    every, weights = torch.ones_like(groups), torch.ones(groups.shape)
    losses = model(Batch(tokens, groups, every, weights))
    grads = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    assert losses.isfinite().all()
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    alone = [model(Batch(*(x[row : row + 1] for x in (tokens, groups, every, weights)))) for row in range(3)]
    torch.testing.assert_close(losses, torch.cat(alone), atol=0, rtol=2e-7)  # each rounded to float32 once


@EVERY
def test_forms_of_the_kernel_agree(config: PGMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(config, V, 16).double()
    tokens, groups = random_rows(4, 16, V)
    batched = model.logits(tokens, groups)
    monkeypatch.setattr(attention, "SHORT", 0)
    torch.testing.assert_close(model.logits(tokens, groups), batched, atol=1e-9, rtol=0)


@pytest.mark.parametrize("how", ["mean", "logsumexp"])
def test_pooling(how: str) -> None:
    lengths = [3, 0, 1, 0, 5]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64) * 2
    x += torch.tensor([800, -800, 800, 0])  # exp of the first three overflows or underflows
    x.requires_grad_()
    parts = x.split(lengths)
    pooled = pool(x, Segments(lengths), how)
    for got, part in zip(pooled, parts, strict=True):
        expected = part.logsumexp(0) if how == "logsumexp" else part.mean(0)
        expected = expected if len(part) else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    direction = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((pooled * direction).sum(), x)
    assert gradient.isfinite().all()
    full = [row for row, length in enumerate(lengths) if length]
    whole = [parts[row].logsumexp(0) if how == "logsumexp" else parts[row].mean(0) for row in full]
    (wanted,) = torch.autograd.grad((torch.stack(whole) * direction[full]).sum(), x)
    torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=0)


def test_swaps_in_front_of_every_block_start_as_the_plain_model() -> None:
    """At initialisation the later swaps add nothing, and they learn."""

    def fresh(config: PGMConfig) -> Denoiser:
        torch.manual_seed(0)
        return build(config, V, 16)

    plain, every = fresh(PGM), fresh(VARIANTS["every block"])
    every.load_state_dict(plain.state_dict(), strict=False)
    later = {name for name, _ in every.named_parameters() if name.startswith("later_swaps")}
    assert later
    shake(plain)
    every.load_state_dict(plain.state_dict(), strict=False)
    tokens, groups = random_rows(3, 16, V)
    torch.testing.assert_close(every.logits(tokens, groups), plain.logits(tokens, groups))
    every(Batch(tokens, groups, torch.ones_like(groups), torch.ones(groups.shape))).sum().backward()
    assert every.later_swaps[0].out.weight.grad.abs().sum() > 0
