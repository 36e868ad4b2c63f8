"""The image quickstart, started as a user would: what it draws are the digits that were asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from pipeline import load_model
from tests.support.launched import job_output
from tests.support.notebooks import run_notebook

SAMPLES = 200


def grey(images: np.ndarray) -> np.ndarray:
    """RGB images [n, 8, 8, 3] on the scale of the real digits, 0 to 16, one row each."""
    return images[..., 0].reshape(len(images), -1) / 255 * 16


@pytest.mark.slow
def test_digits_are_those_that_were_asked_for(tmp_path: Path) -> None:
    out = job_output("pretrain", "configs/image/quickstart.yaml", f"cluster.storage={tmp_path}")
    grid = tmp_path / "image_quickstart/samples.png"
    assert str(grid) in out
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
