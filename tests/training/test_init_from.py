"""`train.init_from`: a fresh run that starts from the weights, and the average, of another."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizers import Text8Tokenizer, load_tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import build, model_folder
from pipeline.models.released import conversion
from pipeline.run import Run
from pipeline.training import checkpoint, resume
from tests.support import observed, plain
from tests.support.observed import Seen, Weights, quick
from tests.support.workers import Workers

SOURCES = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (3, "bf16")]
# (source, stage, precision) of the run that starts from it
STARTS = [
    *((f"source-{stage}-{precision}", 1, "fp32") for stage, precision in SOURCES),
    ("consolidated", 1, "fp32"),
    ("consolidated", 3, "bf16"),
    ("source-1-fp32", 3, "fp32"),
    ("source-1-fp32", 1, "bf16"),
    ("source-1-fp32", 0, "bf16"),
]
Source = tuple[str, Weights, Weights]  # folder, weights, average
Start = tuple[str, int, str]


@pytest.fixture(scope="module")
def sources(run_storage: Path, groups: dict[int, Workers]) -> dict[str, Source]:
    """Checkpoints that two workers wrote at several stages, and a consolidated folder of one of them."""
    configs = [
        quick(run_storage, f"source-{stage}-{precision}", steps=4, zero_stage=stage, precision=precision)
        for stage, precision in SOURCES
    ]
    found: dict[str, Source] = {}
    manifest = Manifest.read(Run(configs[0]).data_path)
    for config, seen in zip(configs, groups[2](observed.train, configs, True)[0], strict=True):
        path = checkpoint.latest(Run(config).folder)
        assert path is not None
        found[config.name] = path, seen.weights, {name: v.float() for name, v in seen.average.items()}
    path = found["source-1-fp32"][0]
    run = Run(configs[1].model_copy(update={"name": "consolidated"}), given_manifest=manifest)
    into = run.model_folder
    checkpoint.consolidate(path, run, load_tokenizer("bytes"))
    average = found["source-1-fp32"][2]
    return {**found, "consolidated": (into, average, average)}


def started_from(config: RunConfig, source: str, **train: object) -> RunConfig:
    """The next run: updates too small to move a weight, so that the average moves towards them alone."""
    train = {"init_from": source, "steps": 3, "checkpoint_every": 3, **train}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "optim": config.optim.model_copy(update={"lr": 1e-12}),
        }
    )


@pytest.fixture(scope="module")
def tuned(
    sources: dict[str, Source], run_storage: Path, groups: dict[int, Workers]
) -> dict[Start, tuple[RunConfig, Seen]]:
    """Runs of one worker."""
    configs = []
    for name, stage, precision in STARTS:
        fresh = quick(run_storage, f"{name}-at-{stage}-{precision}", zero_stage=stage, precision=precision)
        configs.append(started_from(fresh, sources[name][0]))
    seen = groups[1](observed.train, configs)[0]
    return {key: (config, one) for key, config, one in zip(STARTS, configs, seen, strict=True)}


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_a_run_starts_from_weights_and_average(
    sources: dict[str, Source], tuned: dict[Start, tuple[RunConfig, Seen]], start: Start
) -> None:
    name, _, precision = start
    (source, weights, average), (config, seen) = sources[name], tuned[start]
    assert seen.error is None
    assert f"starting from the weights of {source}" in seen.log
    model = plain.fresh(config)
    own = model(plain.batch_of(config, 0)).sum().item()
    model.load_state_dict(weights)
    expected = model(plain.batch_of(config, 0)).sum().item()
    assert seen.losses[1] == pytest.approx(expected, abs=1e-5 if precision == "fp32" else 0.01)
    assert abs(expected - own) > 0.1  # not the weights that the seed gives
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    stored = checkpoint.ema_weights(path, config.model, Manifest.read(Run(config).data_path))
    for key, value in weights.items():
        assert float((seen.weights[key] - value).abs().max()) < 1e-6, key  # not rounded to bf16
        mixed = 0.9**3 * average[key] + (1 - 0.9**3) * value
        assert float((stored[key] - mixed).abs().max()) < 1e-6, key
    assert name == "consolidated" or any(
        float((average[key] - value).abs().max()) > 1e-3 for key, value in weights.items()
    )


def read(config: RunConfig) -> Run:
    """A run with its manifest."""
    return Run(config, given_manifest=Manifest.read(Run(config).data_path))


def refusal(config: RunConfig, source: str, **model: object) -> str:
    """What `initial_weights` says against a source."""
    wanted = started_from(config, source)
    wanted = wanted.model_copy(update={"model": config.model.model_copy(update=model)})
    with pytest.raises(CheckpointError) as caught:
        resume.initial_weights(read(wanted), plain.fresh(wanted))
    return str(caught.value)


@pytest.mark.parametrize("name", ["source-1-fp32", "source-3-fp32", "consolidated"])
def test_a_source_that_does_not_fit_is_named(
    sources: dict[str, Source], run_storage: Path, name: str
) -> None:
    config = quick(run_storage, "misfit")
    message = refusal(config, sources[name][0], hidden=32, encoder_blocks=2)
    assert message.startswith(f"train.init_from: {sources[name][0]!r} does not fit the model:\n")
    assert "\n  missing encoder.1.mlp.up.weight [128, 32]" in message
    assert "\n  embedding.weight is [257, 16], expected [257, 32]" in message


def test_a_model_of_other_token_ids_is_refused(
    sources: dict[str, Source], run_storage: Path, tmp_path: Path
) -> None:
    """Weights would fit, but their ids mean other texts."""
    shutil.copytree(sources["consolidated"][0], tmp_path / "model")
    Text8Tokenizer().save(tmp_path / "model")
    message = refusal(quick(run_storage, "ids"), str(tmp_path / "model"))
    assert "has other token ids than the data (tokenizer 'text8', the data's is 'bytes')" in message
    assert f"data.tokenizer={tmp_path / 'model'}" in message


def test_a_causal_encoder_starts_from_a_bidirectional_model(
    sources: dict[str, Source], run_storage: Path
) -> None:
    config = started_from(quick(run_storage, "causal"), sources["consolidated"][0])
    config = config.model_copy(update={"model": config.model.model_copy(update={"encoder": "causal"})})
    model = plain.fresh(config)
    found = resume.initial_weights(read(config), model)
    assert found is not None
    assert model.causal
    for name, value in model_folder.read_weights(Path(sources["consolidated"][0])).items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(found[0][name], value)


def test_a_file_of_released_weights_is_a_start(run_storage: Path) -> None:
    file = Path(__file__).parents[1] / "data" / "pgm_mean_mlp4.safetensors"
    released, section, _ = conversion.load(file)
    config = started_from(quick(run_storage, "from-released"), str(file))
    config = config.model_copy(update={"model": section.model.model_copy(update={"encoder": "causal"})})
    model = build(config.model, released.vocab_size, released.length)
    resume.initial_weights(Run(config), model)
    assert model.causal
    for name, value in released.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_source_that_is_none_is_refused(sources: dict[str, Source], run_storage: Path) -> None:
    config = quick(run_storage, "misfit")
    expected = "expected a model folder, an adapter folder, released weights, a checkpoint, models:/NAME@ALIAS or hf:"
    assert f"'/nowhere': no such folder or file; {expected}" in refusal(config, "/nowhere")
    run = str(Path(sources["source-1-fp32"][0]).parent)
    assert refusal(config, run).startswith(f"{run}: no model.safetensors; expected a consolidated model")


def test_a_damaged_source_is_refused(sources: dict[str, Source], run_storage: Path, tmp_path: Path) -> None:
    config = quick(run_storage, "misfit")
    copy = tmp_path / "copy"
    shutil.copytree(sources["source-1-fp32"][0], copy)
    (copy / "ema_00001.safetensors").unlink()
    assert refusal(config, str(copy)) == (
        f"train.init_from: {str(copy)!r} is not usable: ema_00001.safetensors is missing"
    )


def test_weights_of_a_consolidated_folder_are_the_average(sources: dict[str, Source]) -> None:
    path, _, average = sources["consolidated"]
    model, config, facts = model_folder.read(Path(path))
    assert config.kind == "pgm"
    assert (facts.vocab_size, facts.length) == (257, 16)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    assert tensors.keys() == average.keys()
    assert all(torch.allclose(tensors[name], average[name], rtol=0, atol=1e-6) for name in average)
