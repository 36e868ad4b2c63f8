"""The one sampling loop: every position once, nothing but asked positions, reproducible and unbiased draws."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.errors import CapabilityError, ConfigError
from pipeline.models import build
from pipeline.models.batch import State
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import CHUNK_LOGITS, Head
from pipeline.models.pgm import PGM as PartitionModel
from pipeline.sampling import orders
from pipeline.sampling.logits import draw_tokens
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.small_models import BOTH_KINDS, PGM, random_rows, randomised

V, L = 11, 16
KINDS = pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)


class Recording(PartitionModel):
    """Remembers what was known and what was asked at every step."""

    steps: list[tuple[list[list[int]], list[list[int]]]]

    def hidden(self, state: State, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        known = [row[:n].tolist() for row, n in zip(state.positions, state.lengths, strict=True)]
        asked = [part.tolist() for part in positions.split(list(lengths))]
        self.steps.append((known, asked))
        return super().hidden(state, positions, lengths)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("steps", [1, 5, 7, 15])
def test_every_position_is_revealed_once(bos: int | None, steps: int) -> None:
    model = Recording(PGM, V, L).eval()
    model.steps, done = [], []
    tokens = sample(model, SamplingRequest(3, steps, seed=0, bos=bos), progress=lambda *at: done.append(at))
    start, by_row = int(bos is not None), []
    assert len(model.steps) == steps
    assert done == [(step + 1, steps) for step in range(steps)]
    sizes = [len(asked[0]) for _, asked in model.steps]
    assert max(sizes) - min(sizes) <= 1, "a remainder is spread"
    for row in range(3):
        revealed = [0] if start else []
        for known, asked in model.steps:
            assert known[row] == revealed, "a step knows exactly what was revealed before it"
            revealed += asked[row]
        assert sorted(revealed) == list(range(L))
        by_row.append(revealed)
    assert by_row[0] != by_row[1] != by_row[2], "every row has its own order"
    assert tokens.shape == (3, L)
    if bos is not None:
        assert tokens[:, 0].eq(bos).all()


def test_known_tokens_are_the_drawn_ones() -> None:
    """The tokens that the model is given are those of the sample, so the draws form one consistent chain."""
    model = Recording(PGM, V, L).eval()
    model.steps, extended = [], []
    original = model.extend

    def extend(state: State, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> None:
        extended.append((tokens.clone(), positions.clone()))
        original(state, tokens, positions, lengths)

    model.extend = extend
    tokens = sample(model, SamplingRequest(2, 4, seed=1))
    for drawn, positions in extended:
        assert torch.equal(tokens.gather(1, positions.view(2, -1)), drawn.view(2, -1))


@KINDS
def test_samples_follow_their_seed(config: PGMConfig | MDLMConfig) -> None:
    model = randomised(config, V, L)
    first = sample(model, SamplingRequest(4, 6, seed=1))
    assert torch.equal(first, sample(model, SamplingRequest(4, 6, seed=1)))
    assert not torch.equal(first, sample(model, SamplingRequest(4, 6, seed=2)))
    assert len({tuple(row) for row in first.tolist()}) == 4


@KINDS
def test_a_sample_is_the_same_in_any_batch(config: PGMConfig | MDLMConfig) -> None:
    model = randomised(config, V, L).double()
    together = sample(model, SamplingRequest(7, 5, seed=4, bos=2))
    apart = [
        sample(model, SamplingRequest(count, 5, seed=4, bos=2, indices=range(first, first + count)))
        for first, count in ((0, 1), (1, 4), (5, 2))
    ]
    assert torch.equal(together, torch.cat(apart))


@KINDS
def test_samples_have_the_chances_of_the_logits(config: PGMConfig | MDLMConfig) -> None:
    """A head that is all bias draws every token from one known distribution; id 0 and id 4 never."""
    model = build(config, 5, 8).eval()
    chances = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    with torch.no_grad():
        model.head.bias.copy_(chances.log().clamp(min=-1e4))
    tokens = sample(model, SamplingRequest(1500, 3, seed=0))
    counts = torch.bincount(tokens.flatten(), minlength=5)
    assert counts[[0, 4]].eq(0).all()
    deviation = (counts - 12000 * chances) / (12000 * chances * (1 - chances)).clamp(min=1).sqrt()
    assert deviation.abs().max() < 4
    pairs = Counter(map(tuple, tokens[:, :2].tolist()))  # positions are independent
    for a, b in ((1, 1), (1, 2), (3, 2)):
        expected = 1500 * float(chances[a] * chances[b])
        assert abs(pairs[a, b] - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_later_draws_condition_on_earlier_ones(steps: int) -> None:
    """Two tokens drawn one after the other come from the model's own joint, over both orders; at once, not."""
    model = randomised(PGM, 2, 2, scale=0.6, seed=3)
    with torch.no_grad():  # both tokens likely, whatever the random weights
        model.head.bias -= model.logits(torch.zeros(1, 2).long(), torch.tensor([[False, True]]))[0].mean(0)
    tokens = sample(model, SamplingRequest(8_000, steps, seed=0))
    known, nothing = torch.tensor([[0], [1]]), torch.zeros(2, 0, dtype=torch.int64)
    joint = torch.zeros(2, 2)

    def chances(values: Tensor, position: int, query: int) -> Tensor:
        state = model.open(len(values))
        count = values.shape[1]
        places = torch.full((values.numel(),), position)
        model.extend(state, values.flatten(), places, [count] * len(values))
        asked = torch.full((len(values),), query)
        return model.head(model.hidden(state, asked, [1] * len(values))).softmax(-1)

    with torch.no_grad():
        alone = [chances(nothing, 0, query)[0] for query in (0, 1)]
        if steps == 1:
            joint = alone[0][:, None] * alone[1]
        else:
            after_first, after_second = chances(known, 0, 1), chances(known, 1, 0)
            joint = (alone[0][:, None] * after_first + alone[1] * after_second.T) / 2
        independent = alone[0][:, None] * alone[1]
    found = torch.bincount(tokens[:, 0] * 2 + tokens[:, 1], minlength=4).view(2, 2) / 8_000
    noise = (joint * (1 - joint) / 8_000).sqrt()
    assert ((found - joint).abs() < 4 * noise).all()
    if steps == 2:
        assert ((found - independent).abs() > 8 * noise).any(), "else the model has nothing to condition on"


def test_draws_are_inverted_in_float64() -> None:
    head = Head(4, 4)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([-1e4, 0.0, math.log(1e-10), -1e4]))
    last = 1 - 2**-53
    noise = torch.tensor([0.0, 0.3, 1 - 1e-9, 1 - 1e-11, last], dtype=torch.float64)
    assert draw_tokens(head, torch.zeros(5, 4), noise).tokens.tolist() == [1, 1, 1, 2, 2]
    assert draw_tokens(head, torch.zeros(0, 4), noise[:0]).tokens.tolist() == []


def test_logits_exist_for_a_chunk_of_rows_only() -> None:
    vocab_size = CHUNK_LOGITS["cpu"] // 50
    head = Head(4, vocab_size).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    hidden = torch.randn(120, 4, generator=generator, dtype=torch.float64)
    noise = torch.rand(120, generator=generator, dtype=torch.float64)
    sizes = []
    handle = head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        drawn = draw_tokens(head, hidden, noise).tokens
        handle.remove()
        cumulative = head(hidden).double().softmax(-1).cumsum(-1)
    assert sizes == [50, 50, 20]
    assert torch.equal(drawn, (cumulative <= noise[:, None]).sum(1))


@KINDS
def test_what_cannot_be_sampled_is_refused(config: PGMConfig | MDLMConfig) -> None:
    model = build(config, V, L).eval()
    with pytest.raises(ConfigError, match=r"'unifrom' is not one of .*uniform.*did you mean 'uniform'"):
        sample(model, SamplingRequest(1, 4, 0, order="unifrom"))
    for steps in (0, -1, 17):
        with pytest.raises(ConfigError, match=f"steps: {steps} for 16 positions.* 1 to 16"):
            sample(model, SamplingRequest(1, steps, 0))
    with pytest.raises(ConfigError, match="expected 1 to 15"):
        sample(model, SamplingRequest(1, 16, 0, bos=0))
    assert sample(model, SamplingRequest(1, 16, 0)).shape == (1, L)
    with pytest.raises(CapabilityError, match="without classes"):
        sample(model, SamplingRequest(2, 4, 0, condition=torch.tensor([0, 1])))


def test_orders_are_uniform() -> None:
    """Each position is as likely in each step."""
    rng = np.random.default_rng(0)
    counts = np.zeros((3, 7))
    for _ in range(6000):
        sequence, sizes = orders.plan(orders.Order(), np.arange(2, 9), 3, rng=rng, start=0, length=9)
        assert sizes.tolist() == [3, 2, 2]
        for step, part in enumerate(np.split(sequence, np.cumsum(sizes)[:-1])):
            counts[step, part - 2] += 1
    expected = 6000 * np.array([[3], [2], [2]]) / 7
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected.max())


def test_training_is_not_disturbed() -> None:
    """Sampling neither builds graphs nor draws from the generator that dropout uses."""
    model: Denoiser = randomised(PGM, V, L)
    tokens, _ = random_rows(1, L, V)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = sample(model, SamplingRequest(1, 3, seed=0))
    assert torch.equal(before, torch.get_rng_state())
    assert not drawn.requires_grad
    assert drawn.dtype == tokens.dtype
