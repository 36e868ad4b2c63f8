"""Sweeps that are killed, that stop trials early, that search by a model (slow: many starts)."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.config.load import dump
from pipeline.training import checkpoint
from tests.support.launched import LaunchedJob
from tests.support.tiny_runs import tiny


def write(folder: Path, steps: int, every: int, workers: int, **own: Any) -> Path:
    train = {"steps": steps, "validate_every": every, "checkpoint_every": every, "log_every": 10}
    base = tiny(folder, "base", train=train, cluster={"workers": workers, "storage": str(folder)})
    (folder / "base.yaml").write_text(dump(base))
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "swept", "base": "base.yaml", **own}, sort_keys=False))
    return file


def runs(folder: Path) -> dict[str, Run]:
    """All MLflow runs by name."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(ids)}


@pytest.mark.slow
def test_a_killed_and_a_stopped_sweep_go_on_where_they_were(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        160,
        20,
        1,
        space={"model.swap.norm": {"grid": ["layer", "rms"]}},
        seeds=[0, 1],
        max_concurrent=1,
    )
    with LaunchedJob("sweep", file, tmp_path) as job:
        job.wait_for(r"\(1 of 4 trials")
        job.wait_for(r"norm=layer seed 1: step 60/160")
        job.kill_driver()
    before = runs(tmp_path)
    (done,) = [name for name, run in before.items() if run.info.status == "FINISHED"]
    (cut,) = [name for name in before if name.startswith("norm-layer") and name != done]

    with LaunchedJob("sweep", file, tmp_path) as job:
        job.wait_for("4 trials, 1 of them ended before")
        job.wait_for(r"norm=rms seed 0: step 60/160")
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(120) == 1
        text = "\n".join(job.lines)
    assert text.splitlines()[-1].startswith("error: stopped on request after checkpoints")
    assert "norm=layer seed 1: step 20/160" not in text  # it went on from a checkpoint
    stopped = {name: run.info.status for name, run in runs(tmp_path).items()}
    (halved,) = [name for name in stopped if name.startswith("norm-rms")]  # the last one has not begun
    assert stopped == {done: "FINISHED", cut: "FINISHED", halved: "KILLED", "swept": "KILLED"}
    newest = checkpoint.newest(str(tmp_path / "swept" / halved))
    assert newest is not None
    step = checkpoint.read_state(newest).step
    assert 60 <= step < 160

    with LaunchedJob("sweep", file, tmp_path) as job:
        job.wait_for("4 trials, 2 of them ended before")
        text = job.finish()
    assert "norm=rms seed 0: step 60/160" not in text
    after = runs(tmp_path)
    for name in (done, cut, "swept"):
        assert after[name].info.run_id == before[name].info.run_id
    assert after[done].info.end_time == before[done].info.end_time
    assert [run.info.status for run in after.values()] == ["FINISHED"] * 5
    parent = after["swept"].info.run_id
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent for run in after.values()) == 4
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    steps = {p.step for p in client.get_metric_history(after[cut].info.run_id, "validation/perplexity")}
    assert steps == set(range(20, 161, 20))


@pytest.mark.alone
def test_asha_stops_worker_groups_early_and_optuna_suggests(tmp_path: Path) -> None:
    """Two workers a trial, so one trial at a time; hopeless rates must not go to the end."""
    file = write(
        tmp_path,
        200,
        20,
        2,
        space={"optim.lr": {"choice": [1e-2, 1e-9, 1e-10]}},
        search="optuna",
        num_samples=3,
        scheduler="asha",
        first_rung=20,
        reduction=2,
    )
    with LaunchedJob("sweep", file, tmp_path) as job:
        text = job.finish()
    assert "at most 1 at the same time" in text
    suggested = json.loads((tmp_path / "swept" / "suggested.json").read_text())
    assert 1 <= len(suggested) <= 3
    ends = [json.loads(path.read_text()) for path in sorted((tmp_path / "swept").glob("*/trial.json"))]
    assert {end["status"] for end in ends} <= {"finished", "stopped"}
    for end in ends:
        if end["status"] == "stopped":
            assert 20 <= end["step"] < 200
    for path in (tmp_path / "swept").glob("*/trial.json"):
        assert (path.parent / "model" / "model.safetensors").exists()
