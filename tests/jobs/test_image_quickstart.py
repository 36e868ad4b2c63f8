"""The image quickstart, started as a user would: what it draws are the digits that were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from pipeline import load_model
from tests.support.notebooks import run_notebook

ROOT = Path(__file__).parents[2]
SAMPLES = 200


def grey(images: np.ndarray) -> np.ndarray:
    """RGB images [n, 8, 8, 3] on the scale of the real digits, 0 to 16, one row each."""
    return images[..., 0].reshape(len(images), -1) / 255 * 16


@pytest.mark.slow
def test_digits_are_those_that_were_asked_for(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs.pretrain",
            "configs/image/quickstart.yaml",
            f"cluster.storage={tmp_path}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    grid = tmp_path / "image_quickstart/samples.png"
    assert str(grid) in done.stdout
    assert min(Image.open(grid).size) > 500

    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.data[::2], digits.target[::2])
    assert judge.score(digits.data[1::2], digits.target[1::2]) > 0.95
    model = load_model(str(tmp_path / "image_quickstart/model"))
    labels = torch.arange(SAMPLES) % 10
    drawn = model.sample(SAMPLES, 12, "halton", condition=labels, guidance=2.0)
    accuracy = (judge.predict(grey(model.images(drawn))) == labels.numpy()).mean()
    assert accuracy >= 0.8
    free = model.sample(SAMPLES, 12, "halton", seed=1)
    assert len(np.unique(judge.predict(grey(model.images(free))))) == 10
    run_notebook("images", storage=str(tmp_path))  # with the model of this run
