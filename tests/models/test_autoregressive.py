"""The autoregressive baseline: causal, cached exactly, and asked left to right only."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import ARConfig
from pipeline.errors import CapabilityError
from pipeline.models import attention
from pipeline.models.attention import Segments, attend, flat_index
from pipeline.models.autoregressive import AR
from pipeline.models.batch import Batch
from pipeline.sampling.sampler import SamplingRequest, ragged_known, sample, sample_long
from tests.support.small_models import random_rows, randomised

V, L = 11, 16
PLAIN = ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0)
DRESSED = ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0, classes=3, registers=2)
EVERY = pytest.mark.parametrize("config", [PLAIN, DRESSED], ids=["plain", "classes and registers"])
EXACT = {"atol": 1e-9, "rtol": 0}


def causal_oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Softmax over one [T, T] mask: the same segment, and not behind the query."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (ids[:, None] == ids[None, :]).tril()
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("form", ["attend", "_each", "_masked"])
@pytest.mark.parametrize("window", [False, True])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_causal_attention(form: str, window: bool, lengths: list[int]) -> None:
    if window:  # two segments fill each window of ten
        lengths = [n for length in lengths for n in (length, 10 - length)]
    segments = Segments(lengths, window=10 if window else None)
    if not segments.total:
        return
    generator = torch.Generator().manual_seed(segments.total)
    shape = (4, segments.total, 2, 4)
    *tensors, direction = torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)
    tensors = [x.requires_grad_() for x in tensors]
    kernel: Callable[..., Tensor] = getattr(attention, form)
    out, expected = kernel(*tensors, segments, segments, True), causal_oracle(*tensors, lengths)
    torch.testing.assert_close(out, expected, **EXACT)
    grads = torch.autograd.grad((out * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("lengths", [[7, 7], [200, 130]])
def test_causal_attention_of_equal_and_of_long_segments(lengths: list[int]) -> None:
    segments = Segments(lengths)
    q, k, v = torch.randn(3, segments.total, 2, 4, dtype=torch.float64).unbind(0)
    out = attend(q, k, v, segments, segments, causal=True)
    torch.testing.assert_close(out, causal_oracle(q, k, v, lengths), **EXACT)
    with pytest.raises(AssertionError, match="self-attention"):
        attend(
            q, k, v, segments, Segments(lengths[::-1] if lengths[0] != lengths[1] else [8, 6]), causal=True
        )


def labels_for(config: ARConfig, rows: int) -> Tensor | None:
    return None if config.classes is None else torch.arange(rows) % (config.classes + 1)


def log_chances(model: AR, tokens: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy [B, L] of every token by the training form, one target at a time."""
    everything = torch.ones_like(tokens, dtype=torch.bool)
    columns = []
    for position in range(tokens.shape[1]):
        weights = torch.zeros(tokens.shape)
        weights[:, position] = 1
        columns.append(model(Batch(tokens, everything, everything, weights, labels)))
    return torch.stack(columns, 1)


@EVERY
def test_a_prediction_knows_all_before_it_and_nothing_else(config: ARConfig) -> None:
    model = randomised(config, V, L).double()
    tokens, _ = random_rows(3, L, V)
    labels = labels_for(config, 3)
    before = log_chances(model, tokens, labels)
    for position in (0, 5, L - 1):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        after = log_chances(model, changed, labels)
        assert torch.equal(before[:, :position], after[:, :position]), "leak: a token is seen from before it"
        assert (before[:, position:] != after[:, position:]).all(), "a token is not seen from behind it"


@EVERY
def test_the_cache_gives_what_the_training_form_gives(config: ARConfig) -> None:
    """Rows that start with ragged prompts and grow unevenly, some of them not at all in a step."""
    model = randomised(config, V, L).double()
    tokens, _ = random_rows(4, L, V)
    labels = labels_for(config, 4)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        state = model.open(4, labels)
        for counts in ([0, 0, 0, 0], [0, 5, 1, 3], [1, 1, 1, 1], [0, 2, 4, 0], [1, 0, 0, 3], [6, 1, 2, 1]):
            places = [
                list(range(known, known + count)) for known, count in zip(state.lengths, counts, strict=True)
            ]
            packed = torch.tensor([p for row in places for p in row], dtype=torch.int64)
            values = torch.cat([tokens[row, p] for row, p in enumerate(places)])
            model.extend(state, values, packed, counts)
            asked = [0, 1, 2, 3] if sum(counts) % 2 else [1, 3]
            query = torch.tensor([state.lengths[row] for row in asked])
            logits = model.head(model.hidden(state, query, [int(row in asked) for row in range(4)]))
            again = model.head(model.hidden(state, query, [int(row in asked) for row in range(4)]))
            assert torch.equal(logits, again), "asking changes nothing"
            weights = torch.zeros(tokens.shape)
            weights[asked, query] = 1
            expected = model(Batch(tokens, everything, everything, weights, labels))
            found = torch.nn.functional.cross_entropy(logits, tokens[asked, query], reduction="none")
            torch.testing.assert_close(found.float(), expected[asked])
            torch.testing.assert_close(logits, uncached(model, tokens, labels, asked, query), **EXACT)
    assert state.lengths == [8, 9, 8, 8]


def uncached(model: AR, tokens: Tensor, labels: Tensor | None, rows: list[int], query: Tensor) -> Tensor:
    """Logits from a fresh state for each row, all of whose tokens are read at once."""
    out = []
    for row, position in zip(rows, query.tolist(), strict=True):
        state = model.open(1, None if labels is None else labels[row : row + 1])
        model.extend(state, tokens[row, :position], torch.arange(position), [position])
        out.append(model.head(model.hidden(state, torch.tensor([position]), [1])))
    return torch.cat(out)


@EVERY
def test_all_next_tokens_of_a_row(config: ARConfig) -> None:
    """Position by position with a cache, the training form's cross-entropies."""
    model = randomised(config, V, L).double()
    tokens, _ = random_rows(3, L, V)
    labels = labels_for(config, 3)
    with torch.no_grad():
        state, found = model.open(3, labels), []
        for position in range(L):
            places = torch.full((3,), position)
            logits = model.head(model.hidden(state, places, [1, 1, 1]))
            found.append(torch.nn.functional.cross_entropy(logits, tokens[:, position], reduction="none"))
            model.extend(state, tokens[:, position], places, [1, 1, 1])
        torch.testing.assert_close(torch.stack(found, 1).float(), log_chances(model, tokens, labels))


def test_sampling_with_and_without_the_cache() -> None:
    """The same tokens, and with it one slot a row and step."""

    class Forgetful(AR):
        """Recomputes all known tokens at every step."""

        def hidden(self, state, positions, lengths):
            state.memory = None
            return super().hidden(state, positions, lengths)

    model, other = randomised(PLAIN, V, L).double(), Forgetful(PLAIN, V, L).double().eval()
    other.load_state_dict(model.state_dict())
    slots: dict[AR, list[int]] = {model: [], other: []}
    for one in slots:
        one.blocks[0].register_forward_hook(lambda _, inputs, output, one=one: slots[one].append(len(output)))
    drawn = [sample(one, SamplingRequest(3, L, seed=0, order="left_to_right")) for one in slots]
    assert torch.equal(*drawn)
    assert slots[model] == [3] * L
    assert slots[other] == [3 * (known + 1) for known in range(L)]


def test_sampling_with_bos_and_alone() -> None:
    model = randomised(PLAIN, V, L).double()
    together = sample(model, SamplingRequest(5, L - 1, seed=4, order="left_to_right", bos=2))
    assert together[:, 0].eq(2).all()
    apart = [
        sample(
            model,
            SamplingRequest(
                count, L - 1, seed=4, order="left_to_right", bos=2, indices=range(first, first + count)
            ),
        )
        for first, count in ((0, 1), (1, 4))
    ]
    assert torch.equal(together, torch.cat(apart))
    held = Model(model, bos=2)
    assert torch.equal(held.sample(5, seed=4), together), "the order and the steps follow the model"
    assert torch.equal(held.sample(5, steps=L - 1, order="left_to_right", seed=4), together)


def test_what_it_cannot_answer() -> None:
    model = randomised(PLAIN, V, L)
    tokens, groups = random_rows(2, L, V)
    with pytest.raises(CapabilityError, match=r"AR knows no groups.*predict"):
        model.logits(tokens, groups)
    with pytest.raises(CapabilityError, match="hidden tokens must be the last"):
        model(Batch(tokens, groups, groups, torch.ones(tokens.shape)))
    state = model.open(2)
    model.extend(state, torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0]), [2, 1])
    for asked, counts in (([3, 1], [1, 1]), ([2, 3, 1], [2, 1]), ([1], [1, 0])):
        with pytest.raises(CapabilityError, match=r"left to right.*position 2 alone"):
            model.hidden(state, torch.tensor(asked), counts)
    with pytest.raises(CapabilityError, match=r"known positions.*row 1.*from 1 on"):
        model.extend(state, torch.tensor([1, 1]), torch.tensor([2, 5]), [1, 1])
    assert state.lengths == [2, 1]
    with pytest.raises(
        CapabilityError, match="order: 'uniform'; an autoregressive model draws 'left_to_right'"
    ):
        sample(model, SamplingRequest(2, L, seed=0))
    with pytest.raises(CapabilityError, match=f"steps: 4 for {L} positions"):
        sample(model, SamplingRequest(2, 4, seed=0, order="left_to_right"))


@EVERY
def test_predict_asks_for_the_next_token(config: ARConfig) -> None:
    model = Model(randomised(config, V, L).double())
    tokens, _ = random_rows(3, L, V)
    labels = labels_for(config, 3)
    lengths = torch.tensor([0, 4, 2])
    positions = torch.arange(4).expand(3, -1)
    predicted = model.predict(tokens[:, :4], positions, lengths, lengths[:, None], condition=labels)
    expected = uncached(model.denoiser, tokens, labels, [0, 1, 2], lengths)
    torch.testing.assert_close(predicted[:, 0], expected, **EXACT)


def test_a_known_prefix_is_not_scored() -> None:
    """With group 0 in front the loss is that of the rest given the prefix."""
    model = randomised(PLAIN, V, L).double()
    tokens, _ = random_rows(2, L, V)
    groups = torch.arange(L) >= torch.tensor([[3], [9]])
    losses = model(Batch(tokens, groups, groups, torch.ones(tokens.shape)))
    torch.testing.assert_close(losses, (log_chances(model, tokens, None) * groups).sum(1))
    index = flat_index([1, 1], [3, 9], L)
    assert groups.flatten()[index].all()


def test_all_parameters_learn() -> None:
    model = randomised(DRESSED, V, L)
    tokens, _ = random_rows(3, L, V)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    model(
        Batch(tokens, everything, everything, torch.ones(tokens.shape), torch.tensor([0, 1, 3]))
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_prompts_and_windows() -> None:
    """Ragged prompts, default steps, and rows beyond L: always one token a step."""
    model = randomised(PLAIN, V, L).double()
    prompts = [{0: 3, 1: 4}, {}, dict.fromkeys(range(L), 5)]
    rows = Model(model).sample(3, known=prompts, seed=1)
    assert rows[0, :2].tolist() == [3, 4]
    assert rows[2].eq(5).all()
    assert torch.equal(
        rows[1:2],
        sample(model, SamplingRequest(1, L, seed=1, order="left_to_right", indices=[1])),
    )
    with pytest.raises(CapabilityError, match=r"known positions.*from 0 on"):
        Model(model).sample(1, known={4: 1})
    known = ragged_known([{0: 3, 1: 4}], L)
    long = sample_long(model, SamplingRequest(1, L - 2, 0, "left_to_right", known=known), length=40, stride=6)
    assert long.shape == (1, 40)
    assert long[0, :2].tolist() == [3, 4]
