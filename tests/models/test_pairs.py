"""Rows of a caption and an image: either may be given, and a position has the ids of its own modality only."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.diffusion.partition import draw_given, given_roles
from pipeline.errors import CapabilityError
from pipeline.metrics.likelihood import PARTS, Masking, masked_batches, pair_nats
from pipeline.models import build
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import DistillTargets, Modalities
from pipeline.sampling.logits import Filters
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.dense import ar_logits, mdlm_logits, pgm_logits
from tests.support.role_batches import role_batch
from tests.support.small_models import ANY_ORDER, AR, PGM, shake

T, GRID, TEXT, CODES = 4, 9, 5, 6
L, V = T + GRID, TEXT + CODES
MODALITIES = Modalities(T, TEXT)
# Nothing, the caption and the image, each given twice.
ROLES = given_roles(np.array([0, 1, 2, 2, 1, 0]), T, L)
MASKED = pytest.mark.parametrize("config", ANY_ORDER.values(), ids=ANY_ORDER.keys())
EXACT = {"atol": 1e-10, "rtol": 0}  # in float64


def model_of(config: PGMConfig | MDLMConfig | ARConfig) -> Denoiser:
    torch.manual_seed(0)
    return shake(build(config, V, L, modalities=MODALITIES)).double()


def rows_of(count: int = len(ROLES.given), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(0, TEXT, (count, T)), rng.integers(TEXT, V, (count, GRID))], 1)


def training_batch(model: Denoiser, tokens: np.ndarray | None = None, roles: Roles | None = ROLES) -> Batch:
    """What training makes of the rows at some step."""
    return role_batch(model, rows_of() if tokens is None else tokens, roles, bos=False)[0]


def dense_logits(model: Denoiser, batch: Batch, row: int) -> Tensor:
    """[L, V] of all ids, by the plain formulas."""
    tokens, groups = batch.tokens[row], batch.groups[row]
    first, given = (0, 0) if batch.given is None else (int(batch.first[row]), int(batch.given[row]))  # type: ignore[index]
    if model.left_to_right:
        return ar_logits(model, tokens)  # type: ignore[arg-type]
    if model.config.kind == "mdlm":
        shown = (torch.arange(L) >= first) & (torch.arange(L) < given)
        one = mdlm_logits(model, tokens, groups)  # type: ignore[arg-type]
        zero = mdlm_logits(model, tokens, ~groups & ~shown)  # type: ignore[arg-type]
        return torch.where(groups[:, None], one, zero)
    order = None if batch.order is None else batch.order[row]
    return pgm_logits(model, tokens, groups, given, order, first)  # type: ignore[arg-type]


def own_log_prob(logits: Tensor, places: Tensor) -> Tensor:
    """[n, V] log-probabilities over the ids of each position's own modality, computed on these alone."""
    out = torch.full_like(logits, -torch.inf)
    text = places < T
    out[text, :TEXT] = logits[text, :TEXT].log_softmax(-1)
    out[~text, TEXT:] = logits[~text, TEXT:].log_softmax(-1)
    return out


def target_logits(model: Denoiser, batch: Batch) -> Tensor:
    """[Q, V], in the order of `target_index`."""
    return model.head(model.target_vectors(batch), places=batch.target_index % L)


@pytest.mark.parametrize("config", [*ANY_ORDER.values(), AR], ids=[*ANY_ORDER, "ar"])
@torch.no_grad()
def test_logits_and_losses_are_those_of_the_plain_formulas(config: ModelConfig) -> None:
    model = model_of(config)
    batch = training_batch(model, roles=None if config.kind == "ar" else ROLES)
    index = batch.target_index
    dense = torch.cat([dense_logits(model, batch, row) for row in range(len(batch.tokens))])[index]
    expected = own_log_prob(dense, index % L)
    found = target_logits(model, batch)
    other = expected == -torch.inf
    assert found.softmax(-1)[other].eq(0).all()
    torch.testing.assert_close(found[~other], dense[~other], **EXACT)
    tokens, weights = (batch.gather(x, index) for x in (batch.tokens, batch.weights))
    losses = -expected.gather(1, tokens[:, None])[:, 0] * weights
    assert losses.isfinite().all()
    torch.testing.assert_close(model(batch), batch.row_sums(losses))
    if config.kind != "ar":
        allowed = torch.from_numpy(ROLES.targets(L, bos=False))
        assert torch.equal(batch.targets, allowed if model.both_groups else allowed & batch.groups)
        assert allowed.sum(1).tolist() == [L, GRID, T, T, GRID, L]


@MASKED
def test_nothing_is_learned_of_what_is_given(config: ModelConfig) -> None:
    """Rows with a given caption leave the head of text as it is, rows with a given image that of codes, exactly."""
    model, sizes = model_of(config), list[int]()
    model.head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for part, ids, others in ((1, slice(0, TEXT), slice(TEXT, V)), (2, slice(TEXT, V), slice(0, TEXT))):
        roles = given_roles(np.full(4, part), T, L)
        batch = training_batch(model, rows_of(4), roles)
        model.zero_grad()
        model(batch).sum().backward()
        assert sizes.pop() == int(batch.targets.sum())
        for parameter in (model.head.weight, model.head.bias):
            assert parameter.grad is not None
            assert parameter.grad[ids].eq(0).all()
            assert parameter.grad[others].ne(0).any()


@pytest.mark.parametrize("name", ["pgm", "pgm with registers", "causal", "complementary"])
def test_both_groups_read_what_is_given_and_not_themselves(name: str) -> None:
    """The gradient from a group's logits to its own targets is exactly zero; to the given part it is not."""
    model = model_of(ANY_ORDER[name])
    batch = training_batch(model)
    rows = torch.arange(len(batch.tokens))[:, None]
    # An id for every (row, part): given 0, group 0's targets 1, group 1's targets 2.
    part = torch.where(batch.targets, 1 + batch.groups.long(), 0)
    mask = 3 * len(rows)
    if name == "complementary":
        model.vocab_size = mask  # the id of the mask
    model.embedding = torch.nn.Embedding(mask + 1 + model.registers, 32, dtype=torch.float64)
    marked = Batch(
        rows * 3 + part,
        batch.groups,
        batch.targets,
        batch.weights,
        order=batch.order,
        lengths=batch.lengths,
        given=batch.given,
        first=batch.first,
    )
    own = batch.groups.flatten()[batch.target_index]
    for group in (0, 1):
        logits = target_logits(model, marked)[own == bool(group)]
        (gradient,) = torch.autograd.grad((logits.clamp(min=-1e3) ** 2).sum(), model.embedding.weight)
        size = gradient[:mask].abs().sum(1).view(-1, 3)
        assert size[:, 1 + group].eq(0).all(), f"group {group} sees itself"
        asked = torch.tensor([bool((part[row] == 1 + group).any()) for row in rows.flatten()])
        reads = asked & torch.from_numpy(ROLES.given > 0)
        assert reads[1:3].any()
        assert size[reads, 0].gt(0).all(), f"group {group} does not read what is given"


@MASKED
@torch.no_grad()
def test_a_prediction_is_that_of_sampling(config: ModelConfig) -> None:
    model = model_of(config)
    batch = training_batch(model)
    logits = target_logits(model, batch)
    for row in range(len(batch.tokens)):
        order = torch.arange(L) if batch.order is None else batch.order[row]
        known = batch.known[row]
        if known.any():
            assert (
                batch.order is None or order[known].max() < order[~known].min()
            )  # what is given comes first
        of_row = (batch.target_index // L == row) & batch.groups.flatten()[batch.target_index]
        visible = known | ~batch.groups[row]
        places = order.argsort()
        places = places[visible[places]]
        state = model.open(1)
        model.extend(state, batch.tokens[row, places], places, [len(places)])
        queries = batch.target_index[of_row] % L
        found = model.head(model.hidden(state, queries, [len(queries)]), places=queries)
        torch.testing.assert_close(found, logits[of_row], **EXACT)


@MASKED
@torch.no_grad()
def test_bounds_of_either_part_are_those_of_the_plain_formulas(config: ModelConfig) -> None:
    model, rows = model_of(config), rows_of(5)
    for number, part in enumerate(PARTS):
        roles = given_roles(np.full(5, number), T, L)
        expected = torch.zeros(5, dtype=torch.float64)
        for index, batch in masked_batches(Masking("count", 2, 7, batch=4), rows, roles=roles):
            for place, row in enumerate(index.tolist()):
                if row >= 0:
                    hidden = batch.groups[place]
                    log_prob = own_log_prob(dense_logits(model, batch, place), torch.arange(L))
                    nats = -log_prob.gather(1, batch.tokens[place, :, None])[:, 0]
                    assert roles.targets(L, False)[row][hidden.numpy()].all()
                    expected[row] += nats[hidden].mean() * roles.counts(False)[row] / 2
        found = pair_nats(model, rows, part, draws=2, seed=7, batch=4)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_an_autoregressive_model_reads_captions_first() -> None:
    model, rows = model_of(AR), rows_of(3)
    joint, images = (pair_nats(model, rows, part, draws=1, seed=0) for part in ("nothing", "caption"))  # type: ignore[arg-type]
    for row, (whole, image) in enumerate(zip(joint, images, strict=True)):
        log_prob = own_log_prob(ar_logits(model, torch.from_numpy(rows[row])), torch.arange(L))  # type: ignore[arg-type]
        nats = -log_prob.gather(1, torch.from_numpy(rows[row])[:, None])[:, 0]
        assert float(whole) == pytest.approx(float(nats.sum()), abs=1e-5)
        assert float(image) == pytest.approx(float(nats[T:].sum()), abs=1e-5)
    with pytest.raises(CapabilityError, match="reads captions first"):
        pair_nats(model, rows, "image", draws=1, seed=0)


def requests() -> Iterator[tuple[str, SamplingRequest]]:
    rows, places = torch.from_numpy(rows_of(6)), torch.arange(L)
    for name, given in (
        ("nothing", places < 0),
        ("caption", places < T),
        ("image", places >= T),
        ("gaps", places % 3 == 0),
    ):
        for order in ("halton", "uniform", "confidence"):
            known = (rows, given.expand(6, -1))
            steps = 3 if name == "image" else 4
            yield name, SamplingRequest(6, steps, order=order, known=known, filters=Filters(1e3, top_k=9))


@MASKED
def test_samples_keep_what_is_given_and_the_modalities(config: ModelConfig) -> None:
    model = model_of(config)
    for name, request in requests():
        assert request.known is not None
        revealed = torch.zeros(6, L, dtype=torch.int64)
        rows = sample(model, request, revealed_at=revealed)
        tokens, given = request.known
        assert torch.equal(rows[given], tokens[given])
        assert (rows[:, :T] < TEXT).all()
        assert (rows[:, T:] >= TEXT).all()
        assert torch.equal(revealed == 0, given), (name, request.order)
        if request.order != "halton" or name == "gaps":
            continue
        if name != "image":  # one order of the grid, with few codes first
            assert (revealed[:, T:] == revealed[0, T:]).all()
            assert np.diff(np.bincount(revealed[0, T:], minlength=5)[1:]).min() >= 0
        if name != "caption":  # an order for every caption, in equal parts
            assert len(revealed[:, :T].unique(dim=0)) > 1
            parts = np.bincount(revealed[0, :T], minlength=request.steps + 1)[1:]
            assert parts.max() - parts.min() <= 1


def test_either_part_is_given_in_a_third_of_the_rows() -> None:
    own = {"seed": 3, "batch": 96, "caption": T, "length": L}
    whole = draw_given(np.arange(96), step=2, **own)
    kinds = [*zip(whole.first.tolist(), whole.given.tolist(), strict=True)]  # type: ignore[union-attr]
    assert {kind: kinds.count(kind) for kind in kinds} == {(0, 0): 32, (0, T): 32, (T, L): 32}
    some = draw_given(np.array([70, 5]), step=2, **own)
    assert all(np.array_equal(a, b[[70, 5]]) for a, b in zip(some, whole, strict=True))  # type: ignore[index]
    assert kinds != [*zip(*(x.tolist() for x in draw_given(np.arange(96), step=3, **own)[::-2]), strict=True)]  # type: ignore[union-attr]


def test_divergences_from_a_teacher_see_the_own_modality() -> None:
    """Finite, and 0 from itself, although ids of the other modality have probability 0."""
    torch.manual_seed(0)
    model = model_of(PGM)
    hidden, places = torch.randn(8, 32, dtype=torch.float64), torch.arange(8)
    for kind in ("reverse_kl", "forward_kl", "total_variation", "mse"):
        head = lambda part: model.head(part, places=places)  # noqa: E731
        targets = DistillTargets(hidden, head, kind)  # type: ignore[arg-type]
        assert model.head(hidden, targets, places=places).abs().max() < 1e-12
        x = (hidden + 1).requires_grad_()
        model.head(x, targets, places=places).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.ne(0).any()
