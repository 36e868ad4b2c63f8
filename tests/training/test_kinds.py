"""Every kind of model trains: on two workers whose parameters are all cut up as on one that has them whole."""

import json
import re
from pathlib import Path

import pytest

from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig, SwapConfig
from pipeline.config.schema import RunConfig
from pipeline.run import Run
from tests.support import observed
from tests.support.data_helpers import answers, pairs, sentences
from tests.support.tiny_runs import with_micro_tokens
from tests.support.workers import Workers

SIZE = {"hidden": 16, "heads": 2, "dropout": 0.0}
SWAP = SwapConfig(pooling="logsumexp", query="mlp4", norm="rms", every_block=True)
MODELS = {
    "ar": ARConfig(kind="ar", blocks=2, **SIZE),
    "ar-classes-registers": ARConfig(kind="ar", blocks=2, classes=3, registers=1, **SIZE),
    "complementary": MDLMConfig(kind="mdlm", blocks=2, complementary=True, **SIZE),
    "mdlm-classes-registers": MDLMConfig(kind="mdlm", blocks=2, classes=3, registers=1, **SIZE),
    "pgm-variant": PGMConfig(encoder_blocks=1, decoder_blocks=2, swap=SWAP, **SIZE),
    "pgm-causal": PGMConfig(encoder="causal", encoder_blocks=2, decoder_blocks=1, **SIZE),
    "pgm-classes-registers": PGMConfig(encoder_blocks=1, decoder_blocks=1, classes=3, registers=2, **SIZE),
}
PADDED = {f"{name}-padded": MODELS[name] for name in ("ar", "complementary", "pgm-causal")}
ANSWERS = {f"{name}-answers": MODELS[name] for name in ("ar", "complementary", "pgm-causal")}
PAIRS = {f"{name}-pairs": MODELS[name] for name in ("ar", "complementary", "pgm-causal")}
MODELS |= PADDED | ANSWERS | PAIRS
STEPS = 5
Runs = dict[str, tuple[observed.Seen, observed.Seen]]


def _configs(storage: Path, stage: int, again: bool) -> list[RunConfig]:
    """Validation, with samples, follows the last step."""
    configs = []
    for name, model in MODELS.items():
        config = observed.quick(
            storage,
            f"{name}-stage-{stage}",
            steps=STEPS,
            zero_stage=stage,
            activation_checkpointing=again,
        ).model_copy(update={"model": model, "sampling": SamplingConfig(steps=3)})
        config = sentences(config) if name in PADDED else config
        config = pairs(config) if name in PAIRS else config
        config = answers(config) if name in ANSWERS else config
        if name in ANSWERS and stage == 3:  # as many rows as fit, in place of four
            config = with_micro_tokens(config, 32)
        configs.append(config)
    return configs


@pytest.fixture(scope="module")
def runs(run_storage: Path, groups: dict[int, Workers]) -> Runs:
    """What rank 0 saw: alone with whole parameters, and with a second worker under stage 3, recomputing."""
    for prepared in (sentences, answers, pairs):
        Run(prepared(observed.quick(run_storage, "any"))).with_data()
    alone = groups[1](observed.train, _configs(run_storage, 0, False))[0]
    shared = groups[2](observed.train, _configs(run_storage, 3, True))[0]
    return {name: pair for name, *pair in zip(MODELS, alone, shared, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_stage_3_on_two_workers_is_plain_training(runs: Runs, name: str) -> None:
    alone, shared = runs[name]
    assert alone.error is shared.error is None
    assert alone.losses.keys() == set(range(1, STEPS + 1))
    assert shared.losses == pytest.approx(alone.losses, abs=2e-5, rel=0)
    assert shared.norms == pytest.approx(alone.norms, rel=1e-4)
    if name not in PAIRS:  # whose losses depend on the parts that are given in a step
        assert alone.losses[STEPS] < alone.losses[1] - 0.05


@pytest.mark.parametrize("name", ANSWERS)
def test_validation_answers_held_out_prompts(runs: Runs, run_storage: Path, name: str) -> None:
    (file,) = [
        file
        for file in run_storage.glob(f"runs/{name}-stage-0/step_*/state.json")
        if file.parent.name.endswith("5")
    ]
    for text in json.loads(file.read_text())["samples"]:
        assert re.match("[01][0-9a-f]+:", text)


@pytest.mark.parametrize("name", MODELS)
def test_validation_names_its_estimator(runs: Runs, name: str) -> None:
    for seen in runs[name]:
        (line,) = [line for line in seen.log if "validation perplexity" in line]
        assert ("exact" if name.startswith("ar") else "count") + " estimator" in line
