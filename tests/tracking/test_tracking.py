"""MLflow through real stores: SQLite in a temporary folder, and a server that goes away and comes back."""

import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import boto3
import pytest
from matplotlib.figure import Figure
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client

from pipeline.config.load import parse
from pipeline.errors import CheckpointError, ConfigError, StoppedError
from pipeline.run import Run
from pipeline.tracking import (
    Tracker,
    check_store,
    child_of,
    download_model,
    end_run,
    ending,
    log_dataset,
    metric_history,
    open_run,
    register_model,
    set_alias,
    tracking_uri,
)
from pipeline.tracking.runs import connect
from tests.support.object_store import Fault, object_store
from tests.support.rounds import at_once, opened

PARAMS = {"name": "a", "train.steps": 100, "optim.betas": [0.9, 0.999], "tracking.uri": None}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store shared by the tests of this file, since its first use takes seconds.

    Its folder has characters that mean something else in addresses.
    """
    folder = tmp_path_factory.mktemp("store") / "a [1] #2 %20 x::y?z"
    address = tracking_uri(parse({"name": "a", "cluster": {"storage": str(folder)}}, "test"))
    connect(address)
    assert {file.name for file in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    return address


@pytest.fixture
def run_id(uri: str, request: pytest.FixtureRequest) -> str:
    return open_run(uri, "tests", request.node.name, {}, {})


@pytest.fixture(autouse=True)
def seen_by_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where caplog can see our log lines, even after a job in this process has taken them to itself."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("pipeline")]


class TestUri:
    def test_default_lies_in_the_storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.chdir(tmp_path)
        config = parse({"name": "a", "cluster": {"storage": "runs"}}, "test")
        assert tracking_uri(config) == f"sqlite:///{tmp_path}/runs/mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
        assert tracking_uri(config) == "http://server:5000"
        config = parse({"name": "a", "tracking": {"uri": "sqlite:///my.db"}}, "test")
        assert tracking_uri(config) == f"sqlite:///{tmp_path}/my.db"

    def test_remote_storage_needs_a_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config = parse({"name": "a", "cluster": {"storage": "s3://bucket/runs"}}, "test")
        with pytest.raises(
            ConfigError, match=r"tracking\.uri: missing.*s3://bucket/runs.*MLFLOW_TRACKING_URI"
        ):
            tracking_uri(config)

    @pytest.mark.parametrize(
        ("written", "nearest"),
        [
            ("htp://server", "http"),
            ("mlruns", ""),
            ("http://", ""),
            ("http://[::1", ""),
            ("sqlite://", ""),
            ("sqlite:///", ""),
            ("sqlite:x.db", ""),
        ],
    )
    def test_no_such_kind_of_store(self, written: str, nearest: str) -> None:
        config = parse({"name": "a", "tracking": {"uri": written}}, "test")
        with pytest.raises(
            ConfigError, match=f"tracking.uri: '{re.escape(written)}'.*sqlite:///FILE.*{nearest}"
        ):
            tracking_uri(config)


class TestRun:
    @pytest.mark.parametrize(
        ("raised", "status"),
        [
            (None, "FINISHED"),
            (StoppedError("stopped by the user"), "KILLED"),
            (KeyboardInterrupt(), "KILLED"),
            (OSError(), "FAILED"),
        ],
    )
    def test_a_run_ends_as_its_work_did(self, uri: str, raised: BaseException | None, status: str) -> None:
        run_id = open_run(uri, "tests", "ending", PARAMS, {})
        with suppress(type(raised)) if raised else nullcontext(), ending(uri, run_id):
            if raised:
                raise raised
        assert connect(uri).get_run(run_id).info.status == status

    def test_a_restart_continues_the_same_run(self, uri: str) -> None:
        first = open_run(uri, "tests", "restarted", PARAMS, {"kind": "pgm"})
        end_run(uri, first, "FAILED")
        client = connect(uri)
        assert client.get_run(first).info.status == "FAILED"
        again = open_run(
            uri, "tests", "restarted", PARAMS | {"train.steps": 200, "new": 1}, {}, resume_id=first
        )
        run = client.get_run(again)
        assert again == first
        assert run.info.status == "RUNNING"
        assert run.data.params["train.steps"] == "100"
        assert run.data.params["new"] == "1"
        assert run.data.tags["config.changed.train.steps"] == "100 -> 200"
        assert [tag for tag in run.data.tags if tag.startswith("config.changed")] == [
            "config.changed.train.steps"
        ]
        assert run.data.tags["kind"] == "pgm"
        open_run(uri, "tests", "restarted", PARAMS, {}, resume_id=first)
        assert client.get_run(first).data.tags["config.changed.train.steps"] == "100 -> 100"

    def test_many_and_long_params_and_a_parent(self, uri: str, run_id: str) -> None:
        params = {f"key.{index}": "x" * 7000 for index in range(130)}
        child = open_run(uri, "tests", "trial", params, child_of(run_id))
        run = connect(uri).get_run(child)
        assert len(run.data.params) == 130
        assert run.data.tags["mlflow.parentRunId"] == run_id
        assert open_run(uri, "tests", "trial", params, {}, resume_id=child) == child

    def test_a_run_that_is_gone_is_replaced(self, uri: str, caplog: pytest.LogCaptureFixture) -> None:
        assert open_run(uri, "tests", "lost", {}, {}, resume_id="0" * 32) != "0" * 32
        assert any("is gone" in line for line in warnings_of(caplog))

    def test_deleted_experiment(self, uri: str) -> None:
        client = connect(uri)
        client.delete_experiment(client.create_experiment("buried"))
        with pytest.raises(ConfigError, match=r"tracking\.experiment: 'buried' is deleted"):
            open_run(uri, "buried", "a", {}, {})

    def test_unwritable_store(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ConfigError, match=r"tracking\.uri: MLflow at 'sqlite:.*/file'"):
            open_run(f"sqlite:///{tmp_path}/file/mlflow.db", "tests", "a", {}, {})

    @pytest.mark.parametrize(
        ("uri", "says"),
        [
            ("sqlite:///{}/text.db", "text.db is no SQLite file that can be used: file is not a database"),
            (
                "sqlite:///{}/folder",
                "folder is no SQLite file that can be used: unable to open database file",
            ),
            ("sqlite:///{}/other.db", "no such column"),
            ("postgresql://", "No module named 'psycopg.*'; the database's driver must be installed"),
            ("postgresql+foo://a/b", "Can't load plugin"),
        ],
    )
    def test_stores_that_cannot_be_used(self, uri: str, says: str, tmp_path: Path) -> None:
        (tmp_path / "text.db").write_text("no database\n" * 100)
        (tmp_path / "folder").mkdir()
        with closing(sqlite3.connect(tmp_path / "other.db")) as database:
            database.execute("CREATE TABLE runs (x)")
        address = uri.format(tmp_path)
        with pytest.raises(
            ConfigError, match=f"tracking.uri: MLflow at '{re.escape(address)}' failed: .*{says}"
        ):
            check_store(str(tmp_path / "run"), address, "tests")
        assert not (tmp_path / "run").exists()

    def test_jobs_that_begin_together_on_a_new_store(self, tmp_path: Path) -> None:
        uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
        rounds = at_once(opened, [(uri, digest * 64) for digest in "012345"], 2)
        for runs in rounds:  # the same data in both
            assert [(len(run_id), inputs) for run_id, inputs in runs] == [(32, 1)] * 2, runs

    def test_dataset_is_an_input_once(self, uri: str, run_id: str) -> None:
        for _ in range(2):
            log_dataset(uri, run_id, "f" * 64, "/data/pydoc", {"rows": 7, "length": 64})
        (recorded,) = connect(uri).get_run(run_id).inputs.dataset_inputs
        assert (recorded.dataset.name, recorded.dataset.digest) == ("pydoc", "f" * 36)
        assert json.loads(recorded.dataset.source) == {"uri": "/data/pydoc"}
        assert json.loads(recorded.dataset.profile) == {"rows": 7, "length": 64}


class TestModels:
    def test_register_and_find_again(self, uri: str, run_id: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"first")
        first = register_model(uri, run_id, folder, "pgm-tiny", {"step": "10"})
        assert register_model(uri, run_id, folder, "pgm-tiny", {"final": "yes"}) == first
        set_alias(uri, "pgm-tiny", "teacher", first)
        (folder / "model.safetensors").write_bytes(b"second")
        second = register_model(uri, run_id, folder, "pgm-tiny", {})
        assert second != first
        got = download_model(uri, "models:/pgm-tiny@teacher")
        assert (got / "model.safetensors").read_bytes() == b"first"
        got = download_model(uri, f"models:/pgm-tiny/{second}", tmp_path / "copy")
        assert (got / "model.safetensors").read_bytes() == b"second"
        assert got.is_relative_to(tmp_path / "copy")
        version = connect(uri).get_model_version("pgm-tiny", first)
        assert version.run_id == run_id
        assert version.tags == {"step": "10", "final": "yes"}
        for reference, says in {
            "models:/pgm-tyni@teacher": "did you mean 'pgm-tiny'; registered: pgm-tiny",
            "models:/pgm-tiny@teachr": "did you mean 'teacher'; versions: 1, 2; aliases: teacher -> 1",
            "models:/pgm-tiny/9": "has no version 9; versions: 1, 2",
            "models:/pgm-tiny": "expected models:/NAME@ALIAS or models:/NAME/VERSION",
        }.items():
            with pytest.raises(CheckpointError) as error:
                download_model(uri, reference)
            assert says in str(error.value).replace("?", "")

    def test_nothing_to_register(self, uri: str, run_id: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="missing or empty"):
            register_model(uri, run_id, tmp_path / "none", "pgm-none", {})


class TestTracker:
    def test_everything_arrives_in_order(self, uri: str, run_id: str, tmp_path: Path) -> None:
        file = tmp_path / "report.txt"
        file.write_text("report")
        figure = Figure()
        figure.subplots().plot([1, 2])
        started = time.monotonic()
        with Tracker(uri, run_id, tmp_path / "spill.jsonl", system_metrics=True) as tracker:
            began = time.monotonic() - started
            started = time.monotonic()
            for step in range(2500):
                tracker.log_metrics({"train/loss": 1 / (step + 1), "nan": float("nan")}, step)
            called = time.monotonic() - started
            tracker.log_text("once upon", "samples/step_1.txt")
            tracker.log_artifact(file, "reports")
            tracker.log_artifact(tmp_path, "folder")
            tracker.log_figure(figure, "curves/loss.png")
            assert tracker.flush(60)
        assert called < 2, "5,000 points are queued, not sent, by the calling thread"
        assert began < 10
        history = metric_history(uri, run_id, ["train/loss", "absent"])
        assert history["train/loss"] == [(step, 1 / (step + 1)) for step in range(2500)]
        assert history["absent"] == []
        client = connect(uri)
        names = {
            f.path for part in ("samples", "reports", "curves") for f in client.list_artifacts(run_id, part)
        }
        assert names == {"samples/step_1.txt", "reports/report.txt", "curves/loss.png"}
        assert "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics
        assert not (tmp_path / "spill.jsonl").exists()

    def test_steps_redone_after_a_restart(self, uri: str, run_id: str) -> None:
        for loss in (2.0, 1.0):
            with Tracker(uri, run_id) as tracker:
                tracker.log_metrics({"train/loss": loss}, 5)
                tracker.flush()
                time.sleep(0.01)
        assert metric_history(uri, run_id, ["train/loss"]) == {"train/loss": [(5, 1.0)]}

    def test_what_is_refused_is_named_and_does_not_block(
        self, uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Tracker(uri, run_id) as tracker:
            for step in range(3):
                tracker.log_metrics({"good": 1.0, "bad\nkey?": 2.0}, step)
            tracker.log_artifact(tmp_path / "never written")
            tracker.log_metrics({"good": 1.0}, 3)
        assert [step for step, _ in metric_history(uri, run_id, ["good"])["good"]] == [0, 1, 2, 3]
        assert sum("bad" in line for line in warnings_of(caplog)) == 1
        assert sum("never written" in line for line in warnings_of(caplog)) == 1

    @pytest.mark.parametrize("place", ["file", "s3"])
    def test_artifacts_that_cannot_be_stored_hold_nothing_up(
        self,
        uri: str,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        place: str,
    ) -> None:
        """A folder that cannot be made, and a bucket without credentials; MLflow itself answers."""
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        (tmp_path / "file").write_text("in the way")
        location = {"file": f"{tmp_path}/file/artifacts", "s3": "s3://nobodys-bucket/artifacts"}[place]
        run_id = run_with_artifacts_in(location, uri, f"refused {place}")
        spill = tmp_path / "spill.jsonl"
        with Tracker(uri, run_id, spill) as tracker:
            tracker.log_text("once upon", "samples/step_1.txt")
            tracker.log_metrics({"train/loss": 2.0}, 1)
            tracker.log_text("a time", "samples/step_2.txt")
            tracker.log_metrics({"train/loss": 1.0}, 2)
            assert tracker.flush(30)
        assert metric_history(uri, run_id, ["train/loss"])["train/loss"] == [(1, 2.0), (2, 1.0)]
        said = warnings_of(caplog)
        assert sum("MLflow refuses artifact 'samples/step_1.txt'" in line for line in said) == 1
        assert sum("has refused 2 artifacts" in line for line in said) == 1
        assert len(said) == 2
        assert not spill.exists()
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"first")
        with pytest.raises(
            ConfigError, match=r"tracking\.uri: MLflow at"
        ):  # the end of a run expects this one
            register_model(uri, run_id, folder, f"pgm-refused-{place}", {})

    def test_artifacts_wait_for_their_store_and_metrics_do_not(
        self, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spill = tmp_path / "spill.jsonl"
        with object_store("bucket") as store:
            run_id = run_with_artifacts_in("s3://bucket/artifacts", uri, "outage of artifacts")
            store.faults.append(Fault("^PUT .*/step_1.txt", 503, 99))
            tracker = Tracker(uri, run_id, spill)
            tracker.log_text("once upon", "samples/step_1.txt")
            tracker.log_metrics({"train/loss": 2.0}, 1)
            deadline = time.monotonic() + 30
            while not metric_history(uri, run_id, ["train/loss"])["train/loss"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert not tracker.flush(0.2)
            tracker.close(timeout=1)
            assert len(spill.read_text().splitlines()) == 1
            store.faults.clear()
            with Tracker(uri, run_id, spill) as tracker:
                assert tracker.flush(30)
            names = [file.path for file in connect(uri).list_artifacts(run_id, "samples")]
        assert names == ["samples/step_1.txt"]
        assert sum("does not answer; artifacts wait" in line for line in warnings_of(caplog)) == 1

    def test_undelivered_items_are_kept_for_the_next_start(
        self, uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        spill = tmp_path / "spill.jsonl"
        (tmp_path / "file").write_text("in the way")
        tracker = Tracker(f"sqlite:///{tmp_path}/file/mlflow.db", run_id, spill)
        tracker.log_metrics({"train/loss": 3.0}, 1)
        tracker.log_text("once upon", "story.txt")
        before = time.time() * 1000
        assert not tracker.flush(0.2)
        tracker.close(timeout=1)
        tracker.close()
        tracker.log_metrics({"train/loss": 4.0}, 2)
        assert len(spill.read_text().splitlines()) == 2
        said = warnings_of(caplog)
        assert sum("does not answer; metrics wait" in line for line in said) == 1
        assert sum("2 items are kept in" in line for line in said) == 1
        with Tracker(uri, run_id, spill) as tracker:
            tracker.log_metrics({"train/loss": 5.0}, 3)
        assert metric_history(uri, run_id, ["train/loss"])["train/loss"] == [(1, 3.0), (3, 5.0)]
        assert connect(uri).get_metric_history(run_id, "train/loss")[0].timestamp <= before
        assert not spill.exists()

    def test_runs_of_one_name_in_two_places_keep_their_metrics_apart(
        self, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        spills = set()
        for bucket in ("one", "two"):
            tree = {"name": "a", "tracking": {"uri": uri}, "cluster": {"storage": f"s3://{bucket}/runs"}}
            with Run(parse(tree, "test"), run_id="0" * 32).tracker() as tracker:
                spills.add(tracker._spill)
        assert len(spills) == 2
        assert all(spill is not None and spill.is_relative_to(tmp_path) for spill in spills)

    def test_memory_is_bounded(
        self, uri: str, run_id: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.tracking.journal._MEMORY", 1000)
        with Tracker(uri, run_id) as tracker:
            tracker.log_text("x" * 2000, "large.txt")
        assert any(
            "too many items are waiting): artifact 'large.txt'" in line for line in warnings_of(caplog)
        )
        assert any("1 items were not sent" in line for line in warnings_of(caplog))

    def test_damaged_spill(
        self, uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        spill = tmp_path / "spill.jsonl"
        good = {"kind": "point", "key": "a", "value": 1.0, "step": 1, "timestamp": 1}
        spill.write_text(json.dumps(good) + "\n{half a li")
        with Tracker(uri, run_id, spill):
            pass
        assert metric_history(uri, run_id, ["a"]) == {"a": [(1, 1.0)]}
        assert any("is damaged" in line for line in warnings_of(caplog))


def run_with_artifacts_in(location: str, uri: str, experiment: str) -> str:
    """A new run whose artifacts belong into a given place."""
    # MLflow keeps its client of S3, and boto3 its session, with the credentials of that time.
    _cached_get_s3_client.cache_clear()
    boto3.setup_default_session()
    connect(uri).create_experiment(experiment, artifact_location=location)
    return open_run(uri, experiment, "a", {}, {})


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A real MLflow server over an SQLite store in `folder`."""
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a process less
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment
        )
    deadline = time.monotonic() + 180
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                stuck = process.poll() is not None or time.monotonic() > deadline
                assert not stuck, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


@pytest.mark.slow
def test_an_outage_leaves_no_hole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spill = tmp_path / "spill.jsonl"
    with server(tmp_path, port) as uri:
        run_id = open_run(uri, "tests", "outage", PARAMS, {})
        tracker = Tracker(uri, run_id, spill)
        tracker.log_metrics({"train/loss": 0.0}, 0)
        assert tracker.flush(30)
    for step in range(1, 50):
        started = time.monotonic()
        tracker.log_metrics({"train/loss": float(step)}, step)
        assert time.monotonic() - started < 0.1
    tracker.log_text("in the dark", "samples/step_49.txt")
    assert not tracker.flush(1)
    assert len(spill.read_text().splitlines()) >= 49, "a killed worker must not lose what an outage held back"
    assert open_run(uri, "tests", "outage", PARAMS, {}, resume_id=run_id) == run_id
    with server(tmp_path, port):
        assert tracker.flush(60)
        tracker.close()
        history = metric_history(uri, run_id, ["train/loss"])["train/loss"]
        assert history == [(step, float(step)) for step in range(50)]
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.yaml").write_text("name: a")
        version = register_model(uri, run_id, model, "served", {})
        assert (download_model(uri, f"models:/served/{version}") / "config.yaml").read_text() == "name: a"
        end_run(uri, run_id, "FINISHED")
        assert connect(uri).get_run(run_id).info.status == "FINISHED"
    said = warnings_of(caplog)
    assert sum("does not answer; metrics wait" in line for line in said) == 1
    assert sum("answers again; sending 49 metrics" in line for line in said) == 1
    assert not spill.exists()
