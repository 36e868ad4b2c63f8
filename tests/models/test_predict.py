"""Predicting from known tokens alone is the training form's answer at those positions."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.models.batch import Batch
from tests.support.small_models import BOTH_KINDS, MDLM, PGM, random_rows, randomised

V, L = 11, 16
EXACT = {"atol": 1e-10, "rtol": 0}  # in float64
KINDS = pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)


@pytest.fixture(scope="module", params=BOTH_KINDS, ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(randomised(request.param, V, L).double())


def ragged(
    chosen: Tensor, values: Tensor, extra: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen entries of every row in random order, padded with nonsense: positions, values, lengths."""
    lengths = chosen.sum(1)
    width = int(lengths.max()) + extra
    positions = torch.randint(L, (len(chosen), width), generator=generator)
    out = torch.randint(V, (len(chosen), width), generator=generator)
    for row, count in enumerate(lengths.tolist()):
        places = chosen[row].nonzero().squeeze(1)[torch.randperm(count, generator=generator)]
        positions[row, :count], out[row, :count] = places, values[row, places]
    return positions, out, lengths


def check(model: Model, groups: Tensor, asked: Tensor, extra: int, seed: int) -> None:
    """Known: all of group 0. Asked: some of group 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, groups.shape, generator=generator)
    positions, known, lengths = ragged(~groups, tokens, extra, generator)
    queries, _, query_lengths = ragged(groups & asked, tokens, extra, generator)
    predicted = model.predict(known, positions, lengths, queries, query_lengths)
    expected = model.logits(tokens, groups)
    assert predicted.shape == (*queries.shape, V)
    assert predicted.dtype == torch.float64
    for row, count in enumerate(query_lengths.tolist()):
        at = expected[row, queries[row, :count]]
        torch.testing.assert_close(predicted[row, :count], at, **EXACT)
        assert predicted[row, count:].eq(0).all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 2**L - 1), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**L - 1), min_size=4, max_size=4),
    st.integers(0, 3),
)
@example([2**L - 1], [2**L - 1] * 4, 0)  # nothing known, everything asked
@example([2**L - 1, 2**L - 1], [1, 2, 0, 0], 2)
@example([2**L - 1, 255, 0], [2**L - 1] * 4, 0)  # row 0: nothing known; row 2: nothing to ask
@example([255, 1], [2**L - 1] * 4, 3)  # more padding than a row has positions
def test_predict_is_logits_at_hidden_positions(
    model: Model, hidden: list[int], asked: list[int], extra: int
) -> None:
    bits = torch.arange(L)
    groups = (torch.tensor(hidden)[:, None] >> bits & 1).bool()
    wanted = (torch.tensor(asked[: len(hidden)])[:, None] >> bits & 1).bool()
    check(model, groups, wanted, extra, seed=len(hidden))


def test_with_bos(model: Model) -> None:
    _, groups = random_rows(5, L, V)
    groups[:, 0] = False
    groups[0, 1:] = True  # only BOS is known
    check(Model(model.denoiser, bos=0), groups, torch.ones_like(groups), 1, seed=1)


def test_float32(model: Model) -> None:
    """The same weights in float32: rounding, relative to the largest logit."""
    tokens, groups = random_rows(5, L, V)
    generator = torch.Generator().manual_seed(0)
    positions, known, lengths = ragged(~groups, tokens, 1, generator)
    queries, _, query_lengths = ragged(groups, tokens, 1, generator)
    given = known, positions, lengths, queries, query_lengths
    expected = model.predict(*given)
    predicted = Model(copy.deepcopy(model.denoiser).float()).predict(*given)
    assert predicted.dtype == torch.float32
    assert (predicted - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_long_rows(model: Model) -> None:
    """Segments long enough for a call each."""
    denoiser = randomised(PGM if type(model.denoiser).__name__ == "PGM" else MDLM, V, 200).double()
    tokens, groups = random_rows(2, 200, V)
    known = [row[~group] for row, group in zip(tokens, groups, strict=True)]
    places = [(~group).nonzero().squeeze(1) for group in groups]
    asked = [group.nonzero().squeeze(1) for group in groups]
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in known])
    predicted = Model(denoiser).predict(
        pad(known, batch_first=True),
        pad(places, batch_first=True),
        lengths,
        pad(asked, batch_first=True),
        200 - lengths,
    )
    expected = Model(denoiser).logits(tokens, groups)
    for row, positions in enumerate(asked):
        at = expected[row, positions]
        torch.testing.assert_close(predicted[row, : len(positions)], at, **EXACT)


def test_all_queries_are_asked_by_default(model: Model) -> None:
    known, positions = torch.tensor([[3, 4], [5, 0]]), torch.tensor([[0, 9], [7, 0]])
    queries = torch.tensor([[1, 2, 3], [15, 0, 4]])
    got = model.predict(known, positions, torch.tensor([2, 1]), queries)
    torch.testing.assert_close(
        got, model.predict(known, positions, torch.tensor([2, 1]), queries, torch.tensor([3, 3]))
    )
    alone = model.predict(known[1:, :1], positions[1:, :1], torch.tensor([1]), queries[1:])
    torch.testing.assert_close(got[1:], alone, **EXACT)


def test_knowledge_grows_step_by_step(model: Model) -> None:
    """Rows extended unevenly, and asked in between, know what rows extended at once know."""
    denoiser = model.denoiser
    tokens, _ = random_rows(3, L, V)
    steps = [[1, 1, 1], [2, 0, 3], [2, 2, 2], [0, 0, 0], [1, 4, 0]]
    order = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    queries = order[:, -3:]
    with torch.no_grad():
        grown, done = denoiser.open(3), [0, 0, 0]
        for counts in steps:
            places = [row[n : n + count] for row, n, count in zip(order, done, counts, strict=True)]
            values = [row[place] for row, place in zip(tokens, places, strict=True)]
            denoiser.extend(grown, torch.cat(values), torch.cat(places), counts)
            done = [n + count for n, count in zip(done, counts, strict=True)]
            hidden = denoiser.hidden(grown, queries.flatten(), [3, 3, 3])
            known = tokens.gather(1, order)
            at_once = model.predict(known, order, torch.tensor(done), queries)
            logits = denoiser.head(hidden).view_as(at_once)
            torch.testing.assert_close(logits, at_once, **EXACT)
    assert grown.lengths == [6, 7, 6]


@KINDS
def test_loss_is_the_cross_entropy_of_logits(config: PGMConfig | MDLMConfig) -> None:
    """What training minimises is what `logits` shows, position by position."""
    denoiser = randomised(config, V, L).double()
    tokens, groups = random_rows(4, L, V)
    groups[1], groups[2] = False, True
    every = torch.ones_like(groups) if config.kind == "pgm" else groups
    some = every & (torch.rand(4, L, generator=torch.Generator().manual_seed(5)) < 0.6)
    logits = denoiser.logits(tokens, groups)
    picked = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    weights = torch.rand(4, L, generator=torch.Generator().manual_seed(6))
    for targets in (every, some, groups, torch.zeros_like(groups)):
        losses = denoiser(Batch(tokens, groups, targets, weights))
        expected = (picked * weights * targets).sum(1)
        torch.testing.assert_close(losses.double(), expected, atol=0, rtol=1e-7)  # rounded to float32 once
        grads = torch.autograd.grad(losses.sum(), list(denoiser.parameters()))
        assert all(grad.isfinite().all() for grad in grads)


def test_the_masked_model_predicts_masked_tokens_only() -> None:
    tokens, groups = random_rows(2, L, V)
    with pytest.raises(AssertionError, match="masked tokens only"):
        randomised(MDLM, V, L)(Batch(tokens, groups, ~groups, torch.ones(tokens.shape)))
