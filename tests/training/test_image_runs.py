"""Training on images: codes behind a BOS, classes and their drop, arccos masking and its normalisers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.reading_order import MicroBatch
from pipeline.data.shards import ShardReader
from pipeline.models import build
from pipeline.run import Run
from pipeline.runtime.actors import Resources
from pipeline.training import checkpoint, finish
from pipeline.training.pretraining import Pretraining
from pipeline.training.validation import image_tokenizer
from tests.support import observed
from tests.support.workers import Workers

SIZE = {"hidden": 16, "heads": 2, "dropout": 0.0, "classes": 10}
MODELS = {
    "pgm": PGMConfig(encoder_blocks=1, decoder_blocks=1, registers=2, **SIZE),
    "maskgit": MDLMConfig(kind="mdlm", blocks=2, registers=1, **SIZE),
    "ar": ARConfig(kind="ar", blocks=2, **SIZE),
}
STEPS, CODES = 6, 16
IMAGES = {
    "kind": "image",
    "source": "digits",
    "factor": 4,
    "codes": CODES,
    "validation_images": 97,
    "fit_images": 300,
    "shard_rows": 600,
    "streams": 4,
    "shuffle_window": 600,
}
Runs = dict[str, tuple[observed.Seen, observed.Seen]]


def image_run(storage: Path, name: str, model: str, stage: int) -> RunConfig:
    """Digits as 2 x 2 codes of 4 x 4 pixels."""
    text = observed.quick(storage, name, steps=STEPS, zero_stage=stage, class_drop=0.25)
    data = {**IMAGES, "path": str(storage / "images")}
    tree = text.model_dump(mode="json") | {"data": data, "model": MODELS[model].model_dump(mode="json")}
    tree["diffusion"]["schedule"] = "loglinear" if model == "ar" else "arccos"
    if model == "ar":
        tree["sampling"] |= {"order": "left_to_right", "steps": 4}
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def runs(run_storage: Path, groups: dict[int, Workers]) -> Runs:
    """What rank 0 saw: alone with whole parameters, and with a second worker under stage 3."""
    Run(image_run(run_storage, "prepare-images", "pgm", 0)).with_data()
    seen = [
        groups[count](observed.train, [image_run(run_storage, f"{m}-{stage}", m, stage) for m in MODELS])[0]
        for count, stage in ((1, 0), (2, 3))
    ]
    return {name: pair for name, *pair in zip(MODELS, *seen, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_workers_and_stages_agree(runs: Runs, name: str) -> None:
    alone, shared = runs[name]
    assert alone.error is shared.error is None
    assert min(alone.norms.values()) > 0
    assert shared.losses == pytest.approx(alone.losses, abs=2e-5, rel=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_a_mean_over_targets(runs: Runs, name: str) -> None:
    """A head of zeros gives every target log V nats, however many of them there are."""
    assert runs[name][0].losses[1] == pytest.approx(math.log(CODES), abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_validation_names_what_it_measures(runs: Runs, name: str) -> None:
    for seen in runs[name]:
        (line,) = [line for line in seen.log if ": validation " in line]
        assert ("exact" if name == "ar" else "nats per masked token, arccos") in line


def test_the_grid_of_a_run_on_cpus_needs_no_actor(
    runs: Runs, run_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of a sweep hold all CPUs until they end, so an actor would never start."""
    assert runs["pgm"][0].error is None
    config = image_run(run_storage, "pgm-0", "pgm", 0)
    run = Run(config).with_data().replace(given_resources=Resources(actors=1, cpus=1, use_gpu=False))
    last = checkpoint.latest(run.folder)
    assert last is not None
    checkpoint.consolidate(last, run, image_tokenizer(run))
    monkeypatch.setattr(finish, "started", None)
    assert finish._grid(run).axes
    assert Path(run.folder, "samples.png").is_file()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_has_its_classes_and_bos(runs: Runs, run_storage: Path, name: str) -> None:
    config = image_run(run_storage, "any", name, 0)
    manifest = Manifest.read(Run(config).data_path)
    assert (manifest.vocabulary, manifest.special.bos, manifest.classes) == (CODES, CODES + 1, 10)
    reader, rows = ShardReader(Run(config).data_path, manifest, "train"), np.arange(8)
    model = build(config.model, CODES, manifest.length, manifest.special.bos)
    task = Pretraining(Run(config, given_manifest=manifest), model, torch.device("cpu"))
    labels, dropped = reader.labels(rows), []
    assert labels is not None
    for step in range(200):
        micro = MicroBatch(reader.rows(rows).astype(np.int64), rows, labels)
        task.start(step)
        batch = task.batch(task.prepare(step, [micro], skipped=())[0])
        assert batch.condition is not None
        seen = batch.condition.numpy()
        dropped.append(seen == 10)
        assert np.array_equal(seen[seen != 10], labels[seen != 10])
        assert batch.tokens[:, 0].eq(CODES + 1).all()
        assert not batch.targets[:, 0].any()
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.05)
    assert np.std(np.mean(dropped, axis=0)) < 0.06  # no place in the batch is preferred
