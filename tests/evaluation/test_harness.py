"""lm-evaluation-harness on our models: its own command line, and answers that do not depend on the batch."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import jobs.harness
from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.errors import ConfigError
from pipeline.metrics.continuations import score_continuations
from pipeline.models import build, model_folder
from pipeline.models.denoiser import Denoiser
from tests.support.harness_task import write_task
from tests.support.small_models import randomised

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from pipeline.api import Model
from pipeline.evaluation.harness import DenoiserLM, HarnessSettings
from pipeline.sampling.logits import Filters
from pipeline.sampling.row_ends import RowEnds

L, LETTERS = 16, "abcdefgh"
PGM = PGMConfig(hidden=32, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0)
KINDS = [
    PGM,
    PGM.model_copy(update={"encoder": "causal"}),
    MDLMConfig(kind="mdlm", hidden=32, heads=2, blocks=2, dropout=0),
    ARConfig(kind="ar", hidden=32, heads=2, blocks=2, dropout=0),
]


def trained_on_repeats(steps: int = 150) -> Denoiser:
    """A partition model of rows that repeat one letter; a few seconds."""
    torch.manual_seed(0)
    rng, config = np.random.default_rng(0), DiffusionConfig(loss_weight="uniform")
    model = build(PGM, 257, L)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    objective, present = Objective(config, bos=False, both_groups=True), np.ones(16, bool)
    for step in range(steps):
        letters = rng.choice(np.frombuffer(LETTERS.encode(), np.uint8), 16)
        tokens = np.repeat(letters[:, None], L, 1).astype(np.int64)
        draws = partition.draw(config, seed=0, step=step, shape=(16, L), bos=False)
        divisor = objective.normaliser(draws.groups)
        batch = objective.batch(tokens, draws, present, divisor=divisor, device=torch.device("cpu"))
        model(batch).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def save(model: Denoiser, config: ModelConfig, into: Path) -> None:
    facts = model_folder.DataFacts(257, L, None, 256)
    model_folder.write(into, config, facts, model.state_dict(), model_folder.Background())
    ByteTokenizer().save(into)


@pytest.fixture(scope="module")
def repeats() -> Denoiser:
    return trained_on_repeats()


@pytest.mark.slow
def test_accuracy_through_the_command_line(
    repeats: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(repeats, PGM, tmp_path / "model")
    rng, questions = np.random.default_rng(1), []
    for _ in range(24):
        letters = list(rng.permutation(list(LETTERS))[:4])
        label = int(rng.integers(4))
        choices = [str(letter) * 5 for letter in letters]
        questions.append({"context": letters[label] * 6, "choices": choices, "label": label})
    write_task(tmp_path / "task", questions)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["--model", "pgm", "--model_args", f"path={tmp_path}/model,draws=4", "--tasks", "continuation"]
    words += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["jobs.harness", *words])
    jobs.harness.main()
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text())["results"]["continuation"]
    assert results["acc,none"] > 0.9
    assert results["sample_len"] == 24


def requests(*arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, one, 0) for one in arguments]


def harness(model: Denoiser, **changes: int) -> DenoiserLM:
    settings = HarnessSettings(**{"draws": 3, "seed": 5, "steps": 8, "rows": 7, **changes})
    return DenoiserLM(Model(model, None, ByteTokenizer()), settings)


@pytest.mark.parametrize("config", KINDS, ids=["pgm", "causal", "mdlm", "ar"])
def test_together_and_one_by_one(config: PGMConfig | MDLMConfig) -> None:
    model = randomised(config, 257, L).double()
    lm = harness(model)
    pairs = requests(("ab", "cde"), ("", "xy"), ("abc ", "d"), ("long context " * 3, "end"), ("a", "b" * 30))
    together = lm.loglikelihood(pairs)
    apart = [harness(model, rows=1).loglikelihood([one])[0] for one in reversed(pairs)][::-1]
    for (nats, match), (other, same) in zip(together, apart, strict=True):
        assert nats == pytest.approx(other, rel=1e-6)
        assert match == same
    texts = requests(("ab",), ("some text that is longer than two rows of it",), ("",))
    rolling = lm.loglikelihood_rolling(texts)
    assert rolling == pytest.approx(
        [harness(model, rows=1).loglikelihood_rolling([t])[0] for t in texts], rel=1e-6
    )
    assert rolling[2] == 0
    asked: dict[str, object] = {"until": ["\n\n"], "max_gen_toks": 12}
    sampled = asked | {"do_sample": True, "temperature": 0.9}
    writing = requests(("ab", asked), ("a longer one", sampled), ("", sampled), ("x" * 40, asked))
    written = lm.generate_until(writing)
    assert written == [harness(model, rows=1).generate_until([one])[0] for one in writing]
    assert written[1] != harness(model, seed=6).generate_until([writing[1]])[0]


def test_values_are_those_of_the_bound() -> None:
    model = randomised(PGM, 257, L).double()
    ((nats, _),) = harness(model).loglikelihood(requests(("ab ", "cd")))
    (bound,) = score_continuations(model, [(b"ab", b" cd")], 3, 5)
    assert -nats == pytest.approx(bound.nats, rel=1e-6)
    # A whole text follows the end of the one before it.
    (rolling,) = harness(model).loglikelihood_rolling(requests(("abcd",)))
    (bound,) = score_continuations(model, [([256], b"abcd")], 3, 5)
    assert -rolling == pytest.approx(bound.nats, rel=1e-6)


def test_writing_and_first_choices(repeats: Denoiser) -> None:
    lm = harness(repeats)
    asked: dict[str, object] = {"max_gen_toks": 5}
    stop: dict[str, object] = {"max_gen_toks": 5, "until": "bb"}
    sampled: dict[str, object] = {"max_gen_toks": 30, "do_sample": True, "temperature": 0.1}
    written = lm.generate_until(requests(("aaaa", asked), ("bbb", stop), ("ccc", sampled)))
    assert written == ["aaaaa", "", "c" * 30]
    found = lm.loglikelihood(requests(("ddd", "dddd"), ("ddd", "dddf")))
    assert [match for _, match in found] == [True, False]
    assert found[0][0] > found[1][0] + 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"draws": 0}, "draws: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"steps": 0}, "steps: 0"),
        ({"rows": "8"}, "rows: '8'"),
    ],
)
def test_settings_outside_their_bounds(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=f"{says}; expected an integer"):
        HarnessSettings(**settings)


@pytest.mark.parametrize("config", [PGM, KINDS[3]], ids=["pgm", "ar"])
def test_a_model_of_prompts_and_answers(config: PGMConfig | ARConfig) -> None:
    """Contexts are prompts in the model's template; continuations are whole answers, with their end."""
    denoiser, ends = randomised(config, 257, 64), RowEnds(256, 256, (0,) * 64 + (1,), 4, "instruction")
    with torch.no_grad():
        denoiser.head.bias[256] += 3  # so that answers end
    model = Model(denoiser, 256, ByteTokenizer(), None, ends)
    lm = DenoiserLM(model, HarnessSettings(draws=3, seed=5, steps=4, rows=7))
    pairs = [("ab", "cde"), ("", "xy")]
    scores = model.score(pairs, draws=3, seed=5)
    assert [score.tokens for score in scores] == [4, 4]
    found = lm.loglikelihood(requests(*pairs))
    assert [-nats for nats, _ in found] == pytest.approx([score.nats for score in scores], rel=1e-5)
    texts = lm.generate_until(requests(*((prompt, {"max_gen_toks": 20}) for prompt, _ in pairs)))
    assert all(len(text) <= 20 for text in texts)
    if model.denoiser.left_to_right:  # without randomness
        answers = model.answer([prompt for prompt, _ in pairs], filters=Filters(top_k=1))
        assert texts == answers
        assert all(answers)
