"""Scores of (prompt, continuation) pairs against every order written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from pipeline.api import Model
from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import ConfigError
from pipeline.metrics.continuations import greedy_matches, score_continuations, windows
from tests.support.small_models import BOTH_KINDS, CAUSAL, randomised

AR = ARConfig(kind="ar", hidden=16, heads=2, blocks=2, dropout=0)
PAIRS = [([1, 2], [3, 4]), ([], [5, 6]), ([7, 8, 9], [10, 0])]


def nll(model: Model, known: dict[int, int], place: int, token: int) -> float:
    """-log p of one token from exactly these known ones."""
    ids, places = [list(known.values())], [list(known)]
    logits = model.predict(
        torch.tensor(ids).view(1, -1).long(),
        torch.tensor(places).view(1, -1).long(),
        torch.tensor([len(known)]),
        torch.tensor([[place]]),
    )
    return -float(logits[0, 0].double().log_softmax(-1)[token])


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("config", [*BOTH_KINDS, CAUSAL], ids=["pgm", "mdlm", "causal"])
def test_bound_is_the_mean_over_orders(config: PGMConfig | MDLMConfig, bos: int | None):
    """Of the continuation; a causal encoder reads the prompt in random orders too."""
    denoiser = randomised(config, 11, 8, scale=0.5).double()
    model, start = Model(denoiser, bos=bos), int(bos is not None)
    found = score_continuations(denoiser, PAIRS, draws=1024, bos=bos)
    for (prompt, (a, b)), score in zip(PAIRS, found, strict=True):
        given, values = dict(enumerate(prompt, start)), []
        i, j = start + len(prompt), start + len(prompt) + 1
        for order in itertools.permutations(given) if denoiser.causal else [given]:
            known = {**({} if bos is None else {0: bos}), **{place: given[place] for place in order}}
            values.append(nll(model, known, i, a) + nll(model, {**known, i: a}, j, b))
            values.append(nll(model, known, j, b) + nll(model, {**known, j: b}, i, a))
        assert abs(score.nats - np.mean(values)) < 4 * score.stderr + 1e-6
        assert score.stderr < 0.5
        assert score.tokens == 2


def test_exact_for_autoregressive_models():
    denoiser = randomised(AR, 11, 8, scale=0.5).double()
    found = score_continuations(denoiser, PAIRS)
    for (prompt, continuation), score in zip(PAIRS, found, strict=True):
        row, total = list(prompt), 0.0
        for token in continuation:
            state = denoiser.open(1)
            if row:
                denoiser.extend(state, torch.tensor(row), torch.arange(len(row)), [len(row)])
            with torch.no_grad():
                logits = denoiser.head(denoiser.hidden(state, torch.tensor([len(row)]), [1]))
            total -= float(logits[0].double().log_softmax(-1)[token])
            row.append(token)
        assert score.nats == pytest.approx(total, rel=2e-7)
        assert score.stderr == 0


def test_a_score_does_not_depend_on_the_batch():
    denoiser = randomised(BOTH_KINDS[0], 11, 8, scale=0.5).double()
    together = score_continuations(denoiser, PAIRS, draws=5, batch=4)
    apart = score_continuations(denoiser, PAIRS, draws=5, batch=100)
    for one, other in zip(together, apart, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=2e-7)


def test_an_untrained_model_knows_nothing_of_texts():
    from pipeline.models import build

    model = Model(build(BOTH_KINDS[0], 257, 32), tokenizer=ByteTokenizer())
    (score,) = model.score([("a prompt", " and more")])
    assert score.nats == pytest.approx(9 * math.log(257), abs=1e-3)


@pytest.mark.parametrize("pair", [([1], []), ([1] * 7, [2, 3]), ([], [1] * 9)])
def test_pairs_that_do_not_fit(pair: tuple[list[int], list[int]]):
    with pytest.raises(
        ConfigError, match=r"pair 1: .* tokens; expected a continuation of at least one token"
    ):
        score_continuations(randomised(BOTH_KINDS[0], 11, 8), [PAIRS[0], pair])


@pytest.mark.parametrize("config", [*BOTH_KINDS, AR], ids=lambda c: c.kind)
def test_first_choices(config: PGMConfig | MDLMConfig | ARConfig):
    """A continuation made of them matches, and no longer does with another token in it; in any company."""
    denoiser = randomised(config, 11, 8, scale=0.5).double()
    model, pairs = Model(denoiser, bos=3), []
    for prompt in ([1, 2], [], [7, 8, 9, 1]):
        row, free = [3, *prompt], 3
        for place in range(len(row), len(row) + free):
            known = row if config.kind == "ar" else row[: 1 + len(prompt)]
            logits = [nll(model, dict(enumerate(known)), place, token) for token in range(11)]
            row.append(int(np.argmin(logits)))
        pairs.append((prompt, row[1 + len(prompt) :]))
    wrong = [(prompt, [*some[:-1], (some[-1] + 1) % 11]) for prompt, some in pairs]
    assert greedy_matches(denoiser, pairs + wrong, bos=3, batch=4) == [True] * 3 + [False] * 3
    with pytest.raises(ConfigError, match="pair 0: 2 \\+ 7 tokens"):
        greedy_matches(denoiser, [([1, 2], [0] * 7)], bos=3)


@pytest.mark.parametrize("room", [5, 8])
@pytest.mark.parametrize("asked", [1, 4, 7, 8, 9, 23])
@pytest.mark.parametrize("given", [0, 1, 5, 20])
def test_pieces_of_what_does_not_fit(given: int, asked: int, room: int):
    """Every token is asked once, in order, behind as much of what precedes it as the room holds."""
    prompt, continuation = list(range(given)), list(range(given, given + asked))
    pieces = windows(prompt, continuation, room)
    assert [token for _, piece in pieces for token in piece] == continuation
    for known, piece in pieces:
        row = [*known, *piece]
        assert len(row) <= room
        assert row == list(range(row[0], row[0] + len(row)))
        assert len(row) == room or row[0] == 0
