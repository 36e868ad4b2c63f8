"""The order-causal encoder: cached predictions are those of one full pass, and nothing is encoded twice."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import PGMConfig, SwapConfig
from pipeline.errors import CapabilityError
from pipeline.models import build
from pipeline.models.batch import Batch, State
from pipeline.models.denoiser import Denoiser
from pipeline.models.pgm import PGM as PartitionModel
from pipeline.models.pgm import EncoderCache
from pipeline.sampling import orders
from pipeline.sampling.sampler import SamplingRequest, sample, sample_long
from tests.models.test_leaks import V as VALUES
from tests.models.test_leaks import check_values, partitioned
from tests.support.small_models import CAUSAL, random_rows, randomised, shake

V, L = 11, 16
EXACT = {"atol": 1e-10, "rtol": 0}  # in float64
POOLED = SwapConfig(pooling="logsumexp", query="mlp4", norm="rms", every_block=True)
CONFIGS = {
    "plain": CAUSAL,
    "registers": CAUSAL.model_copy(update={"registers": 4}),
    "classes": CAUSAL.model_copy(update={"classes": 3}),
    "pooled swaps": CAUSAL.model_copy(update={"swap": POOLED, "registers": 2, "classes": 3}),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_order(rows: int, length: int, seed: int = 0) -> Tensor:
    """The positions of every row in a random order."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)).argsort(1)


def reveal(model: Denoiser, state: State, tokens: Tensor, order: Tensor, counts: Sequence[int]) -> None:
    """Add the next `counts[b]` tokens of every row in its order."""
    parts = [row[n : n + count] for row, n, count in zip(order, state.lengths, counts, strict=True)]
    values = [row[places] for row, places in zip(tokens, parts, strict=True)]
    model.extend(state, torch.cat(values), torch.cat(parts), counts)


def compare_with_full_passes(model: Denoiser, condition: Tensor | None) -> None:
    """Reveal ragged rows step by step; at each step compare predictions with one pass over all that is known."""
    rows, length = 4, model.length
    tokens, _ = random_rows(rows, length, V)
    order = random_order(rows, length)
    state, done = model.open(rows, condition), [0] * rows
    for counts, asked in [
        ([0, 0, 0, 0], [1, 2, 0, 3]),
        ([3, 1, 0, 2], [2, 2, 2, 2]),
        ([1, 1, 1, 1], [2, 0, 1, 0]),
        ([2, 2, 2, 2], [0, 0, 0, 0]),
        ([0, 5, 1, 1], [1, 1, 1, 1]),
        ([0, 0, 0, 0], [3, 3, 3, 3]),
    ]:
        reveal(model, state, tokens, order, counts)
        done = [n + count for n, count in zip(done, counts, strict=True)]
        unknown = [row[n:] for row, n in zip(order, done, strict=True)]
        queries = [row[:n] for row, n in zip(unknown, asked, strict=True)]
        found = model.head(model.hidden(state, torch.cat(queries), asked)).split(asked)
        groups = torch.stack([torch.isin(torch.arange(length), row) for row in unknown])
        expected = model.logits(tokens, groups, condition, order.argsort(1))
        for row, places in enumerate(queries):
            torch.testing.assert_close(found[row], expected[row, places], **EXACT)


@EVERY
@torch.no_grad()
def test_the_cached_form_is_one_causal_pass(config: PGMConfig) -> None:
    labels = None if config.classes is None else torch.tensor([0, 2, 3, 1])
    compare_with_full_passes(randomised(config, V, L).double(), labels)


@torch.no_grad()
def test_a_bidirectional_encoder_is_found_out() -> None:
    model = randomised(CAUSAL, V, L).double()
    for block in model.encoder:
        block.causal = False
    with pytest.raises(AssertionError):
        compare_with_full_passes(model, None)


@torch.no_grad()
def test_old_outputs_stay_bit_equal() -> None:
    model = randomised(CAUSAL, V, L)
    tokens, _ = random_rows(3, L, V)
    order = random_order(3, L)
    state = model.open(3)
    kept: list[tuple[Tensor, Tensor]] = []
    for counts in ([4, 4, 4], [1, 0, 2], [3, 3, 3], [1, 1, 1]):
        reveal(model, state, tokens, order, counts)
        model.hidden(state, order[:, -1], [1, 1, 1])
        memory: EncoderCache = state.memory
        caches = [part.cache for part in (*memory.encoder, *memory.swaps, *memory.decoder)]
        stored = [x for cache in caches for x in (cache.keys, cache.values)]
        for old, now in kept:
            filled = old.flatten(2).ne(0).any(-1)
            assert torch.equal(old[filled], now[filled])
        kept = [(x.clone(), x) for x in stored]
    assert memory.done == state.lengths


@torch.no_grad()
def test_the_order_matters() -> None:
    """Else the tests above would say nothing: another order of the same tokens gives other logits."""
    model = randomised(CAUSAL, V, L)
    tokens, groups = random_rows(3, L, V)
    one, other = (model.logits(tokens, groups, order=random_order(3, L, seed)) for seed in (0, 1))
    assert (one - other).abs().max() > 1e-3
    ascending = torch.arange(L).expand(3, -1)
    assert torch.equal(model.logits(tokens, groups), model.logits(tokens, groups, order=ascending))


def test_parameters_are_those_of_the_bidirectional_model() -> None:
    bidirectional = build(CAUSAL.model_copy(update={"encoder": "bidirectional"}), V, L)
    shapes = {name: value.shape for name, value in bidirectional.state_dict().items()}
    assert shapes == {name: value.shape for name, value in build(CAUSAL, V, L).state_dict().items()}


class Counted(PartitionModel):
    """Counts the tokens that the encoder computes."""

    encoded = 0

    def run_blocks(self, blocks, ids, *rest):  # type: ignore[no-untyped-def, override]
        self.encoded += len(ids)
        return super().run_blocks(blocks, ids, *rest)


@pytest.mark.parametrize("order", orders.ORDERS)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_nothing_is_encoded_twice(order: str, steps: int) -> None:
    model = shake(Counted(CAUSAL, V, L), 0.1)
    revealed_at = torch.zeros(5, L, dtype=torch.int64)
    request = SamplingRequest(5, steps, order=order)
    sample(model, request, revealed_at=revealed_at)
    last = revealed_at.amax(1, keepdim=True)
    assert model.encoded == int((revealed_at < last).sum())


@pytest.mark.parametrize("order", orders.ORDERS)
def test_a_row_is_the_same_in_any_batch(order: str) -> None:
    """Around a prompt, with BOS, registers, classes and guidance."""
    model = randomised(CONFIGS["pooled swaps"], V, 17).double()  # BOS, and a grid for Halton
    given = torch.zeros(4, 17, dtype=torch.bool)
    given[:, [0, 3, 8]] = True
    known = torch.full((4, 17), 5), given
    known[0][:, 0] = 2  # BOS
    labels = torch.tensor([0, 1, 2, 0])
    request = SamplingRequest(4, 6, 7, order, 2, labels, known, guidance=1.5)
    together = sample(model, request)
    for row in (0, 3):
        own = slice(row, row + 1)
        one = SamplingRequest(
            1, 6, 7, order, 2, labels[own], (known[0][own], given[own]), guidance=1.5, indices=[row]
        )
        assert torch.equal(sample(model, one)[0], together[row])
    assert together[:, 0].eq(2).all()
    assert together[:, [3, 8]].eq(5).all()


def test_given_tokens_come_in_an_order_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = randomised(CAUSAL, V, L), []
    extend = model.extend

    def watch(state: State, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> None:
        seen.append(positions.tolist())
        extend(state, tokens, positions, lengths)

    monkeypatch.setattr(model, "extend", watch)
    tokens, given = torch.ones(1, L, dtype=torch.int64), torch.ones(1, L, dtype=torch.bool)
    tokens[0, 0], given[0, -1] = 2, False
    for seed in (0, 0, 1):
        sample(model, SamplingRequest(1, 1, seed, bos=2, known=(tokens, given)))
    first, again, other = seen[::2]
    assert first == again != other
    assert first[0] == other[0] == 0, "BOS comes first"
    assert sorted(first) == list(range(L - 1)) != first


def test_refresh_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"refresh_every: 4 for PGM; expected 1"):
        sample(randomised(CAUSAL, V, L), SamplingRequest(2, 4, refresh_every=4))


@EVERY
def test_every_parameter_learns(config: PGMConfig) -> None:
    model = randomised(config, V, L)
    tokens, groups = random_rows(4, L, V)
    groups[0], groups[1] = True, False
    labels = None if config.classes is None else torch.tensor([0, 2, 3, 1])
    every, order = torch.ones_like(groups), random_order(4, L)
    losses = model(Batch(tokens, groups, every, every.float(), labels, order=order))
    grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
    rows = (x[2:3] for x in (tokens, groups, every, every.float()))
    alone = model(Batch(*rows, None if labels is None else labels[2:3], order=order[2:3]))
    torch.testing.assert_close(alone, losses[2:3], atol=0, rtol=1e-5)
    assert np.isfinite(float(losses.sum()))


class InOrder:
    """A model whose logits are those of one random order of every row."""

    def __init__(self, model: Denoiser, order: Tensor):
        self._model, self._order = model, order

    def logits(self, tokens: Tensor, groups: Tensor) -> Tensor:
        return self._model.logits(tokens, groups, order=self._order)


@EVERY
def test_no_leak_in_a_random_order(config: PGMConfig) -> None:
    """Of either group, also beside the registers."""
    model = randomised(config, VALUES, L).double()
    tokens, groups = partitioned(5, L, equal=False)
    check_values(InOrder(model, random_order(5, L)), tokens, groups)  # type: ignore[arg-type]


def test_rows_beyond_the_length() -> None:
    """A window is encoded again for the next one, with a prompt in front."""
    model = randomised(CAUSAL, V, L)
    given = torch.zeros(3, L, dtype=torch.bool)
    given[:, :2] = True
    request = SamplingRequest(3, 8, 1, "left_to_right", known=(torch.full((3, L), 4), given))
    rows = sample_long(model, request, length=2 * L, stride=L // 2)
    assert rows.shape == (3, 2 * L)
    assert torch.equal(rows[:, :L], sample(model, request))
    assert rows[:, :2].eq(4).all()


@torch.no_grad()
def test_low_precision() -> None:
    """Vectors of the cached form in bfloat16, whose weights are folded, against the full pass in float32."""
    model = randomised(CAUSAL, V, L, scale=0.1)
    tokens, _ = random_rows(4, L, V)
    order = random_order(4, L)
    expected = model.logits(
        tokens, torch.ones(4, L).bool().scatter(1, order[:, :9], False), order=order.argsort(1)
    )
    state = model.bfloat16().open(4)
    for counts in ([4] * 4, [5] * 4):
        reveal(model, state, tokens, order, counts)
        hidden = model.hidden(state, order[:, 9:].flatten(), [L - 9] * 4)
    found = model.head(hidden).view(4, L - 9, V)
    wanted = expected.gather(1, order[:, 9:, None].expand(-1, -1, V))
    assert (found - wanted).abs().max() < 0.04 * wanted.abs().max()
