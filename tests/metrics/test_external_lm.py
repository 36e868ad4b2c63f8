"""Generative perplexity under a tiny causal model that is made here."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import CapabilityError, ConfigError, DataError
from pipeline.metrics import external_lm
from pipeline.metrics.external_lm import Scorer, load_scorer_tokenizer, total
from tests.support.causal_lm import TEXTS, save_scorer

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


def test_features_are_the_last_hidden_states(scorer_folder: str) -> None:
    texts = ["the cat sat", "on it", "a longer text than these"]
    found = Scorer(scorer_folder, 2, 1).score(texts)
    model = AutoModelForCausalLM.from_pretrained(scorer_folder, dtype=torch.float32).eval()
    ids = sorted(load_scorer_tokenizer(scorer_folder).encode(texts), key=len)
    expected = [model.transformer(torch.tensor([text])).last_hidden_state[0, -1] for text in ids]
    assert torch.allclose(torch.from_numpy(found.features), torch.stack(expected), atol=1e-5)


def test_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need packages that are no dependencies, and may be damaged."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    spec, there = f"{tmp_path}/model.gguf", {"gguf": None, "accelerate": None}
    monkeypatch.setattr(external_lm, "find_spec", there.get)
    with pytest.raises(CapabilityError, match=r"model\.gguf' needs packages .*: gguf, accelerate"):
        load_scorer_tokenizer(spec)
    monkeypatch.setattr(external_lm, "find_spec", {"gguf": 1, "accelerate": 1}.get)
    with pytest.raises(ConfigError, match=r"evaluation\.scorer: .*model\.gguf' cannot be loaded"):
        load_scorer_tokenizer(spec)


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
