"""Low-rank adaptation from command to end: a registered model is adapted, sampled, exported and tuned on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import load_model
from pipeline.config.schema import RunConfig
from pipeline.export import export_model
from pipeline.models import model_folder
from pipeline.models.adapters.folder import read_base
from pipeline.run import Run
from pipeline.training import checkpoint, launch


@pytest.mark.slow
def test_from_a_registered_model_to_an_export(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start goes on with the first one's adapter; the base is version 1, whatever the alias names then."""
    base = configure("adapter-base", train={"steps": 4})
    registered = launch.pretrain(base)
    assert registered.version == "models:/adapter-base/1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracking_uri)
    train = {"init_from": "models:/adapter-base@teacher", "checkpoint_every": 2, "zero_stage": 2}
    adapted = configure(
        "adapted",
        model={"lora": {"rank": 2, "alpha": 4.0}},
        train={"steps": 4, **train},
        sampling={"num_samples": 2},
    )
    run = Run.of(adapted)
    launch.pretrain(adapted)
    factors = model_folder.read_weights(Path(run.adapter_folder), model_folder.ADAPTER)
    assert read_base(Path(run.adapter_folder)).name == "models:/adapter-base/1"

    # The adapter gives the samples of the merged model, and of its export.
    export_model(run.adapter_folder, str(tmp_path / "export"), ["license=mit"])
    paths = (run.adapter_folder, run.model_folder, str(tmp_path / "export"))
    samples = [
        launch.sample(sampling_of(adapted, f"sampling-{number}", path)) for number, path in enumerate(paths)
    ]
    assert all(np.array_equal(one.tokens, samples[0].tokens) for one in samples)
    original, merged = (load_model(Run.of(x).model_folder).denoiser.state_dict() for x in (base, adapted))
    moved = {name for name, value in merged.items() if not torch.equal(value, original[name])}
    assert moved == {name.rpartition(".")[0] + ".weight" for name in factors}

    # The same command with more steps goes on.
    launch.pretrain(adapted.model_copy(update={"train": adapted.train.model_copy(update={"steps": 6})}))
    path = checkpoint.latest(run.folder)
    assert path is not None
    assert path.endswith(checkpoint.name_of(6))
    assert Path(run.folder, checkpoint.name_of(4)).is_dir()
    after = model_folder.read_weights(Path(run.adapter_folder), model_folder.ADAPTER)
    assert any(not torch.equal(value, factors[name]) for name, value in after.items())


def sampling_of(config: RunConfig, name: str, model: str) -> RunConfig:
    """The config of a job that samples a model."""
    sampling = config.sampling.model_copy(update={"model": model})
    return config.model_copy(update={"name": name, "sampling": sampling})
