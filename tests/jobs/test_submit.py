"""The whole way on a cluster: a head with tokens, `ray job submit`, an MLflow server, an object store."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from jobs.cli import JOB_VARIABLE, check_locations, command
from pipeline import storage
from pipeline.config.load import load
from pipeline.errors import ConfigError, DataError
from pipeline.training import checkpoint
from tests.support.launched import ROOT
from tests.support.object_store import Store

BIN = Path(sys.executable).parent
CONFIG = "configs/text/quickstart.yaml"
SMALL = [  # a run of seconds
    "data.length=16",
    "data.streams=4",
    "data.shard_rows=2048",
    "model.hidden=16",
    "model.heads=2",
    "model.encoder_blocks=1",
    "model.decoder_blocks=1",
    "optim.warmup_steps=2",
    "train.batch=8",
    "train.micro_batch=4",
    "train.log_every=5",
    "sampling.steps=4",
    "train.validate_every=100",
    "evaluation.rows=16",
    "evaluation.batch=8",
    "cluster.workers=2",
]


@dataclass(frozen=True)
class Head:
    """A running head and the environment that clients need."""

    address: str
    mlflow: str
    environment: dict[str, str]
    database: Path  # MLflow's

    def submit(self, *words: str, timeout: float = 400) -> tuple[int, str]:
        """`ray job submit` to the end: its code and all it printed."""
        line = [BIN / "ray", "job", "submit", "--address", self.address, "--working-dir", ".", *words]
        done = subprocess.run(
            line,
            cwd=ROOT,
            env=self.environment,
            text=True,
            timeout=timeout,
            stdout=-1,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(ready, timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it answers, and wants a token
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def end(process: subprocess.Popen[bytes]) -> None:
    """It and everything that it started."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    psutil.wait_procs(family, timeout=10)
    for member in (*family, process):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            member.kill()
    process.wait(30)


@pytest.fixture(scope="module")
def head(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    short = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short names
    (folder / "token").write_text("0123456789abcdef" * 4)
    tracking, port, dashboard, agent = (free_port() for _ in range(4))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    mlflow, address = f"http://127.0.0.1:{tracking}", f"http://127.0.0.1:{dashboard}"
    environment = kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "RAY_API_SERVER_ADDRESS": address,  # Ray Train refuses to choose between two Rays of one machine
        "MLFLOW_TRACKING_URI": f"http://me:planted-password@127.0.0.1:{tracking}",
        "HF_TOKEN": "planted-hub-token",
        "OMP_NUM_THREADS": "1",
    }
    serve = f"""{BIN}/mlflow server --host 127.0.0.1 --port {tracking} --workers 1
        --backend-store-uri sqlite:///{folder}/mlflow.db --artifacts-destination s3://bucket/mlflow"""
    start = f"""{BIN}/ray start --head --block --num-cpus=2 --port={port} --dashboard-host=127.0.0.1
        --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} --temp-dir={short}
        --disable-usage-stats"""
    processes: list[subprocess.Popen[bytes]] = []

    def launch(line: str, ready: str, attempts: int = 1) -> None:
        """Start a server and wait until it answers."""
        log = folder / f"{len(processes)}.log"
        with log.open("wb") as stream:
            processes.append(
                subprocess.Popen(line.split(), cwd=folder, env=environment, stdout=stream, stderr=stream)
            )
        try:
            wait_until(ready, processes[-1], log)
        except AssertionError:
            if attempts == 1:
                raise
            launch(line, ready, attempts - 1)

    try:
        launch(serve, f"{mlflow}/health")
        launch(start, f"{address}/api/version", attempts=3)  # Ray gives up after 30 s on a busy machine
        log = folder / f"{len(processes) - 1}.log"
        wait_until(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", processes[-1], log)
        yield Head(address, mlflow, environment, folder / "mlflow.db")
    finally:
        for process in processes:
            end(process)
        shutil.rmtree(short, ignore_errors=True)


def test_folders_inside_a_submitted_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(ROOT / CONFIG)
    monkeypatch.chdir(tmp_path)
    check_locations(config)  # a plain command
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": {"env_vars": {"A": "b"}}}))
    check_locations(config)  # submitted without a copy of the code
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    with pytest.raises(ConfigError, match=r"cluster.storage: 'runs' lies in the copy of the code"):
        check_locations(config)
    check_locations(load(ROOT / CONFIG, ["cluster.storage=s3://bucket/runs"]))
    check_locations(load(ROOT / CONFIG, ["cluster.storage=/shared/runs"]))


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        (DataError("no such shard"), 1, "error: no such shard"),
        (ValueError("first\n  last  "), 1, "error: ValueError: last"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_failed_job_says_why_in_its_last_line(
    raised: BaseException,
    code: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: list[str]) -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["job", "config.yaml"])
    with pytest.raises(SystemExit) as ended:
        command(run, "CONFIG", least=1)
    assert ended.value.code == code
    assert capsys.readouterr().err.splitlines()[-1] == last


@pytest.mark.slow
def test_submit_prepare_pretrain_sample_and_read_back(head: Head, store: Store) -> None:
    common = [CONFIG, "name=submitted", "cluster.storage=s3://bucket/runs", *SMALL]
    printed = ""
    for job, more, expected in (
        ("prepare", ["train.steps=20"], r"prepared s3://bucket/runs/data/\S+"),
        ("pretrain", ["train.steps=20", "train.checkpoint_every=10"], r"models:/submitted/1"),
        (
            "sample",
            ["train.steps=20", "sampling.num_samples=8"],
            r"8 samples in .* s3://bucket/runs/submitted",
        ),
    ):
        code, text = head.submit("--", "python", "-m", f"jobs.{job}", *common, *more)
        assert code == 0, text[-5000:]
        assert re.search(expected, text), text[-3000:]
        printed += text

    # Run, metrics, artifacts and model, over HTTP.
    client = MlflowClient(head.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("pgm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "20"
    assert run.data.metrics["validation/perplexity"] > 1
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
    assert run.inputs.dataset_inputs
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert "figures" in artifacts
    version = client.get_model_version_by_alias("submitted", "teacher")
    assert version.run_id == run.info.run_id
    (model,) = [path for path in artifacts if path.startswith("model-")]
    assert {"model.safetensors", "config.yaml"} <= {
        item.path.rpartition("/")[2] for item in client.list_artifacts(run.info.run_id, model)
    }
    assert storage.listing("s3://bucket/mlflow")  # where the server put them
    with urllib.request.urlopen(f"{head.mlflow}/api/2.0/mlflow/runs/get?run_id={run.info.run_id}") as answer:
        assert json.load(answer)["run"]["info"]["status"] == "FINISHED"

    # Checkpoints in the store, whole.
    assert checkpoint.steps("s3://bucket/runs/submitted") == [10, 20]
    assert checkpoint.problems("s3://bucket/runs/submitted/step_00000020") == []
    assert len(storage.listing("s3://bucket/runs/submitted/samples")) == 1

    # No secret of the environment is in what the jobs printed, in Ray's record of them, in MLflow or in the store.
    token = {"Authorization": f"Bearer {Path(head.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    jobs = urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", headers=token)).read()
    assert b"jobs.pretrain" in jobs
    fs, _ = storage.filesystem("s3://bucket")
    stored = b"".join(fs.cat(fs.find("bucket")).values())
    assert b"train" in stored
    for where in (printed.encode(), jobs, head.database.read_bytes(), stored):
        for secret in (b"planted-password", b"planted-hub-token", b"planted-secret", b"0123456789abcdef" * 4):
            assert secret not in where


@pytest.mark.slow
def test_a_bad_config_ends_with_the_reason_and_a_stranger_gets_nothing(head: Head) -> None:
    code, text = head.submit(
        "--", "python", "-m", "jobs.pretrain", CONFIG, "train.stepz=3", "cluster.storage=s3://bucket/r"
    )
    assert code != 0
    assert "train.stepz: no such key in train; did you mean 'steps'?" in text.rstrip().splitlines()[-1]
    code, text = head.submit("--", "python", "-m", "jobs.pretrain", CONFIG)
    assert code != 0
    assert "cluster.storage: 'runs' lies in the copy" in text.rstrip().splitlines()[-1]
    stranger = {k: v for k, v in head.environment.items() if k != "RAY_AUTH_TOKEN_PATH"} | {
        "RAY_AUTH_TOKEN": "0" * 64
    }
    code, text = replace(head, environment=stranger).submit("--", "python", "-c", "print('inside')")
    assert code != 0
    assert "inside\n" not in text
    assert re.search("unauthori[sz]ed|invalid", text, re.IGNORECASE)


@pytest.mark.slow
def test_job_stop_ends_in_a_checkpoint_and_a_run_marked_killed(head: Head) -> None:
    words = [CONFIG, "name=stopped", "cluster.storage=s3://bucket/runs", *SMALL, "train.steps=100000"]
    code, text = head.submit(
        "--no-wait", "--submission-id", "to-stop", "--", "python", "-m", "jobs.pretrain", *words
    )
    assert code == 0, text
    deadline = time.monotonic() + 300
    while "step 10/" not in (told := job_logs(head)):
        assert time.monotonic() < deadline, told[-3000:]
        assert "Traceback" not in told, told[-3000:]
        time.sleep(1)
    subprocess.run(
        [BIN / "ray", "job", "stop", "--address", head.address, "to-stop"],
        env=head.environment,
        check=True,
        timeout=150,
        stdout=-1,
    )
    told = job_logs(head)
    assert told.rstrip().splitlines()[-1].startswith("error: stopped on request after a checkpoint"), told[
        -2000:
    ]
    (step,) = checkpoint.steps("s3://bucket/runs/stopped")
    assert step >= 10
    assert checkpoint.problems(f"s3://bucket/runs/stopped/{checkpoint.name_of(step)}") == []
    client = MlflowClient(head.mlflow)
    run_id = json.loads(storage.read_text("s3://bucket/runs/stopped/run.json"))["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"


def job_logs(head: Head) -> str:
    line = [BIN / "ray", "job", "logs", "--address", head.address, "to-stop"]
    return subprocess.run(line, env=head.environment, text=True, timeout=60, stdout=-1, stderr=-2).stdout
