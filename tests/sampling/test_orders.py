"""Orders, filters, given tokens, windows: against a model that knows its source exactly."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import MDLMConfig, PGMConfig, TrunkConfig
from pipeline.errors import ConfigError
from pipeline.models import build
from pipeline.models.batch import Batch, State
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Head
from pipeline.sampling import orders
from pipeline.sampling.logits import Drawn, Filters, draw_tokens
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import SamplingRequest, ragged_known, sample, sample_long

V, L = 3, 4
CONFIGS = [
    PGMConfig(hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0),
    MDLMConfig(kind="mdlm", hidden=16, heads=2, blocks=2, dropout=0),
]


class Plain(Head):
    """A head for hidden vectors that are logits already."""

    def __init__(self, vocab_size: int):
        super().__init__(1, vocab_size)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        assert targets is None
        return hidden


class Exact(Denoiser):
    """The exact posterior of a joint distribution over V ** L rows: hidden vectors are log-probabilities."""

    def __init__(self, joint: np.ndarray):
        super().__init__(TrunkConfig(hidden=2, heads=1), joint.shape[0], joint.ndim, ids=joint.shape[0])
        self.joint = torch.from_numpy(joint)
        self.head = Plain(self.vocab_size)
        self.calls = 0

    def target_vectors(self, batch: Batch) -> Tensor:
        raise AssertionError("not trained")

    def logits(self, tokens: Tensor, groups: Tensor, condition: Tensor | None = None) -> Tensor:
        raise AssertionError("not asked")

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q V"]:
        self.calls += 1
        out = []
        asked = positions.split(list(lengths))
        for row, (known, places) in enumerate(zip(state.lengths, asked, strict=True)):
            given = dict(
                zip(state.positions[row, :known].tolist(), state.tokens[row, :known].tolist(), strict=True)
            )
            table = self.joint[tuple(given.get(p, slice(None)) for p in range(self.length))]
            free = [p for p in range(self.length) if p not in given]
            for place in places.tolist():
                others = [axis for axis, p in enumerate(free) if p != place]
                out.append(table.sum(others).log() if others else table.log())
        return torch.stack([x - x.logsumexp(0) for x in out]) if out else torch.zeros(0, self.vocab_size)


@pytest.fixture(scope="module")
def joint() -> np.ndarray:
    """A joint of strongly dependent tokens."""
    weights = np.random.default_rng(0).gamma(0.3, size=(V,) * L)
    return weights / weights.sum()


def frequencies(tokens: Tensor) -> np.ndarray:
    codes = (tokens * V ** torch.arange(L - 1, -1, -1)).sum(1)
    return np.bincount(codes.numpy(), minlength=V**L) / len(tokens)


@pytest.mark.parametrize(
    ("order", "steps"),
    [("uniform", L), ("halton", L), ("binomial", 100), (Order("entropy", gamma=0.0), L)],
    ids=str,
)
def test_exact_orders_draw_the_source(joint: np.ndarray, order: str | Order, steps: int):
    count = 1500
    found = frequencies(sample(Exact(joint), SamplingRequest(count, steps, seed=1, order=order)))
    distance = 0.5 * np.abs(found - joint.ravel()).sum()
    # Of `count` exact draws: the expected distance is at most half the sum of the standard deviations.
    expected = 0.5 * np.sqrt(joint.ravel() / count).sum()
    assert distance < 1.3 * expected
    # All at once: independent.
    wrong = frequencies(sample(Exact(joint), SamplingRequest(count, 1, seed=1, order="uniform")))
    assert 0.5 * np.abs(wrong - joint.ravel()).sum() > 3 * expected


def test_binomial_counts_are_the_posteriors(joint: np.ndarray):
    steps, rows = 5, 4000
    counts = np.stack(
        [
            orders.plan(
                Order("binomial"), np.arange(30), steps, rng=np.random.default_rng(i), start=0, length=30
            )[1]
            for i in range(rows)
        ]
    )
    assert (counts.sum(1) == 30).all()
    # A step s -> s - dt reveals each hidden token with probability dt / s; here the first: Binomial(30, 1/5).
    assert counts[:, 0].mean() == pytest.approx(6, abs=4 * np.sqrt(30 * 0.16 / rows))
    assert counts[:, 0].var() == pytest.approx(30 * 0.16, rel=0.15)
    left = 30 - counts[:, 0]
    assert (counts[:, 1] / left).mean() == pytest.approx(1 / 4, abs=0.01)


def test_steps_that_reveal_nothing_are_not_run(joint: np.ndarray):
    model = Exact(joint)
    sample(model, SamplingRequest(2, 1000, seed=0, order="binomial"))
    assert 0 < model.calls <= 2 * L


def test_halton_visits_every_cell_once_and_spreads():
    order, _ = orders.plan(
        Order("halton"), np.arange(64), 8, rng=np.random.default_rng(0), start=0, length=64
    )
    assert sorted(order.tolist()) == list(range(64))
    rows, columns = order // 8, order % 8
    quarter = (rows[:16] // 4) * 2 + columns[:16] // 4
    assert set(np.bincount(quarter, minlength=4)) <= {3, 4, 5}  # the first quarter lies everywhere
    # Points 1/2, 1/3 and 1/4, 2/3 and 3/4, 1/9 of the sequence, on the 8 x 8 grid.
    assert order[:3].tolist() == [4 * 8 + 2, 2 * 8 + 5, 6 * 8 + 0]


@pytest.mark.parametrize("unknown", [0, 1, 7, 64, 1023])
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_schedules_reveal_all(unknown: int, steps: int):
    for schedule in ("linear", "arccos"):
        counts = orders.step_counts(unknown, steps, schedule)
        assert counts.sum() == unknown
        assert (counts >= (unknown >= steps)).all()
    if unknown > 10 * steps > 10:
        assert (np.diff(orders.step_counts(unknown, steps, "arccos")) >= -1).all()  # few first, many last


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
@pytest.mark.parametrize("order", orders.ORDERS)
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_every_order_with_given_tokens(config: PGMConfig | MDLMConfig, order: str, steps: int):
    torch.manual_seed(0)
    model = build(config, 11, 16).double().eval()
    nn.init.normal_(model.head.weight)
    prompts = [{0: 7, 5: 2}, {}, {15: 1}, dict.fromkeys(range(9), 4)]
    known = ragged_known(prompts, 16)
    tokens = sample(model, SamplingRequest(4, steps, seed=3, order=order, known=known))
    for row, prompt in enumerate(prompts):
        assert {p: int(tokens[row, p]) for p in prompt} == prompt
    assert tokens.equal(sample(model, SamplingRequest(4, steps, seed=3, order=order, known=known)))
    assert not tokens.equal(sample(model, SamplingRequest(4, steps, seed=4, order=order, known=known)))
    for row in range(4):  # alone as in the batch
        alone = sample(
            model,
            SamplingRequest(
                1,
                steps,
                3,
                order,
                known=(known[0][row : row + 1], known[1][row : row + 1]),
                indices=[row],
            ),
        )
        assert alone[0].equal(tokens[row])


@pytest.mark.parametrize("order", orders.ORDERS)
def test_each_position_is_revealed_once(order: str, monkeypatch: pytest.MonkeyPatch):
    model = build(CONFIGS[0], 11, 16).eval()
    revealed: list[Tensor] = []
    extend = model.extend

    def watch(state: State, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> None:
        revealed.extend(positions.split(list(lengths)))
        extend(state, tokens, positions, lengths)

    monkeypatch.setattr(model, "extend", watch)
    sample(model, SamplingRequest(1, 7, seed=0, order=order, bos=None if order == "halton" else 3))
    assert sorted(torch.cat(revealed).tolist()) == list(range(16))


def test_confidence_keeps_the_likeliest_and_entropy_the_surest():
    unknown = torch.tensor([[True, True, True, False]])
    log_prob = torch.log(torch.tensor([[0.2, 0.9, 0.5, 0.99]]))
    entropy = torch.tensor([[0.05, 0.5, 0.02, 0.0]])
    none = torch.zeros(1, 4)

    def kept(order: Order, least: int) -> list[int]:
        drawn = Drawn(torch.zeros_like(unknown, dtype=torch.int64), log_prob, entropy)
        chosen = orders.choose(order, unknown, drawn, none, counts=[least], progress=0.0)
        return chosen.nonzero()[:, 1].tolist()

    assert kept(Order("confidence"), 2) == [1, 2]
    # 0.02 alone bounds {2, 0}; adding 0.5 would make the error bound 0.07.
    assert kept(Order("entropy", gamma=0.03), 1) == [0, 2]
    assert kept(Order("entropy", gamma=0.01), 1) == [2]
    assert kept(Order("entropy", gamma=0.08), 1) == [0, 1, 2]
    assert kept(Order("entropy", gamma=0.0), 3) == [0, 1, 2]


def test_gumbel_noise_fades():
    unknown = torch.ones(1, 2, dtype=torch.bool)
    log_prob, noise = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.0, 5.0]])
    drawn = Drawn(torch.zeros(1, 2, dtype=torch.int64), log_prob, log_prob)
    early, late = (
        orders.choose(Order("confidence", gumbel=1.0), unknown, drawn, noise, counts=[1], progress=progress)
        for progress in (0.0, 0.9)
    )
    assert early.tolist() == [[False, True]]
    assert late.tolist() == [[True, False]]


def test_gumbel_noise_has_scale_5_at_the_first_step_and_none_at_the_last(monkeypatch):
    seen, choose = [], orders.choose

    def watch(order, unknown, drawn, gumbel, *, counts, progress):
        seen.append((order.gumbel * (1 - progress), drawn.log_prob[unknown].exp()))
        return choose(order, unknown, drawn, gumbel, counts=counts, progress=progress)

    monkeypatch.setattr(orders, "choose", watch)
    assert SamplingConfig().gumbel == Order().gumbel
    sample(build(CONFIGS[0], 5, 16), SamplingRequest(2, 5, seed=0, order="confidence"))
    assert [scale for scale, _ in seen] == pytest.approx([5, 3.75, 2.5, 1.25, 0])
    assert all(((share > 0) & (share <= 1)).all() for _, share in seen)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), [0.5, 0.3, 0.15, 0.05]),
        (Filters(top_k=2), [0.625, 0.375, 0, 0]),
        (Filters(top_p=0.7), [0.625, 0.375, 0, 0]),
        (Filters(top_p=0.5), [1, 0, 0, 0]),
        (Filters(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (Filters(top_k=1), [1, 0, 0, 0]),
    ],
)
def test_filters(filters: Filters, expected: list[float]):
    head = Plain(4)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_tokens(head, logits, noise, filters, certainty=True)
    found = np.bincount(drawn.tokens.numpy(), minlength=4) / 20_000
    assert found == pytest.approx(expected, abs=0.015)
    assert drawn.log_prob.exp().numpy() == pytest.approx(np.array(expected)[drawn.tokens.numpy()], abs=1e-3)
    entropy = -sum(p * np.log(p) for p in expected if p)
    assert float(drawn.entropy[0]) == pytest.approx(entropy, abs=1e-3)


def test_long_rows_are_made_of_windows_that_see_each_other():
    """A source whose tokens repeat with period 2: every window must go on where the last one ended."""
    joint = np.zeros((V,) * L)
    for a in range(V):
        for b in range(V):
            joint[a, b, a, b] = 1 / V**2
    rows = sample_long(Exact(joint), SamplingRequest(50, steps=L, seed=0), length=11, stride=2)
    assert rows.shape == (50, 11)
    assert rows[:, 2:].equal(rows[:, :-2])
    assert len({tuple(row[:2].tolist()) for row in rows}) == V**2


def test_a_row_ends_at_its_stop():
    joint = np.zeros((V,) * L)
    joint[0, 1, 2, 0] = joint[0, 1, 1, 2] = 0.5
    rows = sample_long(Exact(joint), SamplingRequest(40, steps=L, seed=0), length=9, stride=2, stop=2)
    assert {tuple(row.tolist()) for row in rows} == {(0, 1) + (2,) * 7, (0, 1, 1) + (2,) * 6}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: sample(m, SamplingRequest(1, 3, 0, "haltn")), "did you mean 'halton'"),
        (lambda m: sample(m, SamplingRequest(1, 3, 0, "halton")), "square grid of tokens, not 15"),
        (lambda m: sample(m, SamplingRequest(1, 16, 0)), "steps: 16 for 15 positions"),
        (
            lambda m: sample(m, SamplingRequest(1, 3, 0, known=ragged_known([{15: 0}], 15))),
            "position: 15; expected an integer from 0 to 14",
        ),
        (
            lambda m: sample_long(m, SamplingRequest(1, 3, 0), length=30, stride=15),
            "stride: 15; expected 1 to 14",
        ),
        (
            lambda m: sample_long(m, SamplingRequest(1, 3, 0), length=10, stride=5),
            "length: 10; expected at least the model's 15",
        ),
        (lambda m: Filters(temperature=0.0), "temperature: 0"),
        (lambda m: Filters(top_k=0), "top_k: 0"),
        (lambda m: Filters(top_p=1.5), "top_p: 1.5"),
    ],
)
def test_bad_input_is_named(call, says: str):
    with pytest.raises(ConfigError, match=says):
        call(build(CONFIGS[0], 11, 15).eval())


def test_halton_visits_what_is_unknown_of_a_grid() -> None:
    """The order of the whole grid without the known cells, wherever these are."""
    whole, _ = orders.plan(
        Order("halton"), np.arange(256), 8, rng=np.random.default_rng(0), start=0, length=256
    )
    for unknown in (np.arange(128), np.arange(128, 256), np.array([3])):
        rng = np.random.default_rng(0)
        found, counts = orders.plan(Order("halton"), unknown, 8, rng=rng, start=0, length=256)
        assert found.tolist() == [cell for cell in whole.tolist() if cell in unknown]
        assert counts.sum() == len(unknown)
