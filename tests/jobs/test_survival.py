"""A run that loses workers and its driver ends as if nothing had happened (slow: many starts)."""

import random
import signal
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.run import Run
from pipeline.tracking import tracking_uri
from pipeline.training import checkpoint
from tests.support.launched import LaunchedJob
from tests.support.tiny_runs import tiny
from tests.support.workers import run_workers

STEPS, EVERY = 800, 50


def survivor(storage: Path, name: str) -> RunConfig:
    train = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 10, "validate_every": 300}
    return tiny(storage, name, train=train, cluster={"workers": 2, "max_failures": 1})


def undisturbed(rank: int, workers: int, config: RunConfig) -> list[tuple[int, float]]:
    """The same run in plain processes, without Ray; (step, loss)."""
    from pipeline.runtime.session import PlainSession
    from pipeline.training.loop import train

    session = PlainSession(rank, workers, Run(config).folder)
    train(Run(config), session)
    return [(step, metrics["train/loss"]) for step, metrics in session.history]


@pytest.fixture
def kills() -> list[int]:
    """Three random steps, far enough apart for a restart to reach a checkpoint in between: `max_failures` is 1."""
    rng = random.Random(7)
    return [low + rng.randrange(60) for low in (60, 190, 320)]


@pytest.mark.slow
def test_kills_of_workers_and_driver_change_nothing(tmp_path: Path, kills: list[int]):
    config = survivor(tmp_path, "victim")
    rng = random.Random(3)
    with LaunchedJob("pretrain", config, tmp_path) as job:
        seen = 0
        for step in kills:
            job.wait_for(rf"step {step // 10 * 10}/{STEPS}", after=seen)
            seen = len(job.lines)
            rng.choice(job.workers()).kill()
            again = job.wait_for(r"resuming from step (\d+)", after=seen)
            # At most what came after the last checkpoint is done again (its upload may still have been under way).
            assert step - int(again[1]) <= 2 * EVERY
        job.wait_for(rf"step 450/{STEPS}", after=seen)
        job.kill_driver()

    with LaunchedJob("pretrain", config, tmp_path) as job:
        job.wait_for(rf"step \d+/{STEPS}")  # the workers outlive their driver for a moment, and save
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(120) == 1
        job.wait_for("stopped on request")
    run = MlflowClient(tracking_uri(config)).search_runs(["1"])[0]
    assert run.info.status == "KILLED"

    with LaunchedJob("pretrain", config, tmp_path) as job:
        text = job.finish()
        assert "resuming from step" in text
        assert "validation perplexity" in text

    plain = survivor(tmp_path, "undisturbed")
    expected, _ = run_workers(undisturbed, 2, plain)
    client = MlflowClient(tracking_uri(config))
    (run,) = client.search_runs(["1"])  # one run, whatever happened
    assert run.info.status == "FINISHED"
    points = sorted(
        client.get_metric_history(run.info.run_id, "train/loss"), key=lambda point: point.timestamp
    )
    logged = {point.step: point.value for point in points}
    # A log line after a restart averages fewer steps; lines of whole intervals must be equal.
    whole = [step for step, _ in expected if step > 700 or step <= kills[0] // 10 * 10]
    assert len(whole) > 5
    for step, loss in expected:
        if step in whole:
            assert logged[step] == pytest.approx(loss, abs=1e-6), step

    manifest = Manifest.read(str(tmp_path / "data"))
    ends = [
        checkpoint.ema_weights(str(checkpoint.latest(Run(c).folder)), c.model, manifest)
        for c in (config, plain)
    ]
    for name, values in ends[0].items():
        assert torch.equal(values, ends[1][name]), name


@pytest.mark.slow
def test_a_run_without_progress_ends(tmp_path: Path) -> None:
    train = {"steps": 100_000, "checkpoint_every": 100_000, "log_every": 10, "validate_every": 100_000}
    config = tiny(tmp_path, "hopeless", train=train, cluster={"workers": 1, "max_failures": 1})
    with LaunchedJob("pretrain", config, tmp_path) as job:
        for _ in range(2):
            seen = len(job.lines)
            job.wait_for(r"step 10/100000", after=seen)
            job.workers()[0].kill()
        assert job.process.wait(120) == 1
        job.wait_for(
            r"error: training failed 2 times before the first checkpoint, more than cluster.max_failures \(1\)"
        )
