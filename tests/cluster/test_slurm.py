"""The Slurm launcher with stand-ins for srun and scontrol: two Ray nodes on this machine, stopped and continued."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.load import dump
from tests.support.tiny_runs import tiny

ROOT = Path(__file__).parents[2]
# Runs the command once for each task, and ends the tasks with all their children, as Slurm does at the end of a step.
SRUN = f"""#!{sys.executable}
import psutil, signal, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][: next(i for i, w in enumerate(words) if w[:2] != "--")]
count = int(next(o for o in options if o.startswith("--ntasks=")).split("=")[1])
tasks = [subprocess.Popen(words[len(options):]) for _ in range(count)]
def end(*_):
    for task in tasks:
        for process in [*psutil.Process(task.pid).children(recursive=True), task]:
            process.kill()
signal.signal(signal.SIGTERM, end)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'one\\ntwo\\n'; else echo "$@" >>"$CALLS"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Mapping[str, str]:
    """The environment of a job of two nodes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return inherited | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "PIPELINE_PYTHON": sys.executable,
        "PIPELINE_MLFLOW": str(tmp_path / "mlflow"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "2",
    }


@pytest.mark.alone
def test_a_job_is_stopped_before_its_limit_and_goes_on(slurm: Mapping[str, str], tmp_path: Path) -> None:
    train = {"steps": 200, "checkpoint_every": 200, "log_every": 10, "validate_every": 200}
    config = tmp_path / "run.yaml"
    config.write_text(dump(tiny(tmp_path, "slurm", train=train, cluster={"workers": 2})))
    command = ["bash", "cluster/slurm.sh", "jobs.pretrain", str(config)]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=slurm, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    try:
        while "step 20/200" not in (text := (tmp_path / "log").read_text()):
            assert job.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
    finally:
        job.send_signal(signal.SIGTERM)  # what Slurm sends to the batch script
        code = job.wait(120)
    assert code == 1
    text = (tmp_path / "log").read_text()
    assert "Ray runs on 2 nodes" in text
    assert "stopped on request" in text
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"

    again = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from step" in again.stdout + again.stderr
    assert "validation perplexity" in again.stdout
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db").search_runs(
        ["1"]
    )  # of a server of its own
    assert run.info.status == "FINISHED"


def test_a_job_must_be_named(slurm: Mapping[str, str]) -> None:
    ended = subprocess.run(["bash", "cluster/slurm.sh"], cwd=ROOT, env=slurm, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "expected a job, such as: sbatch cluster/slurm.sh" in ended.stderr
