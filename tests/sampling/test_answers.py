"""Answers: blocks one after the other, until one holds the end of text; prompts stay as they are."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import ARConfig, ModelConfig
from pipeline.data.tokenizers.characters import ByteTokenizer
from pipeline.diffusion.partition import cut_answers
from pipeline.errors import CapabilityError, ConfigError
from pipeline.evaluation.answers import exact_answers
from pipeline.metrics.continuations import as_answers
from pipeline.models.batch import Roles, State
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts
from pipeline.sampling.row_ends import RowEnds, sample_rows
from pipeline.sampling.sampler import SamplingRequest, ragged_known
from tests.support.known_source import Plain
from tests.support.small_models import CAUSAL, MDLM, PGM, randomised

V, L, BLOCK, EOT = 257, 24, 4, 256
AR = ARConfig(kind="ar", hidden=32, heads=4, blocks=1)
ENDS = RowEnds(EOT, EOT, (0,) * L + (1,), BLOCK, "instruction")


class Scripted(Denoiser):
    """Draws the tokens of a script, and notes what it was asked: one entry a call, with positions and extents."""

    def __init__(self, script: Sequence[int], *starts: int):
        super().__init__(MDLM, V, L, V + 1)
        self.script, self.asked = torch.tensor(script), list[tuple[list[list[int]], list[int]]]()
        self.head, self.starts = Plain(V), torch.tensor(starts)

    def target_vectors(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def hidden(self, state: State, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        assert state.extents is not None
        self.asked.append(([part.tolist() for part in positions.split(list(lengths))], state.extents))
        logits = torch.full((len(positions), V), -1e4)
        starts = torch.repeat_interleave(self.starts[: len(lengths)], torch.tensor(lengths))
        return logits.scatter(1, self.script[positions - starts][:, None], 0.0)


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    return ragged_known([{i: 65 + i for i in range(1, n)} for n in lengths], L)


def test_blocks_follow_until_one_holds_the_end() -> None:
    """Six tokens and the end of text: two blocks of four, then nothing more is asked for."""
    model = Scripted([1, 2, 3, 4, 5, 6, EOT, EOT, *range(10, 26)], 5, 3)
    request = SamplingRequest(2, 2, bos=EOT, known=prompts(5, 3))
    revealed, seen = torch.zeros(2, L, dtype=torch.int64), list[tuple[int, int]]()
    rows = sample_rows(model, request, ENDS, revealed_at=revealed, progress=lambda *x: seen.append(x))
    for row, start in zip(rows.tolist(), (5, 3), strict=True):
        assert row[0] == EOT
        assert row[1:start] == [65 + i for i in range(1, start)]
        assert row[start : start + 6] == [1, 2, 3, 4, 5, 6]
        assert row[start + 6 :] == [EOT] * (L - start - 6)
    assert [extents for _, extents in model.asked] == [[9, 7], [9, 7], [13, 11], [13, 11]]
    asked = [sorted(chain.from_iterable(positions[row] for positions, _ in model.asked)) for row in (0, 1)]
    assert asked == [list(range(5, 13)), list(range(3, 11))]
    assert sorted(revealed[0, 5:13].tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert not revealed[0, :5].any()
    assert not revealed[0, 13:].any()
    assert seen[-1] == (4, 4)


def test_rows_that_have_ended_are_left_alone() -> None:
    model = Scripted([1, EOT, EOT, EOT, 5, 6, 7, 8], 2)
    rows = sample_rows(model, SamplingRequest(1, 4, bos=EOT, known=prompts(2)), ENDS)
    assert len(model.asked) == 4
    assert rows[0, 2:].tolist() == [1] + [EOT] * (L - 3)
    endless = Scripted(list(range(1, L)), 3)
    rows = sample_rows(endless, SamplingRequest(1, 4, bos=EOT, known=prompts(3)), ENDS)
    assert rows[0, 3:].tolist() == list(range(1, L - 2))  # to the end of the row
    assert endless.asked[-1][1] == [L]


@pytest.mark.parametrize("config", [PGM, CAUSAL, MDLM, AR], ids=["pgm", "causal", "mdlm", "ar"])
def test_an_answer_depends_on_its_seed_and_index_alone(config: ModelConfig) -> None:
    model = randomised(config, V, L, scale=0.02)
    with torch.no_grad():
        model.head.bias[EOT] += 3.5  # so that answers end at different blocks
    order = "left_to_right" if model.left_to_right else "uniform"
    request = SamplingRequest(6, 4, bos=EOT, order=order, known=prompts(5, 3, 7, 22, 23, 24))
    rows = sample_rows(model, request, ENDS)
    tokens, given = prompts(5, 3, 7, 22, 23, 24)
    given[:, 0] = False
    assert torch.equal(rows[given], tokens[given])
    ends = {(row[n:] == EOT).long().argmax().item() // BLOCK for row, n in zip(rows, (5, 3, 7), strict=False)}
    assert len(ends) > 1
    for row in range(6):
        alone = SamplingRequest(
            1,
            4,
            bos=EOT,
            order=order,
            known=tuple(x[[row]] for x in prompts(5, 3, 7, 22, 23, 24)),
            indices=[row],
        )
        assert torch.equal(sample_rows(model, alone, ENDS)[0], rows[row])


def test_tokens_behind_the_prompt_are_kept() -> None:
    """An infilled answer: the first block reaches up to what is given, which every prediction sees."""
    model = randomised(PGM, V, L)
    known = ragged_known([{1: 7, 2: 8, 12: 9}], L)
    rows = sample_rows(model, SamplingRequest(1, 12, bos=EOT, known=known), ENDS)
    assert rows[0, [1, 2, 12]].tolist() == [7, 8, 9]
    with pytest.raises(CapabilityError, match="decides itself"):
        sample_rows(model, SamplingRequest(1, 4, bos=EOT), ENDS, length=8)


def test_a_model_of_answers() -> None:
    facts = DataFacts(V, L, EOT, EOT, EOT, (0,) * L + (1,), None, BLOCK, "chat")
    ends = RowEnds.of(facts)
    assert ends == RowEnds(EOT, EOT, (0,) * L + (1,), BLOCK, "chat")
    tokenizer, net = ByteTokenizer(), randomised(PGM, V, 64)
    model = Model(net, EOT, tokenizer, None, ends)
    (text,) = model.write("hi", steps=2)
    assert text.startswith("User:\nhi\n\nAssistant:\n")
    first, second = model.answer(["hi", "ho"], steps=2, seed=3)
    assert model.answer(["hi"], steps=2, seed=3) == [first]
    assert first != second
    with pytest.raises(ConfigError, match=r"prompts\[1\]: 119 tokens; expected at most 62"):
        model.answer(["", "x" * 100])
    (scored,) = model.score([("hi", "abcde")])
    assert scored.tokens == 8  # two blocks
    plain = Model(net, EOT, tokenizer)
    with pytest.raises(CapabilityError, match="answer: the model was not trained on prompts and answers"):
        plain.answer(["hi"])
    assert plain.score([("hi", "abcde")])[0].tokens == 5


def test_answers_end_with_their_block() -> None:
    pairs = [([1, 2], [3, 4, 5]), ([1], [3, 4, 5, 6]), ([1] * 18, [3, 4])]
    assert as_answers(pairs, ENDS, 20) == [
        ([1, 2], [3, 4, 5, EOT]),
        ([1], [3, 4, 5, 6, EOT, EOT, EOT, EOT]),
        ([1] * 18, [3, 4]),
    ]


def test_exact_answers() -> None:
    """Up to the first end of text; what follows it, and the prompt, do not count."""
    roles = Roles(np.array([2, 2, 2, 1]), np.array([6, 6, 6, 3]))
    rows = np.array([[EOT, 1, 5, 6, EOT, EOT, 0]] * 3 + [[EOT, 5, 6, 0, 0, 0, 0]])
    drawn = np.array(
        [
            [EOT, 1, 5, 6, EOT, 0, 0],
            [EOT, 1, 5, 6, 7, EOT, 0],
            [EOT, 1, 5, EOT, 0, 0, 0],
            [EOT, 5, 6, 9, 9, 9, 9],  # an answer that was cut
        ]
    )
    assert exact_answers(drawn, rows, roles, EOT).tolist() == [True, False, False, True]


def test_answers_of_masked_models_end_with_a_random_block() -> None:
    """Every row has a uniform number of its blocks, as a function of (seed, step, row)."""
    roles = Roles(
        np.array([3, 5, 1]), np.array([15, 9, 24])
    )  # blocks: 3, 1, and 6 of which the last has 3 tokens
    index, counts = np.array([4, 0, 2]), [set(), set(), set()]  # type: ignore[var-annotated]
    for step in range(100):
        cut = cut_answers(roles, index, seed=1, step=step, batch=5, block=BLOCK)
        again = cut_answers(roles.rows(slice(1, 3)), index[1:], seed=1, step=step, batch=5, block=BLOCK)
        assert again.lengths.tolist() == cut.lengths.tolist()[1:]
        for row in range(3):
            counts[row].add(int(cut.lengths[row] - roles.given[row]))
    assert counts == [{4, 8, 12}, {4}, {4, 8, 12, 16, 20, 23}]
