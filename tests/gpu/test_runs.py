"""Jobs on a GPU through Ray, DeepSpeed and MLflow, as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TINY = [
    "data.length=32",
    "model.hidden=64",
    "model.heads=2",
    "train.steps=20",
    "train.batch=16",
    "train.micro_batch=8",
    "train.log_every=5",
    "train.validate_every=20",
    "train.checkpoint_every=10",
    "evaluation.rows=32",
    "sampling.steps=8",
    "tracking.system_metrics=false",
    "cluster.workers=1",
    "optim.warmup_steps=2",
    "optim.schedule=constant",
    "data.tokenizer=bytes",
]
RECIPE = str(ROOT / "configs/text/quickstart.yaml")


def job(folder: Path, name: str, *words: str) -> str:
    """Run `python -m jobs.NAME` in a folder, and give its output."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", f"jobs.{name}", *words]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def losses(output: str) -> dict[int, float]:
    """Training losses by step, from the log."""
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+ +loss ([\d.]+)", output)}


def test_float32_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    words = [RECIPE, *TINY, "train.precision=fp32"]
    found = losses(job(tmp_path, "pretrain", *words, "name=gpu", "cluster.accelerator=gpu"))
    expected = losses(job(tmp_path, "pretrain", *words, "name=cpu", "cluster.accelerator=cpu"))
    assert found.keys() == {5, 10, 15, 20}
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_train_and_resume_in_bf16(stage: int, tmp_path: Path) -> None:
    words = [RECIPE, *TINY, "train.precision=bf16", f"train.zero_stage={stage}", "cluster.accelerator=gpu"]
    whole = losses(job(tmp_path, "pretrain", *words, "name=whole"))
    assert whole.keys() == {5, 10, 15, 20}
    assert whole[20] < whole[5]
    job(tmp_path, "pretrain", *words, "name=cut", "train.steps=10", "train.validate_every=10")
    resumed = losses(job(tmp_path, "pretrain", *words, "name=cut"))
    assert resumed.keys() == {15, 20}
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=2e-3)


@pytest.mark.parametrize("encoder", ["bidirectional", "causal"])
def test_compiled_training_sampling_and_profile(encoder: str, tmp_path: Path) -> None:
    words = [RECIPE, *TINY, f"model.encoder={encoder}", "train.precision=bf16", "cluster.accelerator=gpu"]
    eager = losses(job(tmp_path, "pretrain", *words, "name=eager"))
    compiled = ["name=compiled", "train.compile=true", "train.profile_steps=3"]
    if encoder == "causal":
        compiled.append("sampling.compile=true")
    found = losses(job(tmp_path, "pretrain", *words, *compiled))
    assert found == pytest.approx(eager, rel=1e-2)
    assert [*tmp_path.glob("runs/compiled/profile/trace.json.gz")]
