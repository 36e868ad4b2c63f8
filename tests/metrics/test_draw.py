"""Sampling by Ray actors: what is written, and that it does not depend on batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.api import load_model
from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import PGMConfig
from pipeline.metrics.draw import Sampler, describe, generate, labels_of
from pipeline.models import model_folder
from pipeline.models.vq import PatchVQ
from pipeline.runtime.actors import Resources
from tests.support.small_models import randomised

PATCHES = np.random.default_rng(0).integers(0, 256, (11, 2, 2, 3)).astype(np.uint8)
CONFIG = PGMConfig(hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0, classes=3, registers=2)


@pytest.fixture
def image_model(tmp_path: Path) -> str:
    """A model of 11 codes on 3 x 3 grids behind a BOS, with its tokenizer."""
    model = randomised(CONFIG, 11, 10)  # no id beyond V is read: BOS is code 0 here
    model_folder.write(
        tmp_path / "model",
        CONFIG,
        model_folder.DataFacts(11, 10, 0, None),
        model.state_dict(),
        model_folder.Background(),
    )
    PatchVQ(PATCHES).save(tmp_path / "model")
    return str(tmp_path / "model")


def test_images_with_their_labels(image_model: str, tmp_path: Path, ray_cluster: None) -> None:
    """Batches of two rows in an actor give what one batch gives here."""
    settings = SamplingConfig(
        num_samples=5, steps=4, order="halton", guidance=1.0, labels=(2, 0), batch=2, seed=3
    )
    out = tmp_path / "out"
    samples = generate(image_model, settings, Resources(1, 1, False), str(out))
    assert np.array_equal(samples.tokens, Sampler(1).draw(image_model, settings, 0, 5).tokens)
    assert samples.labels == [2, 0, 2, 0, 2]
    assert {file.name for file in out.iterdir()} == {"tokens.npy", "samples.jsonl", "samples.png", "images"}
    assert np.array_equal(np.load(out / "tokens.npy"), samples.tokens)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines == [{"index": i, "label": label} for i, label in enumerate(samples.labels)]
    for index, row in enumerate(samples.tokens):
        image = np.asarray(Image.open(out / "images" / f"{index:06d}.png"))
        assert np.array_equal(image, PatchVQ(PATCHES).decode(row[None, 1:])[0])
    assert min(Image.open(out / "samples.png").size) > 100


def test_in_bf16(image_model: str) -> None:
    settings = SamplingConfig(num_samples=5, steps=4, labels=(2, 0), precision="bf16")
    sampler = Sampler(1)
    drawn = sampler.draw(image_model, settings, 0, 5).tokens
    assert sampler._models[image_model, "bf16"][0].head.weight.dtype == torch.bfloat16
    model = load_model(image_model, precision="bf16")
    assert np.array_equal(drawn, model.sample(5, 4, condition=torch.tensor([2, 0, 2, 0, 2])).numpy())
    assert describe(settings, 5)["precision"] == "bfloat16"


def test_classes_come_in_turn() -> None:
    assert labels_of(SamplingConfig(), 3, 2, 4) == [2, 0, 1, 2]
    assert labels_of(SamplingConfig(labels=(7,)), 10, 5, 2) == [7, 7]
