"""Class condition and registers, in every kind of model."""

import pytest
import torch

from pipeline.api import Model
from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.errors import CapabilityError
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.models.test_leaks import CHECKS, partitioned
from tests.models.test_predict import ragged
from tests.support.small_models import MDLM, PGM, random_rows, randomised, shake

V, L, C = 12, 16, 3
BOS = V + 1  # as in image data: V is the mask
IMAGE_PGM = PGM.model_copy(update={"classes": C, "registers": 4})
IMAGE_MDLM = MDLM.model_copy(update={"classes": C, "registers": 3})
IMAGE_AR = ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0, classes=C)
GROUPED = pytest.mark.parametrize("config", [IMAGE_PGM, IMAGE_MDLM], ids=["pgm", "mdlm"])
EVERY = pytest.mark.parametrize("config", [IMAGE_PGM, IMAGE_MDLM, IMAGE_AR], ids=["pgm", "mdlm", "ar"])
EXACT = {"atol": 1e-9, "rtol": 0}
Config = PGMConfig | MDLMConfig | ARConfig


@GROUPED
def test_logits_follow_the_class_of_their_row(config: Config) -> None:
    model = randomised(config, V, L)
    tokens, groups = random_rows(4, L, V)
    labels = torch.tensor([0, 1, 2, C])
    logits = model.logits(tokens, groups, labels)
    other = model.logits(tokens, groups, torch.tensor([0, 2, 2, 0]))
    same = [0, 2]
    assert torch.equal(logits[same], other[same]), "a row's class is seen by another row"
    assert (logits[[1, 3]] != other[[1, 3]]).any(-1).all(), "a position does not know its class"
    nothing = model.logits(tokens, groups)
    assert torch.equal(nothing, model.logits(tokens, groups, torch.full((4,), C)))
    assert torch.equal(nothing[3], logits[3])


@GROUPED
@pytest.mark.parametrize("bos", [None, BOS])
def test_predicting_is_the_training_form(config: Config, bos: int | None) -> None:
    """Registers, BOS and classes included, ragged, from nothing and with nothing asked."""
    model = Model(randomised_with_bos(config, bos), bos)
    generator = torch.Generator().manual_seed(0)
    tokens, groups = random_rows(5, L, V)
    groups[0], groups[1] = True, False
    if bos is not None:
        tokens[:, 0], groups[:, 0] = bos, False
    labels = torch.tensor([0, 1, 2, C, 1])
    positions, known, lengths = ragged(~groups, tokens, 1, generator)
    queries, _, counts = ragged(groups, tokens, 1, generator)
    predicted = model.predict(known, positions, lengths, queries, counts, labels)
    expected = model.logits(tokens, groups, labels)
    assert expected.shape == (5, L, V)
    for row, count in enumerate(counts.tolist()):
        at = expected[row, queries[row, :count]]
        torch.testing.assert_close(predicted[row, :count], at, **EXACT)


def randomised_with_bos(config: Config, bos: int | None) -> Denoiser:
    return shake(build(config, V, L, bos)).double()


@EVERY
def test_sampling_is_the_training_form(config: Config) -> None:
    """What the last step of a sample is drawn from is what training shows at that position."""
    model = randomised_with_bos(config, BOS)
    labels = torch.tensor([2, C, 0])
    order = "left_to_right" if model.left_to_right else "uniform"
    asked, vectors = [], []
    original = model.hidden

    def hidden(state, positions, lengths):
        asked.append(positions)
        vectors.append(original(state, positions, lengths))
        return vectors[-1]

    model.hidden = hidden
    tokens = sample(model, SamplingRequest(3, L - 1, seed=0, order=order, bos=BOS, condition=labels))
    assert tokens[:, 0].eq(BOS).all()
    assert tokens[:, 1:].lt(V).all()
    assert not torch.equal(tokens, sample(model, SamplingRequest(3, L - 1, seed=0, order=order, bos=BOS)))
    last = torch.zeros(tokens.shape, dtype=torch.bool).scatter(1, asked[L - 2][:, None], True)
    batch = Batch(tokens, last, last, last.float(), labels)
    with torch.no_grad():
        logits = model.head(vectors[L - 2])
        drawn = torch.nn.functional.cross_entropy(logits, tokens[last], reduction="none")
        torch.testing.assert_close(drawn.float(), model(batch))


@EVERY
def test_losses_use_the_condition(config: Config) -> None:
    model = randomised(config, V, L).double()
    tokens, groups = random_rows(3, L, V)
    groups = torch.ones_like(groups) if config.kind == "ar" else groups
    losses = {
        labels: model(Batch(tokens, groups, groups, torch.ones(tokens.shape), torch.tensor(labels)))
        for labels in ((0, 1, 2), (0, 1, 1), (C, C, C))
    }
    assert torch.equal(losses[0, 1, 2][:2], losses[0, 1, 1][:2])
    assert losses[0, 1, 2][2] != losses[0, 1, 1][2]
    nothing = model(Batch(tokens, groups, groups, torch.ones(tokens.shape)))
    assert torch.equal(nothing, losses[C, C, C])


@pytest.mark.parametrize("check", CHECKS)
def test_registers_and_classes_do_not_leak(check) -> None:
    """The checks tell groups by the rows of the embedding, of which registers have their own."""
    model = randomised(PGM.model_copy(update={"classes": C}), V, L)
    check(model, *partitioned(5, L, equal=False))
    with_registers = randomised(IMAGE_PGM, V, L)
    tokens, groups = random_rows(5, L, V)
    groups[:, 0], groups[:, 1] = False, True  # no group is empty
    before = with_registers.logits(tokens, groups)
    for group in (0, 1):
        changed = tokens.clone()
        own = groups == bool(group)
        changed[own] = V - 1 - changed[own]
        after = with_registers.logits(changed, groups)
        assert torch.equal(before[own], after[own]), "leak"
        assert (before[~own] != after[~own]).any(-1).all()


def test_each_group_reads_its_own_registers() -> None:
    """The first half is in group 1, so it is what group 0's predictions read, and the other way round."""
    model = randomised(IMAGE_PGM, V, L)
    tokens, groups = random_rows(4, L, V)
    logits = model.logits(tokens, groups)
    for half, read_by in ((slice(-4, -2), ~groups), (slice(-2, None), groups)):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        for asked, seen in ((read_by, True), (~read_by, False)):
            (gradient,) = torch.autograd.grad(
                (logits * direction)[asked].sum(), model.embedding.weight, retain_graph=True
            )
            assert gradient[half].abs().sum().gt(0) == seen


def test_a_fresh_model_ignores_the_class() -> None:
    """adaLN maps start at zero."""
    for config in (IMAGE_PGM, IMAGE_MDLM):
        model = build(config, V, L)
        assert all(
            parameter.eq(0).all() for name, parameter in model.named_parameters() if "modulation" in name
        )
        tokens, groups = random_rows(2, L, V)
        assert model.logits(tokens, groups, torch.tensor([0, 1])).eq(0).all()


@EVERY
def test_labels_that_do_not_fit(config: Config) -> None:
    model = randomised(config, V, L)
    for wrong in (C + 1, -1):
        with pytest.raises(CapabilityError, match=f"label {wrong} .*3 classes; expected 0 to 2, or 3 for no"):
            model.open(2, torch.tensor([0, wrong]))
    with pytest.raises(CapabilityError, match=r"shape \[3\] for 2 rows"):
        model.open(2, torch.tensor([0, 1, 2]))
    unconditional = randomised(config.model_copy(update={"classes": None}), V, L)
    tokens, groups = random_rows(2, L, V)
    for ask in (
        lambda: unconditional.open(2, torch.tensor([0, 1])),
        lambda: unconditional(Batch(tokens, groups, groups, torch.ones(2, L), torch.tensor([0, 1]))),
    ):
        with pytest.raises(CapabilityError, match="without classes"):
            ask()


def test_bos_within_the_vocabulary_needs_no_row() -> None:
    """Text: end-of-text stands in front. Images: BOS lies behind the mask."""
    assert build(PGM, V, L, bos=3).embedding.num_embeddings == V
    assert build(PGM, V, L, bos=BOS).embedding.num_embeddings == V + 2
    assert build(IMAGE_PGM, V, L, bos=BOS).embedding.num_embeddings == V + 2 + 4
    assert build(MDLM, V, L, bos=3).embedding.num_embeddings == V + 1
    assert build(IMAGE_MDLM, V, L, bos=BOS).embedding.num_embeddings == V + 2 + 3
    assert build(IMAGE_PGM, V, L, bos=BOS).head(torch.zeros(1, 32)).shape == (1, V)
