"""What the environment holds for the job alone is in no file, parameter, tag, message or log line."""

import logging
from pathlib import Path

import pytest

from jobs.cli import check_locations
from pipeline import logs, tracking
from pipeline.config.load import dump
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.training import launch
from tests.support.small_manifest import small_manifest
from tests.support.tiny_runs import tiny

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "HF_TOKEN": "planted-hub-token",
    "MLFLOW_TRACKING_PASSWORD": "planted-password",
    "RAY_AUTH_TOKEN": "planted-cluster-token" * 3,
}


def everything(folder: Path) -> bytes:
    """All files below a folder, databases included."""
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_addresses_are_shown_without_users() -> None:
    assert (
        logs.shown("http://me:planted@host:5000/x and s3://bucket/a@b")
        == "http://host:5000/x and s3://bucket/a@b"
    )
    assert logs.shown("postgresql+psycopg2://token@db/mlflow") == "postgresql+psycopg2://db/mlflow"
    for plain in ("sqlite:////a/b@c/mlflow.db", "models:/name@teacher", "mail me@host", "s3://bucket/x"):
        assert logs.shown(plain) == plain


def test_nothing_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's MLflow store, record and config, with all kinds of secrets around."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tiny(tmp_path, "careful")
    run = Run(config, given_manifest=small_manifest())
    Path(run.folder).mkdir(parents=True)
    launch._open_mlflow_run(run, {})
    written = everything(tmp_path)
    assert b"train.steps" in written  # the store is among what was read
    for name, value in SECRETS.items():
        assert value.encode() not in written, name
    assert "planted" not in dump(config)


def test_a_password_in_the_address_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow's own errors quote the whole address; nobody listens at this one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://me:planted-password@127.0.0.1:9"
    with pytest.raises(ConfigError, match=r"tracking.uri: MLflow at 'http://127.0.0.1:9' failed") as caught:
        tracking.open_run(uri, "e", "n", {}, {})
    assert "planted" not in str(caught.value)
    logs.show()
    (handler,) = logging.getLogger("pipeline").handlers
    record = logging.LogRecord("pipeline.x", logging.WARNING, "f", 1, "MLflow at %s is down", (uri,), None)
    assert handler.format(record).endswith("MLflow at http://127.0.0.1:9 is down")


def test_a_config_with_a_password_is_refused(tmp_path: Path) -> None:
    check_locations(tiny(tmp_path, "fine"))
    config = tiny(tmp_path, "told")
    told = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": "https://me:planted@host:5000"})}
    )
    with pytest.raises(
        ConfigError, match=r"tracking.uri: 'https://host:5000' with a user or password"
    ) as caught:
        check_locations(told)
    assert "planted" not in str(caught.value)
