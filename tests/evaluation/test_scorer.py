"""Generative perplexity under a tiny causal model that is made here."""

import math
from pathlib import Path

import pytest
import torch
from causal_lm import TEXTS, save_scorer
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.scorer import Scorer, load_scorer_tokenizer, total

CONTEXT = 24


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 of one random layer with byte-level BPE."""
    return save_scorer(tmp_path_factory.mktemp("scorer") / "tiny", CONTEXT)


def test_equals_a_direct_computation(scorer_folder: str) -> None:
    ids = load_scorer_tokenizer(scorer_folder).encode(TEXTS)
    model = AutoModelForCausalLM.from_pretrained(scorer_folder, dtype=torch.float32).eval()
    nats = tokens = 0.0
    for text in ids:
        if len(text) > 1:
            row = torch.tensor([text])
            nats += model(input_ids=row, labels=row).loss.item() * (len(text) - 1)
            tokens += len(text) - 1
    for batch in (1, 4):
        found = Scorer(scorer_folder, batch, 1).score(TEXTS)
        assert found.tokens == tokens
        assert found.cut == 0
        assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    parts = [Scorer(scorer_folder, 4, 1).score(TEXTS[i : i + 2]) for i in (0, 2, 4)]
    assert total(parts).perplexity == pytest.approx(found.perplexity, rel=1e-5)


def test_ends_of_text_become_the_scorers_own(scorer_folder: str) -> None:
    tokenizer = load_scorer_tokenizer(scorer_folder)
    (ids,) = tokenizer.encode(["a<|endoftext|>b"])
    assert ids[1] == tokenizer.tokenizer.eos_token_id
    assert len(ids) == 3


def test_context(scorer_folder: str) -> None:
    tokenizer = load_scorer_tokenizer(scorer_folder)
    assert tokenizer.context == CONTEXT
    tokenizer.check_context(["x" * CONTEXT])
    with pytest.raises(
        ConfigError, match=r"evaluation\.scorer: .* reads 24 tokens, .* up to 30 of its tokens"
    ):
        tokenizer.check_context(["a", "x" * 30])
    whole, longer = (Scorer(scorer_folder, 4, 1).score(["x" * n]) for n in (CONTEXT, CONTEXT + 6))
    assert (longer.tokens, longer.cut) == (CONTEXT - 1, 6)
    assert longer.nats == pytest.approx(whole.nats)


def test_no_such_scorer(scorer_folder: str, tmp_path: Path) -> None:
    wrong = str(Path(scorer_folder).with_name("tinny"))
    with pytest.raises(ConfigError, match=r"evaluation\.scorer: .*tinny.* did you mean 'tiny'"):
        load_scorer_tokenizer(wrong)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"evaluation\.scorer: .* cannot be loaded"):
        load_scorer_tokenizer(str(tmp_path))


def test_nothing_to_score(scorer_folder: str) -> None:
    with pytest.raises(DataError, match="no text of at least two tokens"):
        total([Scorer(scorer_folder, 4, 1).score(["", "a"])])
    with pytest.raises(DataError, match="expected samples"):
        total([])
