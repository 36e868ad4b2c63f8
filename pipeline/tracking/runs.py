"""The driver's side of MLflow: which store, the run, its data.

mlflow takes seconds to import, so every function imports it when called: workers that log nothing never do.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, StoppedError, did_you_mean
from pipeline.logs import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_RECORD = "run.json"  # in the folder of whatever has an MLflow run
_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_PARAM_LENGTH = 6000  # MLflow's limits on one value, and on one request
_TAG_LENGTH = 5000
_DIGEST_LENGTH = 36
_PER_REQUEST = 100


def tracking_uri(config: RunConfig) -> str:
    """The MLflow store of a run: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite in `cluster.storage`.

    Relative SQLite paths become absolute, since workers run in other folders than the driver.

    Raises:
        ConfigError: the storage is remote and no store is named, or the store is of no kind that MLflow has.
    """
    key = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or not uri:
        storage = config.cluster.storage.removeprefix("file://")
        if "://" in storage:
            raise ConfigError(
                f"tracking.uri: missing, and SQLite cannot live in the remote cluster.storage {storage!r}; "
                "expected the address of an MLflow server, or MLFLOW_TRACKING_URI in the environment"
            )
        return f"{_SQLITE}{Path(storage).expanduser().resolve() / 'mlflow.db'}"
    scheme = uri.split(":")[0].split("+")[0]
    if scheme not in _SCHEMES or (":" not in uri and scheme != "databricks"):
        raise ConfigError(
            f"{key}: {uri!r} is no MLflow store; expected sqlite:///FILE or an address that starts with "
            f"one of {', '.join(_SCHEMES[1:])}{did_you_mean(scheme, _SCHEMES)}"
        )
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).expanduser().resolve()}"
    return uri


def open_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    resume_id: str | None = None,
) -> str:
    """Start a run, or continue the one that an earlier start of the same job opened.

    A continued run keeps the parameters it was begun with; one that differs now is recorded as the tag
    `config.changed.KEY`. With the store out of reach a run is continued all the same, and its metrics wait
    in the `Tracker`; a new run needs the store.

    Args:
        uri: from `tracking_uri`.
        experiment: its name; created if missing.
        name: the run's name.
        params: the resolved config, flattened.
        tags: further facts about the run.
        resume_id: the run to continue; one that the store no longer has is replaced by a new run.

    Returns:
        the run's id.

    Raises:
        ConfigError: the store cannot be reached or written, or the experiment is deleted.
    """
    wanted = {key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
    try:
        with answering(uri):
            client = connect(uri)
            run = _find_run(client, resume_id) if resume_id else None
            if run is None:
                run = client.create_run(_experiment_id(client, uri, experiment), run_name=name)
            else:
                client.update_run(run.info.run_id, status="RUNNING")
            _describe(client, run, wanted, dict(tags))
            return run.info.run_id
    except ConfigError as error:
        if resume_id is None:
            raise
        _log.warning("MLflow run %s goes on without its store for now: %s", resume_id, error)
        return resume_id


def recorded_run(folder: str) -> tuple[str, str] | None:
    """Id and store of the MLflow run that a folder has; the store's address is without user and password."""
    record = storage.join(folder, _RECORD)
    if not storage.exists(record):
        return None
    told = json.loads(storage.read_text(record))
    return told["run_id"], told["tracking_uri"]


def open_recorded_run(
    folder: str,
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> str:
    """`open_run` for what lives in a folder: continues the run that the folder has, and records which one it is."""
    old = recorded_run(folder)
    run_id = open_run(uri, experiment, name, params, {"folder": folder, **tags}, old and old[0])
    told = {"run_id": run_id, "tracking_uri": shown(uri)}
    storage.publish_text(storage.join(folder, _RECORD), json.dumps(told))
    return run_id


def child_of(parent_id: str) -> dict[str, str]:
    """Tags of a run that is shown under another: a trial under its sweep."""
    return {"mlflow.parentRunId": parent_id}


@contextmanager
def ending(uri: str, run_id: str) -> Iterator[None]:
    """Mark a run as over behind the block: FINISHED, KILLED if the user stopped it, or else FAILED."""
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, StoppedError):
        status = "KILLED"
        raise
    finally:
        end_run(uri, run_id, status)


def end_run(uri: str, run_id: str, status: Status) -> None:
    """Mark a run as over. An MLflow outage is only a warning: the training itself has ended as it has."""
    try:
        # MLflow would print the run's address as it was given, user and password included.
        with answering(uri), redirect_stdout(io.StringIO()):
            connect(uri).set_terminated(run_id, status=status)
    except ConfigError as error:
        _log.warning("MLflow run %s ended as %s, which could not be recorded: %s", run_id, status, error)


def log_dataset(
    uri: str, run_id: str, name: str, digest: str, source: str, profile: Mapping[str, object]
) -> None:
    """Record the data that a run reads as its MLflow dataset input, once, whatever restarts happen.

    Args:
        name: the data's name.
        digest: hash of the manifest, so that equal data is one dataset in MLflow (cut to 36 characters).
        source: where the shards are, a folder or an address.
        profile: further facts, such as rows, length and tokenizer.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name,
        digest=digest[:_DIGEST_LENGTH],
        source_type=source.split("://")[0] if "://" in source else "local",
        source=json.dumps({"uri": source}),
        profile=json.dumps(dict(profile), default=str),
    )
    try:
        with answering(uri):
            context = [InputTag("mlflow.data.context", "training")]
            connect(uri).log_inputs(run_id, datasets=[DatasetInput(dataset, context)])
    except ConfigError as error:
        _log.warning(
            "MLflow run %s lacks its dataset %s (the next start records it): %s", run_id, name, error
        )


def metric_history(uri: str, run_id: str, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Points of each metric by step; of a step that a restart redid, the last one logged."""
    history = {}
    with answering(uri):
        client = connect(uri)
        for key in keys:
            points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
            history[key] = sorted({point.step: point.value for point in points}.items())
    return history


def connect(uri: str) -> "MlflowClient":
    """A client of the store (SQLite is created if missing) that keeps its migrations out of the log."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith(_SQLITE):
        # Checked here, because MLflow retries a file that it cannot open for most of an hour.
        file = Path(uri.removeprefix(_SQLITE))
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} is not writable")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a ConfigError that names the store."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise ConfigError(shown(f"tracking.uri: MLflow at {uri!r} refuses: {first_line(error)}")) from error


def first_line(error: BaseException) -> str:
    """What an error says, for one line of a log."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def ensure(create: Any, name: str, **location: str) -> None:
    """Create something named, unless it (or a process beside this one) already has."""
    from mlflow.exceptions import MlflowException

    try:
        create(name, **location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    if client.get_experiment_by_name(name) is None:
        # MLflow would put the files of an SQLite store under the current folder; they belong beside it.
        beside = Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"
        ensure(
            client.create_experiment, name, **({"artifact_location": str(beside)} if _SQLITE in uri else {})
        )
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment: {name!r} is deleted in {uri}; expected another name, or its restoration "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def _find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run to continue, or None (with a warning) if the store has lost it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is not None and run.info.lifecycle_stage == "active":
        return run
    _log.warning("MLflow run %s is gone from its store; a new run goes on in its place", run_id)
    return None


def _describe(client: "MlflowClient", run: "Run", params: dict[str, str], tags: dict[str, str]) -> None:
    """Log parameters that the run lacks; those that differ from the logged ones, and the tags, as tags."""
    from mlflow.entities import Param, RunTag

    logged = run.data.params
    fresh = [Param(key, value) for key, value in params.items() if key not in logged]
    changed = {
        f"config.changed.{key}": f"{logged[key]} -> {value}"[:_TAG_LENGTH]
        for key, value in params.items()
        if key in logged and (logged[key] != value or f"config.changed.{key}" in run.data.tags)
    }
    marks = [RunTag(key, value) for key, value in (tags | changed).items()]
    for start in range(0, max(len(fresh), len(marks)), _PER_REQUEST):
        part = slice(start, start + _PER_REQUEST)
        client.log_batch(run.info.run_id, params=fresh[part], tags=marks[part])
