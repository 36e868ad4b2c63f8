"""Rows with padding: everything is as if each row had been computed alone, cut to its tokens."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import StepDraws, draw, draw_order
from pipeline.errors import CapabilityError, ConfigError
from pipeline.metrics.likelihood import Masking, masked_batches, row_sums, summarise
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.row_ends import RowEnds, cut_rows, sample_rows
from pipeline.sampling.sampler import SamplingRequest, ragged_known, sample
from tests.support.small_models import CAUSAL, MDLM, PGM, randomised

V, L, BOS, EOT, PAD = 11, 12, 8, 9, 10
LENGTHS = np.array([12, 3, 7, 5, 2])
ROLES = Roles(np.zeros_like(LENGTHS), LENGTHS)
EXACT = {"atol": 1e-10, "rtol": 0}  # in float64
CONFIGS: dict[str, ModelConfig] = {
    "pgm": PGM,
    "pgm with registers": PGM.model_copy(update={"registers": 2}),
    "causal": CAUSAL,
    "mdlm": MDLM,
    "complementary": MDLM.model_copy(update={"complementary": True, "registers": 1}),
    "ar": ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
MASKED = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ar"])


def model_of(config: PGMConfig | MDLMConfig | ARConfig) -> Denoiser:
    return randomised(config, V, L).double()


def padded_rows(seed: int = 0) -> np.ndarray:
    """Rows of `LENGTHS` tokens: BOS, ids below 8, the end of text, padding."""
    rows = np.random.default_rng(seed).integers(0, 8, (len(LENGTHS), L))
    places = np.arange(L)
    rows[:, 0] = BOS
    return np.where(places < LENGTHS[:, None] - 1, rows, np.where(places == LENGTHS[:, None] - 1, EOT, PAD))


def training_batches(model: Denoiser) -> tuple[Batch, list[Batch]]:
    """The padded rows as one batch, and each cut row as a batch of its own, with the same draws."""
    objective = Objective(DiffusionConfig(), True, model.both_groups, model.left_to_right)
    tokens = padded_rows()
    draws = draw(DiffusionConfig(), seed=3, step=5, shape=tokens.shape, bos=True)
    order = draw_order([3, 5], range(len(tokens)), L, bos=True)
    divisor = objective.normaliser(draws.groups, int((LENGTHS - 1).sum()))
    assert divisor == (LENGTHS - 1).sum() * (2 if model.both_groups else 1)
    device = torch.device("cpu")
    alone = [
        objective.batch(
            tokens[[row], :n],
            StepDraws(draws.t[[row]], draws.groups[[row], :n]),
            np.ones(1, bool),
            divisor=divisor,
            order=order[[row], :n].argsort(1).argsort(1),
            device=device,
        )
        for row, n in enumerate(LENGTHS)
    ]
    together = objective.batch(
        tokens,
        draws,
        np.ones(len(tokens), bool),
        divisor=divisor,
        order=order,
        roles=ROLES,
        device=device,
    )
    return together, alone


def gradients(model: Denoiser, losses: Iterator[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and the gradient of their sum."""
    model.zero_grad()
    found = [*losses]
    torch.cat(found).sum().backward()
    return found, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


@EVERY
def test_losses_and_gradients_are_those_of_the_rows_alone(config: ModelConfig) -> None:
    model = model_of(config)
    together, alone = training_batches(model)
    losses, gradient = gradients(model, map(model, [together]))
    expected, expected_gradient = gradients(model, map(model, alone))
    torch.testing.assert_close(
        losses[0].double(), torch.cat(expected).double(), atol=1e-7, rtol=0
    )  # float32 sums
    assert any(g.abs().max() > 1e-4 for g in gradient)
    for of_both, of_each in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(of_both, of_each, **EXACT)


@EVERY
def test_padding_is_not_read(config: ModelConfig) -> None:
    """Other ids in the padding change nothing."""
    model = model_of(config)
    together, _ = training_batches(model)
    changed = torch.where(together.padding, 3, together.tokens)
    assert not torch.equal(changed, together.tokens)
    other = Batch(
        changed,
        together.groups,
        together.targets,
        together.weights,
        order=together.order,
        lengths=together.lengths,
    )
    with torch.no_grad():
        assert torch.equal(model.target_vectors(together), model.target_vectors(other))


@EVERY
def test_padding_is_not_computed(config: ModelConfig) -> None:
    """The tokens that are embedded are those of the rows, for every masking that the model learns from."""
    model = model_of(config)
    counts: list[int] = []
    model.embedding.register_forward_hook(lambda *call: counts.append(call[1][0].numel()))
    together, _ = training_batches(model)
    with torch.no_grad():
        model(together)
    passes = 2 if config.kind == "mdlm" and config.complementary else 1
    assert sum(counts) == passes * (LENGTHS.sum() + len(LENGTHS) * config.registers)
    # An autoregressive model reads a start vector in place of the last token, of every row.


@pytest.mark.parametrize("estimator", ["count", "mdlm"])
@MASKED
@torch.no_grad()
def test_bounds_are_those_of_the_rows_alone(name: str, estimator: str) -> None:
    """Every estimate of a padded row is that of the cut row under the same masking."""
    model, tokens, masking = (
        model_of(CONFIGS[name]),
        padded_rows(),
        Masking(estimator, 4, 0, bos=True, batch=5),
    )
    for index, batch in masked_batches(masking, tokens, roles=ROLES):
        assert not (batch.targets & batch.padding).any()
        assert batch.targets.any()
        found = model(batch)
        for place, row in enumerate(index.tolist()):
            n = int(LENGTHS[row])
            cut = [field[[place], :n] for field in (batch.tokens, batch.groups, batch.targets, batch.weights)]
            order = batch.order[[place], :n].argsort(1).argsort(1)
            torch.testing.assert_close(found[[place]], model(Batch(*cut, order=order)), atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_the_exact_likelihood_counts_every_token_once() -> None:
    model, tokens, masking = model_of(CONFIGS["ar"]), padded_rows(), Masking("exact", 1, 0, bos=True)
    sums = row_sums(model, masked_batches(masking, tokens, roles=ROLES), len(tokens))
    total = 0.0
    for row, n in zip(tokens, LENGTHS, strict=True):
        (alone,) = row_sums(model, masked_batches(masking, row[None, :n]), 1)
        total += float(alone) * (n - 1)
    assert summarise(sums, masking, ROLES).nats == pytest.approx(total / (LENGTHS - 1).sum(), rel=1e-6)


def test_the_interval_of_unequal_rows_covers_the_truth() -> None:
    """Rows of 1 to 20 tokens with a mean that depends on their length: nats per token, not per row."""
    rng, masking = np.random.default_rng(0), Masking("count", 1, 0)
    covered = 0
    for _ in range(400):
        lengths = rng.integers(1, 21, 300)
        per_row = 1 + lengths / 10 + rng.normal(0, 1, 300)
        bound = summarise(torch.from_numpy(per_row), masking, Roles(np.zeros_like(lengths), lengths))
        truth = np.mean(np.arange(1, 21) * (1 + np.arange(1, 21) / 10)) / np.mean(np.arange(1, 21))
        assert bound.interval
        covered += bound.interval[0] <= truth <= bound.interval[1]
    assert covered / 400 == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize("order", ["uniform", "binomial", "entropy"])
@MASKED
def test_samples_are_those_of_a_model_of_the_row_s_length(name: str, order: str) -> None:
    """A row of n tokens is drawn as by the same weights with L = n; what lies behind is padding."""
    ends = RowEnds(EOT, PAD, (0,) * 7 + (1,))  # every training row has 7 tokens
    model = model_of(CONFIGS[name])
    request = SamplingRequest(3, 3, seed=1, order=order, bos=BOS)
    rows = sample_rows(model, request, ends)
    assert (rows[:, 0] == BOS).all()
    assert (rows[:, 6] == EOT).all()
    assert (rows[:, 7:] == PAD).all()
    other = sample_rows(model, request, ends, length=5)
    assert (other[:, 4] == EOT).all()
    assert (other[:, 5:] == PAD).all()
    # The model is asked for the same predictions in a row that ends at n: padding in the state changes nothing.
    state = model.open(1, extents=[7])
    model.extend(state, torch.tensor([BOS, EOT]), torch.tensor([0, 6]), [2])
    if CONFIGS[name].kind == "mdlm":
        short = randomised(CONFIGS[name], V, 7).double()
        short.load_state_dict(model.state_dict())
        cut = short.open(1)
        short.extend(cut, torch.tensor([BOS, EOT]), torch.tensor([0, 6]), [2])
        places = torch.tensor([1, 2, 3])
        with torch.no_grad():
            torch.testing.assert_close(
                model.hidden(state, places, [3]), short.hidden(cut, places, [3]), **EXACT
            )


def test_lengths_are_those_of_the_training_rows_and_do_not_depend_on_the_batch() -> None:
    ends, model = RowEnds(EOT, PAD, (0, 0, 0, 30, 0, 50, 0, 20)), model_of(PGM)
    request = SamplingRequest(200, 1, seed=4, bos=BOS)
    rows = sample_rows(model, request, ends)
    lengths = (rows != PAD).sum(1)
    # The model may draw the end of text or padding itself, so the real length is where the given end stands.
    shares = [
        float((rows[:, n - 1] == EOT)[(rows[:, n:] == PAD).all(1)].float().sum()) / 200 for n in (3, 5, 7)
    ]
    assert shares == pytest.approx([0.3, 0.5, 0.2], abs=0.1)
    assert set(lengths.tolist()) <= set(range(2, 8))
    part = SamplingRequest(20, 1, seed=4, bos=BOS, indices=range(100, 120))
    assert torch.equal(sample_rows(model, part, ends), rows[100:120])


def test_a_given_token_is_inside_its_row() -> None:
    """Lengths are those of the training rows that have room for what is given."""
    ends, model = RowEnds(EOT, PAD, (0, 0, 0, 30, 0, 50, 0, 1)), model_of(PGM)
    request = SamplingRequest(40, 1, bos=BOS, known=ragged_known([{4: 1}] * 20 + [{}] * 20, L))
    rows = sample_rows(model, request, ends)
    assert (rows[:20, 4] == 1).all()
    assert (rows[:20, 6] == EOT).all()
    assert (rows[20:, 6] == EOT).sum() < 10
    for length, message in ((5, "length: 5; expected an integer from 6 to 12"), (13, "from 6 to 12")):
        with pytest.raises(ConfigError, match=message):
            sample_rows(model, request, ends, length=length)
    with pytest.raises(ConfigError, match="no training row has more than 7"):
        sample_rows(model, replace(request, known=ragged_known([{8: 1}] * 40, L)), ends)
    with pytest.raises(CapabilityError, match="rows without padding"):
        sample_rows(model, request, None, length=5)


def test_an_autoregressive_model_ends_its_rows_itself() -> None:
    ends, model = RowEnds(EOT, PAD, (0, 0, 1)), model_of(CONFIGS["ar"])
    request = SamplingRequest(50, L - 1, seed=0, order="left_to_right", bos=BOS)
    rows, plain = sample_rows(model, request, ends), sample(model, request)
    cut = cut_rows(rows.numpy(), EOT, PAD)
    assert len({len(row) for row in cut}) > 2
    for row, whole, padded in zip(cut, plain.numpy(), rows.numpy(), strict=True):
        assert (row == whole[: len(row)]).all()
        assert (padded[len(row) :] == PAD).all()
        assert EOT not in row[1:-1]
