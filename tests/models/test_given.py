"""Rows with given tokens: both groups read them, nothing is predicted there, losses and bounds are conditional."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.partition import draw, draw_order
from pipeline.metrics.continuations import greedy_matches, score_continuations
from pipeline.metrics.likelihood import Masking, masked_batches, row_sums, summarise
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.sampler import SamplingRequest, sample
from pipeline.training.distillation import hidden_sides, teach
from tests.support.dense import ar_logits, mdlm_logits, pgm_logits
from tests.support.role_batches import role_batch
from tests.support.small_models import ANY_ORDER, AR, randomised

V, L, BOS, PAD = 11, 12, 8, 10
# A prompt and an answer; a row of today, whose BOS is of group 0; one with BOS alone given; a full row; one target.
ROLES = Roles(np.array([5, 0, 1, 7, 4]), np.array([9, 7, 10, 12, 5]))
EXACT = {"atol": 1e-10, "rtol": 0}  # in float64
CONFIGS: dict[str, ModelConfig] = {**ANY_ORDER, "ar": AR}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
BOTH_GROUPS = pytest.mark.parametrize("name", ["pgm", "pgm with registers", "causal", "complementary"])
MASKED = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ar"])


def model_of(config: PGMConfig | MDLMConfig | ARConfig) -> Denoiser:
    return randomised(config, V, L).double()


def rows_with_roles(seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 8, (len(ROLES.given), L))
    rows[:, 0] = BOS
    return np.where(np.arange(L) < ROLES.lengths[:, None], rows, PAD)


def training_batch(model: Denoiser, tokens: np.ndarray | None = None, roles: Roles = ROLES) -> Batch:
    """What training makes of the rows at some step."""
    batch, divisor = role_batch(model, rows_with_roles() if tokens is None else tokens, roles, bos=True)
    assert divisor == (4 + 6 + 9 + 5 + 1) * (2 if model.both_groups else 1) or roles is not ROLES
    return batch


def dense_logits(model: Denoiser, batch: Batch, row: int) -> Tensor:
    """[n, V] of a row cut to its tokens, by the plain formulas."""
    assert batch.given is not None
    assert batch.lengths is not None
    n, given = int(batch.lengths[row]), int(batch.given[row])
    tokens, groups = batch.tokens[row, :n], batch.groups[row, :n]
    if model.left_to_right:
        return ar_logits(model, tokens)  # type: ignore[arg-type]
    if model.config.kind == "mdlm":
        shown = torch.arange(n) < given
        one = mdlm_logits(model, tokens, groups)  # type: ignore[arg-type]
        if not model.both_groups:
            return one
        zero = mdlm_logits(model, tokens, ~groups & ~shown)  # type: ignore[arg-type]
        return torch.where(groups[:, None], one, zero)
    order = None if batch.order is None else batch.order[row, :n].argsort().argsort()
    return pgm_logits(model, tokens, groups, given, order)  # type: ignore[arg-type]


def target_logits(model: Denoiser, batch: Batch) -> Tensor:
    """[Q, V], in the order of `target_index`."""
    return model.head(model.target_vectors(batch))


def of_group(batch: Batch, group: int) -> Tensor:
    """[Q], which of the targets are in a group."""
    return batch.groups.flatten()[batch.target_index] == bool(group)


@EVERY
@torch.no_grad()
def test_logits_and_losses_are_those_of_the_plain_formulas(config: ModelConfig) -> None:
    """The conditional bound of a row: cross-entropies of its targets, each from prompt and other group."""
    model = model_of(config)
    batch = training_batch(model)
    expected = torch.cat([dense_logits(model, batch, row) for row in range(len(batch.tokens))])
    starts = torch.tensor([0, *ROLES.lengths[:-1]]).cumsum(0)
    index = starts[batch.target_index // L] + batch.target_index % L
    torch.testing.assert_close(target_logits(model, batch), expected[index], **EXACT)
    tokens, weights = (batch.gather(x, batch.target_index) for x in (batch.tokens, batch.weights))
    losses = model.head(model.target_vectors(batch), tokens, weights)
    cross_entropy = -expected[index].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(losses.double(), cross_entropy * weights, **EXACT)
    torch.testing.assert_close(model(batch), batch.row_sums(losses))


@EVERY
def test_nothing_is_computed_at_given_positions(config: ModelConfig) -> None:
    """Targets are what is neither given nor padding, and the head sees exactly these."""
    model, sizes = model_of(config), list[int]()
    batch = training_batch(model)
    expected = torch.from_numpy(ROLES.targets(L, bos=True))
    if not (model.both_groups or model.left_to_right):
        expected &= batch.groups
    assert torch.equal(batch.targets, expected)
    assert torch.equal(batch.weights > 0, expected)
    model.head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model(batch).sum().backward()
    assert sizes == [int(expected.sum())]


@BOTH_GROUPS
@torch.no_grad()
def test_both_groups_read_the_prompt(name: str) -> None:
    """Other given tokens change every prediction of their row, in either group, and none of another row."""
    model = model_of(CONFIGS[name])
    tokens = rows_with_roles()
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % 8  # given
    before, after = training_batch(model, tokens), training_batch(model, other)
    changed = (target_logits(model, before) != target_logits(model, after)).any(1)
    of_row = before.target_index // L == 0
    for group in (0, 1):
        assert (of_row & of_group(before, group)).any()
    assert torch.equal(changed, of_row)
    # In a row without given tokens, the same token is read by one group alone.
    plain = Roles(np.zeros_like(ROLES.given), ROLES.lengths)
    before, after = (training_batch(model, rows, plain) for rows in (tokens, other))
    changed = (target_logits(model, before) != target_logits(model, after)).any(1)
    group = int(before.groups[0, 3])
    assert not changed[of_group(before, group)].any()


@pytest.mark.parametrize("name", [name for name in CONFIGS if "pgm" in name or name == "causal"])
def test_groups_do_not_see_themselves(name: str) -> None:
    """The gradient from a group's logits to its own targets is exactly zero; to the prompt it is not."""
    model = model_of(CONFIGS[name])
    batch = training_batch(model)
    rows = torch.arange(len(batch.tokens))[:, None]
    # An id for every (row, part): prompt 0, group 0's targets 1, group 1's targets 2.
    part = torch.where(batch.targets, 1 + batch.groups.long(), 0)
    ids = rows * 3 + part
    model.embedding = torch.nn.Embedding(3 * len(rows) + model.registers, 32, dtype=torch.float64)
    marked = Batch(
        ids,
        batch.groups,
        batch.targets,
        batch.weights,
        order=batch.order,
        lengths=batch.lengths,
        given=batch.given,
    )
    for group in (0, 1):
        logits = target_logits(model, marked)[of_group(batch, group)]
        (gradient,) = torch.autograd.grad((logits**2).sum(), model.embedding.weight)
        size = gradient[: 3 * len(rows)].abs().sum(1).view(-1, 3)
        assert size[:, 1 + group].eq(0).all(), f"group {group} sees itself"
        asked = torch.tensor([(part[row] == 1 + group).any() for row in rows])
        prompted = asked & (torch.from_numpy(ROLES.given) > 0)
        assert prompted.any()
        assert size[prompted, 0].gt(0).all(), f"group {group} does not read the prompt"


@MASKED
@torch.no_grad()
def test_a_prediction_is_that_of_sampling(name: str) -> None:
    """The model, given the prompt and the other group's tokens, predicts the same."""
    model = model_of(CONFIGS[name])
    batch = training_batch(model)
    assert batch.order is None or (batch.order[0, 1:5] < 5).all()  # the prompt comes first
    logits, order = target_logits(model, batch), torch.arange(L) if batch.order is None else batch.order[0]
    for group in (0, 1) if model.both_groups else (1,):
        own = of_group(batch, group) & (batch.target_index < L)
        visible = batch.known[0] | (batch.targets[0] & (batch.groups[0] != bool(group)))
        if not model.both_groups:
            visible = ~batch.groups[0] & (torch.arange(L) < 9)
        places = order.argsort()
        places = places[visible[places]]
        state = model.open(1, extents=[9])
        model.extend(state, batch.tokens[0, places], places, [len(places)])
        queries = batch.target_index[own]
        found = model.head(model.hidden(state, queries, [len(queries)]))
        if model.registers and model.config.kind == "pgm" and group == 0:
            continue  # sampling knows the registers of group 0, which the predictions of group 0 do not read
        torch.testing.assert_close(found, logits[own], **EXACT)


@pytest.mark.parametrize(("name", "estimator"), [("pgm", "count"), ("causal", "mdlm"), ("mdlm", "count")])
@torch.no_grad()
def test_estimates_hide_targets_alone(name: str, estimator: str) -> None:
    model, masking = model_of(CONFIGS[name]), Masking(estimator, 2, 0, bos=True, batch=4)  # type: ignore[arg-type]
    allowed = torch.from_numpy(ROLES.targets(L, bos=True))
    for index, batch in masked_batches(masking, rows_with_roles(), roles=ROLES):
        real = torch.from_numpy(index >= 0)  # the others fill up the batch
        assert not (batch.groups & ~allowed[index])[real].any()
        if estimator == "count":
            assert batch.weights.sum(1)[real].numpy() == pytest.approx(1, abs=1e-6)
        for place, row in enumerate(index.tolist()):
            if row < 0:
                continue
            logits = dense_logits(model, batch, place)
            n = len(logits)
            losses = -logits.log_softmax(-1).gather(1, batch.tokens[place, :n, None])[:, 0]
            expected = (losses * batch.weights[place, :n]).sum()
            assert float(model(batch)[place]) == pytest.approx(float(expected), abs=1e-5)


def pairs_of(tokens: np.ndarray) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [
        (row[1 : max(given, 1)].tolist(), row[max(given, 1) : end].tolist())
        for row, given, end in zip(tokens, ROLES.given, ROLES.lengths, strict=True)
    ]


@pytest.mark.parametrize("name", ["pgm", "causal", "mdlm", "ar"])
@torch.no_grad()
def test_the_bound_of_answers_is_that_of_score(name: str) -> None:
    """Equal where there is nothing to draw, and otherwise within the errors of the draws."""
    model, tokens = model_of(CONFIGS[name]), rows_with_roles()
    estimator = "exact" if model.left_to_right else "count"
    masking = Masking(estimator, 1 if model.left_to_right else 64, 0, bos=True, batch=64)
    sums = row_sums(model, masked_batches(masking, tokens, roles=ROLES), len(tokens)) / masking.draws
    scores = score_continuations(model, pairs_of(tokens), 64, bos=BOS, batch=64, whole=True)
    for mean, count, score in zip(sums.tolist(), ROLES.counts(True).tolist(), scores, strict=True):
        assert score.tokens == count
        # A causal model reads prompts in random orders.
        exact = model.left_to_right or (count == 1 and not model.causal)
        allowed = 1e-5 if exact else 6 * score.stderr  # of a difference of two such estimates
        assert abs(mean * count - score.nats) < allowed
    nats = sum(score.nats for score in scores) / ROLES.counts(True).sum()
    assert summarise(sums * masking.draws, masking, ROLES).nats == pytest.approx(nats, rel=0.1)


@EVERY
def test_samples_keep_the_prompt_and_answer_it(config: ModelConfig) -> None:
    model = model_of(config)
    tokens, given = torch.from_numpy(rows_with_roles()), torch.arange(L) < 5
    request = SamplingRequest(
        len(tokens),
        4 if not model.left_to_right else L - 5,
        bos=BOS,
        order="left_to_right" if model.left_to_right else "uniform",
        known=(tokens, given.expand_as(tokens)),
    )
    rows = sample(model, request)
    assert torch.equal(rows[:, :5], torch.where(given, tokens, rows)[:, :5])
    prompt = tokens[0, 1:5].tolist()
    ids = [[i] for i in range(V)]
    state = model.open(1, extents=[6])
    places = torch.arange(5)
    model.extend(state, tokens[0, :5], places, [5])
    if not model.causal:
        with torch.no_grad():
            best = int(model.head(model.hidden(state, torch.tensor([5]), [1])).argmax())
        assert greedy_matches(model, [(prompt, answer) for answer in ids], BOS, whole=True) == [
            i == best for i in range(V)
        ]


@pytest.mark.parametrize("form", ["compatible", "complementary"])
@pytest.mark.parametrize("name", ["pgm", "causal"])
@torch.no_grad()
def test_a_teacher_rolls_out_rows_with_roles_as_rows_alone(name: str, form: str) -> None:
    model, tokens = model_of(CONFIGS[name]), rows_with_roles()
    draws = draw(DiffusionConfig(), seed=1, step=0, shape=tokens.shape, bos=True, least=0.2)
    sides = hidden_sides(draws, 0.1, form, 1e-3, True)  # type: ignore[arg-type]
    sides = sides._replace(hidden=sides.hidden & ROLES.targets(L, True)[:, None])
    noise = np.random.default_rng(0).random((len(tokens), 2, 2, L))
    order = draw_order([0], range(len(tokens)), L, True, ROLES.known(L)) if model.causal else None
    together = teach(model, tokens, sides, noise, 0.1, order=order, roles=ROLES)
    alone = []
    for row, n in enumerate(ROLES.lengths):
        cut = slice(row, row + 1)
        own = sides._replace(hidden=sides.hidden[cut, :, :n], time=sides.time[cut])
        ranks = None if order is None else order[cut, :n].argsort(1).argsort(1)
        alone.append(teach(model, tokens[cut, :n], own, noise[cut, ..., :n], 0.1, order=ranks))
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)
