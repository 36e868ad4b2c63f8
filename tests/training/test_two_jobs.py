"""A job in a folder where another one works is refused before anything is started or written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml

from pipeline.config.load import dump, parse
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError
from pipeline.runtime import claims
from pipeline.sweeps.sweep import sweep
from pipeline.training import launch
from tests.support.tiny_runs import tiny


def pretrain(folder: Path) -> None:
    launch.pretrain(tiny(folder, "a"))


def distill(folder: Path) -> None:
    section = {"teacher": str(folder / "none"), "teacher_steps": 8, "rounds": 1}
    launch.distill(parse({**tiny(folder, "a").model_dump(mode="json"), "distill": section}, "test"))


def run_sweep(folder: Path) -> None:
    (folder / "base.yaml").write_text(dump(tiny(folder, "base", train={"validate_every": 4})))
    tree = {"name": "a", "base": "base.yaml", "space": {"optim.lr": {"grid": [0.1, 0.2]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    sweep(load_sweep(folder / "sweep.yaml"))


@pytest.mark.parametrize("job", [pretrain, distill, run_sweep])
def test_a_second_job_is_refused(job: Callable[[Path], None], tmp_path: Path) -> None:
    folder, running = tmp_path / "runs" / "a", ray.is_initialized()
    with claims.held(str(folder), "cluster.storage", "run 'a'", "trained"):
        with pytest.raises(ConfigError, match=f"(run|sweep) 'a' is being trained by .*:{os.getpid()} since"):
            job(tmp_path)
        assert os.listdir(folder) == [claims.FOLDER]
    assert ray.is_initialized() == running
