"""Low-rank adaptation from command to end: a registered model is adapted, sampled, exported and tuned on."""

import re
from pathlib import Path

import pytest
import torch

from pipeline import load_model
from pipeline.config.model import LoraConfig
from pipeline.config.schema import RunConfig
from pipeline.export import export_model
from pipeline.models import model_folder
from pipeline.models.adapters.folder import read_base
from pipeline.run import Run
from tests.support.launched import LaunchedJob
from tests.support.tiny_runs import tiny

BASE, LORA = "models:/base@teacher", LoraConfig(rank=2, alpha=4.0)


def job(name: str, config: RunConfig, folder: Path, *overrides: str) -> str:
    """Run a job to its end; the output."""
    with LaunchedJob(name, config, folder, *overrides) as launched:
        return launched.finish()


@pytest.mark.slow
def test_from_a_registered_model_to_an_export(tmp_path: Path) -> None:
    base = tiny(tmp_path, "base", train={"steps": 4}, sampling={"steps": 16})
    job("pretrain", base, tmp_path)
    adapted = tiny(
        tmp_path,
        "adapted",
        model={"lora": LORA.model_dump()},
        train={"steps": 4, "init_from": BASE, "checkpoint_every": 2, "zero_stage": 2},
        sampling={"steps": 16, "num_samples": 2},
        cluster={"workers": 2},
    )
    assert "starting from step 0: 2 workers" in job("pretrain", adapted, tmp_path)
    run = Run.of(adapted)
    before = model_folder.read_weights(Path(run.adapter_folder), model_folder.ADAPTER)

    # The adapter gives the samples of the merged model, and of its export.
    texts = [
        sampled(job("sample", adapted, tmp_path, f"sampling.model={model}"))
        for model in (run.adapter_folder, run.model_folder)
    ]
    assert texts[0] == texts[1]
    export_model(run.adapter_folder, str(tmp_path / "export"), ["license=mit"])
    models = [load_model(path) for path in (run.adapter_folder, run.model_folder, tmp_path / "export")]
    assert len({tuple(model.sample_text(2, steps=16)) for model in models}) == 1
    original, merged = (load_model(Run.of(x).model_folder).denoiser.state_dict() for x in (base, adapted))
    moved = {name for name, value in merged.items() if not torch.equal(value, original[name])}
    assert moved == {name.rpartition(".")[0] + ".weight" for name in before}

    # The same command goes on, and still knows its base.
    output = job("pretrain", adapted, tmp_path, "train.steps=6")
    assert "resuming from step 4: 2 workers" in output
    after = model_folder.read_weights(Path(run.adapter_folder), model_folder.ADAPTER)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert read_base(Path(run.adapter_folder)).name == BASE


def sampled(output: str) -> str:
    """The text that `jobs.sample` prints."""
    found = re.search(r"--- sample 0\n(.*)\n\n2 samples in", output, re.DOTALL)
    assert found, output
    return found[1]
