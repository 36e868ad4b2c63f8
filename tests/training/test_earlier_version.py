"""Prepared data, a checkpoint and a model folder that version 0.1.0 wrote are still read.

They lie in tests/data/earlier_version: a run of four updates on twelve short documents, its checkpoint after two.
"""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline import load_model
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import check_fits
from pipeline.models import model_folder
from pipeline.run import Run
from pipeline.training import checkpoint, resume
from tests.support import observed
from tests.support.workers import Workers

EARLIER = Path(__file__).parents[1] / "data" / "earlier_version"
STEP = checkpoint.name_of(2)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Config of the earlier run, with its checkpoint and its data in a storage of this test."""
    state = checkpoint.read_state(str(EARLIER / STEP))
    tree = state.config | {"cluster": state.config["cluster"] | {"storage": str(tmp_path)}}
    config = RunConfig.model_validate(tree)
    run = Run(config)
    shutil.copytree(EARLIER / STEP, Path(run.folder) / STEP)
    shutil.copytree(EARLIER / "data", run.data_path)
    return config


def test_prepared_data_is_taken_as_it_is(config: RunConfig) -> None:
    manifest = Run(config).with_data().manifest
    check_fits(manifest, config)
    assert (manifest.rows("train"), manifest.rows("validation")) == (350, 75)


def test_training_goes_on_from_the_checkpoint(groups: dict[int, Workers], config: RunConfig) -> None:
    """The last two updates give the weights that the earlier version gave."""
    (seen,) = groups[1](observed.train_one, config)
    assert seen.error is None
    assert list(seen.losses) == [3, 4]
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    manifest = Run(config).with_data().manifest
    average = checkpoint.ema_weights(path, config.model, manifest)
    for name, value in model_folder.read_weights(EARLIER / "model").items():
        torch.testing.assert_close(average[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_workers_go_on_from_the_checkpoint_of_one(groups: dict[int, Workers], config: RunConfig) -> None:
    """Checkpoints of earlier versions are converted for another number of workers, once."""
    path = f"{Run(config).folder}/{STEP}"
    alone = groups[1](observed.train_one, config)[0]
    shutil.rmtree(f"{Run(config).folder}/{checkpoint.name_of(4)}")
    seen = groups[2](observed.train_one, config)[0]
    assert seen.error is alone.error is None
    assert seen.losses == pytest.approx(alone.losses, abs=1e-5, rel=0)
    converted = Path(checkpoint.universal_path(path))
    assert converted.is_dir()
    before = converted.stat().st_mtime_ns
    resume._convert(path)
    assert converted.stat().st_mtime_ns == before
    checkpoint.prune(Run(config).folder, keep=1)
    assert not converted.exists()


def test_model_folder_loads() -> None:
    model = load_model(str(EARLIER / "model"))
    samples = model.sample(2, steps=4, seed=0)
    assert samples.shape == (2, 16)
    assert [type(text) for text in model.decode(samples)] == [str, str]
