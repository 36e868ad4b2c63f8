"""Two ancestral steps of a teacher: the distribution of what they teach, exactly; and what they cost."""

from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.diffusion.partition import StepDraws
from pipeline.diffusion.schedule import complement
from pipeline.models.head import DistillTargets, Divergence, chunked_loss, divergence_rows
from pipeline.sampling.rollout import roll_out
from pipeline.training.distillation import Sides, hidden_sides, teach
from tests.support.known_source import Known, markov, naive_roll_out
from tests.support.small_models import BOTH_KINDS, CAUSAL, random_rows, randomised

V, L, EPS = 3, 5, 1e-3
ROW = np.array([2, 0, 1, 1, 0])
GROUPS = np.array([True, True, False, False, True])
DT, T = 1 / 8, 1 / 4
MANY = 200_000


@pytest.fixture(scope="module")
def source() -> Known:
    return Known(markov(V, L, seed=3))


def outcomes(source: Known, hidden: np.ndarray, time: float) -> Iterable[tuple[float, Tensor]]:
    """(chance, targets [n, V]) of everything that two steps can teach of `ROW`, by enumeration.

    Every subset of the hidden positions may be revealed by the first step, with any tokens there.
    """
    places = np.flatnonzero(hidden)
    tokens, known = torch.from_numpy(ROW)[None], torch.from_numpy(~hidden)[None]
    before = source.table[source.code(tokens, known)[0]]
    share = DT / time
    for revealed in product([False, True], repeat=len(places)):
        first = places[list(revealed)]
        chance = np.prod([share if one else 1 - share for one in revealed])
        for drawn in product(range(V), repeat=len(first)):
            canvas, seen = tokens.clone(), known.clone()
            canvas[0, first], seen[0, first] = torch.tensor(drawn, dtype=torch.int64), True
            after = source.table[source.code(canvas, seen)[0]]
            targets = [before[p] if one else after[p] for p, one in zip(places, revealed, strict=True)]
            likely = np.prod([before[p, token].exp() for p, token in zip(first, drawn, strict=True)])
            yield float(chance * likely), torch.stack(targets)


def distance(found: Tensor, expected: Iterable[tuple[float, Tensor]]) -> float:
    """Total variation between collected targets [N, n, V] and outcomes with their chances."""
    chances, targets = zip(*expected, strict=True)
    assert sum(chances) == pytest.approx(1)
    mixture = torch.from_numpy(np.random.default_rng(0).random(targets[0].shape))
    names = [(tables * mixture).sum((1, 2)).numpy().round(9) for tables in (found, torch.stack(targets))]
    keys, place = np.unique(np.concatenate(names), return_inverse=True)
    observed = np.bincount(place[: len(found)], minlength=len(keys)) / len(found)
    expected_shares = np.bincount(place[len(found) :], chances, minlength=len(keys))
    return float(np.abs(observed - expected_shares).sum() / 2)


def by_side(sides: Sides) -> list[tuple[np.ndarray, np.ndarray]]:
    """(hidden [B, L], time [B]) of every roll-out."""
    return [(sides.hidden[:, side], sides.time[:, side]) for side in range(sides.time.shape[1])]


def collect(source: Known, form: str, mistake: str | None = None) -> list[tuple[np.ndarray, float, Tensor]]:
    """(hidden, time, targets [N, n, V]) of every side of many equal rows."""
    groups = np.tile(GROUPS, (MANY, 1))
    sides = hidden_sides(StepDraws(np.full(MANY, T), groups), DT, form, EPS, False)  # type: ignore[arg-type]
    noise = np.random.default_rng(0).random((MANY, 2, 2, L))
    tokens = np.tile(ROW, (MANY, 1))
    if mistake is None:
        vectors = teach(source, tokens, sides, noise, DT).view(MANY, -1, V)
        # As in a batch: a row's group 1 before its group 0.
        parts = vectors.split([int(hidden[0].sum()) for hidden, _ in by_side(sides)], dim=1)
    else:
        parts = [
            naive_roll_out(
                source.logits,
                torch.from_numpy(tokens),
                torch.from_numpy(hidden),
                time=torch.from_numpy(time),
                dt=DT,
                noise=torch.from_numpy(noise[:, side]),
                mistake=mistake,
            ).view(MANY, -1, V)
            for side, (hidden, time) in enumerate(by_side(sides))
        ]
    pairs = zip(by_side(sides), parts, strict=True)
    return [(hidden[0], float(time[0]), part) for (hidden, time), part in pairs]


@pytest.fixture(scope="module")
def complementary(source: Known) -> list[tuple[np.ndarray, float, Tensor]]:
    return collect(source, "complementary")


def test_compatible_targets_have_the_distribution_of_two_ancestral_steps(source: Known) -> None:
    ((hidden, time, targets),) = collect(source, "compatible")
    assert (hidden == GROUPS).all()
    assert time == T
    assert distance(targets, outcomes(source, hidden, time)) < 0.01


def test_complementary_targets_have_it_on_both_sides(
    source: Known, complementary: list[tuple[np.ndarray, float, Tensor]]
) -> None:
    for hidden, time, targets in complementary:
        assert distance(targets, outcomes(source, hidden, time)) < 0.01
    (one, _, _), (other, time, _) = complementary
    assert (one == GROUPS).all()
    assert (other == ~GROUPS).all()
    assert time == pytest.approx((1 - (1 - EPS) * T) / (1 - EPS))


@pytest.mark.parametrize("mistake", ["", "grid", "swapped", "first", "last"])
def test_that_measure_finds_mistakes(source: Known, mistake: str) -> None:
    ((hidden, time, targets),) = collect(source, "compatible", mistake)
    far = distance(targets, outcomes(source, hidden, time))
    assert far > 0.2 if mistake else far < 0.01


def test_sides_of_a_row_are_rolled_out_independently(
    source: Known, complementary: list[tuple[np.ndarray, float, Tensor]]
) -> None:
    """The chance that neither side's first step reveals anything is the product of the two."""
    quiet = []
    for hidden, _, targets in complementary:
        tokens, known = torch.from_numpy(ROW)[None], torch.from_numpy(~hidden)[None]
        before = source.table[source.code(tokens, known)[0]][torch.from_numpy(hidden)]
        quiet.append((targets == before).all(-1).all(-1))  # or all at once
    together = float((quiet[0] & quiet[1]).float().mean())
    apart = float(quiet[0].float().mean() * quiet[1].float().mean())
    assert together == pytest.approx(apart, abs=0.005)
    assert apart > 0.05


def rollout_inputs(rows: int, length: int, vocab_size: int) -> tuple[Tensor, ...]:
    """Tokens, hidden, time, noise; rows with all hidden, nothing hidden, and nothing revealed first."""
    tokens, hidden = random_rows(rows, length, vocab_size)
    generator = torch.Generator().manual_seed(5)
    time = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    uniforms, noise = torch.rand(2, rows, length, generator=generator, dtype=torch.float64)
    hidden[0], hidden[1], uniforms[2] = True, False, 0.999
    return tokens, hidden, time, torch.stack([uniforms, noise], 1)


@pytest.mark.parametrize("config", [*BOTH_KINDS, CAUSAL], ids=["pgm", "mdlm", "causal"])
def test_models_teach_what_two_full_passes_would(config: PGMConfig | MDLMConfig) -> None:
    teacher = randomised(config).double()
    tokens, hidden, time, noise = rollout_inputs(6, teacher.length, teacher.vocab_size)
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(7)).argsort(1)
    with torch.no_grad():
        vectors = roll_out(teacher, tokens, hidden, time=time, dt=0.15, noise=noise, order=order)
        found = teacher.head(vectors).log_softmax(-1)

    def predict(known: Tensor, unknown: Tensor) -> Tensor:
        # What the first step reveals comes after all that was known before.
        return teacher.logits(known, unknown, order=order + tokens.shape[1] * hidden)

    def naive(mistake: str = "") -> Tensor:
        with torch.no_grad():
            return naive_roll_out(predict, tokens, hidden, time=time, dt=0.15, noise=noise, mistake=mistake)

    assert float((found - naive()).abs().max()) < 1e-10
    assert float((found - naive("last")).abs().max()) > 0.1
    assert float((found - naive("first")).abs().max()) > 0.1


@pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)
def test_rows_do_not_know_of_each_other(config: PGMConfig | MDLMConfig) -> None:
    """A row's targets are the same alone, among others, and in front of them."""
    teacher = randomised(config).double()
    tokens, hidden, time, noise = rollout_inputs(6, teacher.length, teacher.vocab_size)
    together = roll_out(teacher, tokens, hidden, time=time, dt=0.15, noise=noise)
    for row, expected in enumerate(together.split(hidden.sum(1).tolist())):
        own = slice(row, row + 1)
        alone = roll_out(teacher, tokens[own], hidden[own], time=time[own], dt=0.15, noise=noise[own])
        assert alone.shape == expected.shape
        torch.testing.assert_close(alone, expected, atol=1e-10, rtol=0)


def test_each_hidden_position_is_asked_for_once(source: Known) -> None:
    tokens, hidden, time, noise = rollout_inputs(50, L, V)
    source.predicted.clear()
    roll_out(source, tokens, hidden, time=time, dt=0.15, noise=noise)
    first = int((hidden & (noise[:, 0] < 0.15 / time[:, None])).sum())
    assert source.predicted == [first, int(hidden.sum()) - first]
    assert 20 < first < hidden.sum() / 2


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_the_last_step_reveals_everything(source: Known, ratio: float) -> None:
    """From a time of dt or less there is one step left: no token is drawn, and nothing is predicted twice."""
    tokens, hidden, time, noise = rollout_inputs(50, L, V)
    source.predicted.clear()
    found = roll_out(source, tokens, hidden, time=torch.full_like(time, 0.1), dt=0.1 * ratio, noise=noise)
    assert source.predicted == [int(hidden.sum())]
    assert torch.equal(found, source.logits(tokens, hidden)[hidden])


@pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)
def test_nothing_is_hidden_at_all(config: PGMConfig | MDLMConfig) -> None:
    teacher = randomised(config)
    tokens, hidden, time, noise = rollout_inputs(3, teacher.length, teacher.vocab_size)
    none = torch.zeros_like(hidden)
    found = roll_out(teacher, tokens, none, time=time, dt=0.15, noise=noise)
    assert teacher.head(found).shape == (0, teacher.vocab_size)


def test_bos_is_never_hidden() -> None:
    groups = np.array([[False, True, False], [False, False, False], [False, True, True]])
    t = np.array([0.3, 0.01, 1.0])
    draws = StepDraws(t, groups)
    (one, at), (other, then) = by_side(hidden_sides(draws, 0.1, "complementary", EPS, True))
    assert not (one[:, 0] | other[:, 0]).any()
    assert (one ^ other)[:, 1:].all()
    assert (at == t).all()
    # The matched time, kept where two steps are possible: 1 - alpha(t') is group 0's share.
    assert then[0] == pytest.approx(complement(t, EPS, "matched")[0])
    assert (then[1], then[2]) == (pytest.approx(0.99, abs=0.02), 0.2)
    assert by_side(hidden_sides(draws, 0.1, "complementary", EPS, False))[1][0][:, 0].all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_student_of_one_context_learns_the_mean_of_its_targets(source: Known, kind: Divergence) -> None:
    """Arithmetic for forward KL, geometric for reverse KL, of all that two steps teach there."""
    rows, steps = 512, 150
    draws = StepDraws(np.array([T]), GROUPS[None])
    ((hidden, time),) = by_side(hidden_sides(draws, DT, "compatible", EPS, False))
    chances, targets = zip(*outcomes(source, hidden[0], time[0]), strict=True)
    weights = torch.tensor(chances, dtype=torch.float64)[:, None, None]
    arithmetic = (weights * torch.stack(targets).exp()).sum(0)
    geometric = (weights * torch.stack(targets)).sum(0).softmax(-1)
    expected, other = (arithmetic, geometric) if kind == "forward_kl" else (geometric, arithmetic)

    n = int(GROUPS.sum())
    table = torch.zeros(V, n, dtype=torch.float64, requires_grad=True)  # the student: logits of every place
    bias = torch.zeros(V, dtype=torch.float64)
    place = torch.eye(n, dtype=torch.float64).repeat(rows, 1)
    adam = torch.optim.Adam([table], lr=0.1)
    rng = np.random.default_rng(2)
    tokens, groups, t = np.tile(ROW, (rows, 1)), np.tile(GROUPS, (rows, 1)), np.full(rows, T)

    def far(aim: Tensor) -> float:
        return float((table.detach().T.softmax(-1) - aim).abs().sum(-1).max() / 2)

    assert far(expected) > 0.2
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        sides = hidden_sides(StepDraws(t, groups), DT, "compatible", EPS, False)
        told = teach(source, tokens, sides, rng.random((rows, 2, 2, L)), DT)
        row_losses = divergence_rows(DistillTargets(told, source.head, kind))
        loss = chunked_loss(place, table, bias, torch.ones(len(place)), row_losses, 4096).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert far(expected) < 0.02
    assert far(other) > 0.04
