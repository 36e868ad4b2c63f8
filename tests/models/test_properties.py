"""Every model against plain formulas, over lengths, group splits, variants and dtypes."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.api import Model
from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig, SwapConfig
from pipeline.models.attention import Cache, CacheAppend
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from tests.support.dense import ar_logits, mdlm_logits, pgm_logits
from tests.support.small_models import randomised

V, L = 7, 12
SIZES = {"hidden": 16, "heads": 2, "dropout": 0.0}
EXACT = {"atol": 1e-9, "rtol": 0}
PROPERTY = settings(derandomize=True, deadline=None, max_examples=15)
REGISTERS = st.sampled_from([0, 2])
# Rows of one length; every row is known nowhere, everywhere, in front, or anywhere.
SPLITS = st.integers(1, L).flatmap(
    lambda length: st.lists(
        st.one_of(
            st.sampled_from([[True] * length, [False] * length]),
            st.integers(0, length).map(lambda cut: [False] * cut + [True] * (length - cut)),
            st.lists(st.booleans(), min_size=length, max_size=length),
        ),
        min_size=1,
        max_size=3,
    )
)
LONG = [[place % 3 == 0 for place in range(150)], [False] * 150, [place > 140 for place in range(150)]]


@cache
def pgm(registers: int = 0, pooling: str = "none", every_block: bool = False) -> Denoiser:
    swap = SwapConfig(pooling=pooling, every_block=every_block)
    config = PGMConfig(encoder_blocks=2, decoder_blocks=2, registers=registers, swap=swap, **SIZES)
    return randomised(config, V, L).double()


@cache
def mdlm(registers: int) -> Denoiser:
    return randomised(MDLMConfig(kind="mdlm", blocks=2, registers=registers, **SIZES), V, L).double()


@cache
def ar(registers: int) -> Denoiser:
    return randomised(ARConfig(kind="ar", blocks=2, registers=registers, **SIZES), V, L).double()


def rows_for(splits: list[list[bool]]) -> tuple[Tensor, Tensor]:
    groups = torch.tensor(splits)
    return torch.randint(V, groups.shape, generator=torch.Generator().manual_seed(groups.numel())), groups


def ask(model: Denoiser, tokens: Tensor, known: Tensor, asked: Tensor) -> Tensor:
    """Predictions [T, V] at the asked positions, row after row, from the known ones alone."""
    places = [mask.nonzero().squeeze(1) for mask in known]
    queries = [mask.nonzero().squeeze(1) for mask in asked]
    held = [row[at] for row, at in zip(tokens, places, strict=True)]
    out = Model(model).predict(
        pad_sequence(held, batch_first=True),
        pad_sequence(places, batch_first=True),
        known.sum(1),
        pad_sequence(queries, batch_first=True),
        asked.sum(1),
    )
    return torch.cat([row[:count] for row, count in zip(out, asked.sum(1), strict=True)])


@PROPERTY
@given(SPLITS, REGISTERS, st.sampled_from(["none", "mean", "logsumexp"]), st.booleans())
@example([[True]], 0, "logsumexp", False)
@example([[False]], 2, "mean", True)
@example([[True] * L, [False] * L], 0, "logsumexp", True)
@example(LONG, 2, "none", False)
@torch.no_grad()
def test_partition_model(splits: list[list[bool]], registers: int, pooling: str, every_block: bool) -> None:
    model = pgm(registers, pooling, every_block)
    tokens, groups = rows_for(splits)
    expected = torch.stack([pgm_logits(model, *row) for row in zip(tokens, groups, strict=True)])
    torch.testing.assert_close(model.logits(tokens, groups), expected, **EXACT)


@PROPERTY
@given(SPLITS, REGISTERS)
@example(LONG, 0)
@torch.no_grad()
def test_masked_model(splits: list[list[bool]], registers: int) -> None:
    tokens, groups = rows_for(splits)
    model = mdlm(registers)
    expected = torch.stack([mdlm_logits(model, *row) for row in zip(tokens, groups, strict=True)])
    torch.testing.assert_close(model.logits(tokens, groups), expected, **EXACT)


@pytest.mark.parametrize("kind", [pgm, mdlm], ids=["pgm", "mdlm"])
@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, 2**L - 1), st.integers(0, 2**L - 1)), min_size=1, max_size=4),
    REGISTERS,
)
@example([(0, 2**L - 1), (2**L - 1, 2**L - 1), (1, 2), (6, 0)], 2)
@torch.no_grad()
def test_predictions_from_known_tokens_alone(
    kind: Callable[[int], Denoiser], rows: list[tuple[int, int]], registers: int
) -> None:
    """Ragged in what is known and in what is asked, nothing and all among them."""
    model, bits = kind(registers), torch.arange(L)
    known, wanted = ((torch.tensor(column)[:, None] >> bits & 1).bool() for column in zip(*rows, strict=True))
    asked = wanted & ~known
    tokens, _ = rows_for(known.tolist())
    expected = model.logits(tokens, ~known)[asked]
    torch.testing.assert_close(ask(model, tokens, known, asked), expected, **EXACT)


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, L - 1), st.booleans()), min_size=1, max_size=4), REGISTERS)
@example([(0, True), (L - 1, True), (1, False), (0, False)], 2)
@torch.no_grad()
def test_autoregressive_model(rows: list[tuple[int, bool]], registers: int) -> None:
    """Its losses, and the prediction of the next token from prefixes of any lengths."""
    model, places = ar(registers), torch.arange(L)
    prefix = torch.tensor([known for known, _ in rows])[:, None]
    known, asked = places < prefix, (places == prefix) & torch.tensor([ask for _, ask in rows])[:, None]
    tokens, _ = rows_for(known.tolist())
    logits = torch.stack([ar_logits(model, row) for row in tokens])
    torch.testing.assert_close(ask(model, tokens, known, asked), logits[asked], **EXACT)
    entropies = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    losses = model(Batch(tokens, ~known, ~known, torch.ones(tokens.shape)))
    torch.testing.assert_close(losses, (entropies * ~known).sum(1).float())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@PROPERTY
@given(SPLITS, REGISTERS)
@torch.no_grad()
def test_low_precision(
    dtype: torch.dtype, tolerance: float, splits: list[list[bool]], registers: int
) -> None:
    """Logits of the same weights in float64, relative to their size."""
    tokens, groups = rows_for(splits)
    for kind in (pgm, mdlm):
        rounded = copy.deepcopy(kind(registers)).to(dtype)
        found = rounded.logits(tokens, groups)
        expected = rounded.double().logits(tokens, groups)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("causal", [True, False])
@PROPERTY
@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.lists(
            st.one_of(
                st.integers(0, 3).map(lambda count: [count] * rows),
                st.lists(st.integers(0, 4), min_size=rows, max_size=rows),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
@example([[1, 1], [1, 1], [0, 2], [1, 1]])
def test_a_growing_cache(causal: bool, steps: list[list[int]]) -> None:
    """What each new token reads is what is in its row by then: up to itself, or with those beside it."""
    rows, capacity = len(steps[0]), 4 * len(steps)
    generator = torch.Generator().manual_seed(rows)
    q, k, v = torch.randn(3, rows, capacity, 2, 4, generator=generator, dtype=torch.float64)
    cache, old = Cache(torch.zeros_like(k), torch.zeros_like(v)), [0] * rows
    for new in steps:
        if not any(new):
            continue
        growth = CacheAppend(old, new, capacity, torch.device("cpu"), causal)
        out = cache.attend(growth.take(q), growth.take(k), growth.take(v), growth)
        ends = [a + b for a, b in zip(old, new, strict=True)]
        expected = []
        for row, (start, end) in enumerate(zip(old, ends, strict=True)):
            for place in range(start, end):
                last = place + 1 if causal else end
                weights = (k[row, :last] * q[row, place]).sum(-1).div(2).softmax(0)
                expected.append((weights[..., None] * v[row, :last]).sum(0))
        torch.testing.assert_close(out, torch.stack(expected), **EXACT)
        old = ends
