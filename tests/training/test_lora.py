"""Adapters through the real training loop: ZeRO stages, resumption with another number of workers, and the end."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import load_model
from pipeline.config.model import LoraConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import model_folder
from pipeline.models.adapters.folder import read_base
from pipeline.models.adapters.lora import adapt
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run
from pipeline.training import checkpoint, resume, slices
from pipeline.training.engine import OPTIMIZER, WEIGHTS
from tests.support import observed, plain
from tests.support.small_models import shake
from tests.support.workers import Workers

LORA = LoraConfig(rank=2, alpha=4.0)
STEPS, HALF = 6, 3
STAGES = [0, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))]


@pytest.fixture(scope="module")
def base(run_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    config, folder = observed.quick(run_storage, "base"), tmp_path_factory.mktemp("base") / "model"
    model = shake(plain.fresh(config), scale=0.1)
    manifest = Manifest.read(Run(config).data_path)
    model_folder.write(folder, config.model, manifest.facts, model.state_dict(), model_folder.Background())
    load_tokenizer("bytes").save(folder)
    return folder


def tuned(storage: Path, name: str, base: Path, **train: object) -> RunConfig:
    settings = {"init_from": str(base), "steps": STEPS, "checkpoint_every": HALF, **train}
    config = observed.quick(storage, name, **settings)
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": LORA})})


def adapted(config: RunConfig, base: Path) -> Denoiser:
    """The model that a run of adapters starts with."""
    model = plain.fresh(config)
    model.load_state_dict(model_folder.read_weights(base))
    adapt(model, LORA)
    return model


@pytest.fixture(scope="module")
def reference(run_storage: Path, base: Path) -> plain.Plain:
    config = tuned(run_storage, "reference", base)
    return plain.train(config, model=adapted(config, base))


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("stage", STAGES)
def test_stages(
    stage: int, run_storage: Path, base: Path, reference: plain.Plain, groups: dict[int, Workers]
) -> None:
    config = tuned(run_storage, f"lora-{stage}", base, zero_stage=stage)
    half = config.model_copy(update={"train": config.train.model_copy(update={"steps": HALF})})
    ranks = groups[2](observed.train, [half])
    seen, original = ranks[0][0], model_folder.read_weights(base)
    assert seen.error is None
    assert seen.losses == pytest.approx({s: reference.losses[s] for s in range(1, HALF + 1)}, abs=1e-5)
    # Nothing but the factors has moments, or is part of a checkpoint; frozen weights keep every bit.
    count = sum(value.numel() for value in seen.weights.values())
    assert seen.weights.keys() == reference.weights.keys()
    moments = sum(rank[0].moments for rank in ranks)
    assert 2 * count * (2 if stage == 0 else 1) <= moments < 2.1 * count * (2 if stage == 0 else 1)
    assert count < sum(value.numel() for value in original.values()) / 3
    assert seen.frozen.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in seen.frozen.items())
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    assert slices.read_whole(Path(path), OPTIMIZER, WEIGHTS).keys() == seen.weights.keys()
    # The same run goes on with one worker.
    seen = groups[1](observed.train, [config])[0][0]
    assert seen.error is None
    assert seen.losses == pytest.approx(
        {s: reference.losses[s] for s in range(HALF + 1, STEPS + 1)}, abs=1e-5
    )
    assert furthest(seen.weights, reference.weights) < 1e-4
    assert all(torch.equal(value, original[name]) for name, value in seen.frozen.items())
    check_end(config, base, reference, original)


@pytest.mark.slow
def test_in_bf16_with_the_optimiser_on_the_host(
    run_storage: Path, base: Path, reference: plain.Plain, groups: dict[int, Workers]
) -> None:
    """At stages 1 to 3; micro-batches of two rows accumulate."""
    train = {"precision": "bf16", "offload_optimizer": True, "micro_batch": 2, "steps": HALF}
    configs = [tuned(run_storage, f"host-{stage}", base, zero_stage=stage, **train) for stage in (1, 2, 3)]
    original = model_folder.read_weights(base)
    for seen in groups[2](observed.train, configs)[0]:
        assert seen.error is None
        assert seen.losses == pytest.approx({s: reference.losses[s] for s in range(1, HALF + 1)}, abs=0.01)
        assert seen.weights.keys() == reference.weights.keys()
        assert all(
            torch.equal(value, original[name].bfloat16().float()) for name, value in seen.frozen.items()
        )


def check_end(config: RunConfig, base: Path, reference: plain.Plain, original: dict[str, Tensor]) -> None:
    """The run's model is the base with the averaged factors added, and its adapter folder gives the same."""
    run = Run.of(config).replace(given_manifest=Manifest.read(Run(config).data_path))
    path = checkpoint.latest(run.folder)
    assert path is not None
    checkpoint.consolidate(path, run, load_tokenizer("bytes"))
    factors = model_folder.read_weights(Path(run.adapter_folder), model_folder.ADAPTER)
    assert furthest(factors, reference.average) < 1e-4
    whole, (section, _) = load_model(run.model_folder), model_folder.read_config(Path(run.model_folder))
    assert section.lora is None
    again = load_model(run.adapter_folder).denoiser.state_dict()
    changed = {name.rpartition(".")[0] + ".weight" for name in factors}
    for name, value in whole.denoiser.state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, original[name]) == (name not in changed), name
    unmerged = adapted(config, base)
    unmerged.load_state_dict(factors, strict=False)
    batch = plain.batch_of(config, 0)
    with torch.no_grad():
        assert float((unmerged.eval()(batch) - whole.denoiser(batch)).abs().max()) < 1e-5
    base_of = read_base(Path(run.adapter_folder))
    assert base_of.name == str(base)
    # A run of all weights can start from the adapter.
    further = config.model_copy(
        update={
            "model": config.model.merged,
            "train": config.train.model_copy(update={"init_from": run.adapter_folder}),
        }
    )
    model = plain.fresh(further)
    resume.initial_weights(Run(further, given_manifest=run.manifest), model)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    for source in (config, further):  # checkpoints hold factors alone, and are no base of either
        wanted = source.model_copy(update={"train": source.train.model_copy(update={"init_from": path})})
        with pytest.raises(
            CheckpointError, match="is a checkpoint, and adapters are trained on whole models"
        ):
            resume.initial_weights(Run(wanted, given_manifest=run.manifest), plain.fresh(wanted))


def test_in_bf16_and_with_a_base_that_changed(
    run_storage: Path, base: Path, tmp_path: Path, groups: dict[int, Workers]
) -> None:
    """Factors have float32 masters; the next start of a run whose base was overwritten is refused."""
    (config, facts), weights = model_folder.read_config(base), model_folder.read_weights(base)
    own = tmp_path / "model"
    model_folder.write(own, config, facts, weights, model_folder.Background())
    run = tuned(run_storage, "changed-base", own, steps=HALF, zero_stage=0, precision="bf16")
    seen = groups[1](observed.train, [run])[0][0]
    assert seen.error is None
    assert all(torch.equal(value, weights[name].bfloat16().float()) for name, value in seen.frozen.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in seen.weights.values())
    weights["embedding.weight"] = weights["embedding.weight"] + 1
    model_folder.write(own, config, facts, weights, model_folder.Background())
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": STEPS})})
    error = groups[1](observed.train, [longer])[0][0].error
    assert error is not None
    assert "has other weights than" in error
