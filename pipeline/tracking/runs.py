"""The driver's side of MLflow: which store, the run, its data.

mlflow takes seconds to import, so every function imports it when called: workers that log nothing never do.
"""

import io
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, PipelineError, StoppedError, did_you_mean, first_line
from pipeline.logs import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_RECORD = "run.json"  # in the folder of whatever has an MLflow run
_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_PARAM_LENGTH = 6000  # MLflow's limits on one value, and on one request
_TAG_LENGTH = 5000
_DIGEST_LENGTH = 36
_PER_REQUEST = 100
_LOCKED_S = 60.0  # for which another process may lock the SQLite file


def tracking_uri(config: RunConfig) -> str:
    """Resolve the address of a run's MLflow store.

    It is `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite in `cluster.storage`. Relative SQLite paths become
    absolute, since workers run in other folders than the driver.

    Args:
        config: the run's config.

    Returns:
        The address.

    Raises:
        ConfigError: the storage is remote and no store is named, or MLflow has no store of that kind.
    """
    key, uri = "tracking.uri", config.tracking.uri
    if not uri:
        key, uri = "MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        folder = config.cluster.storage.removeprefix("file://")
        if "://" in folder:
            raise ConfigError(
                f"tracking.uri: missing, and SQLite cannot be in the remote cluster.storage {folder!r}; "
                "expected the address of an MLflow server, or MLFLOW_TRACKING_URI in the environment"
            )
        return _sqlite(Path(os.path.expanduser(folder)).resolve() / "mlflow.db")
    scheme = uri.split(":")[0].split("+")[0]
    if scheme not in _SCHEMES or not _is_address(scheme, uri):
        raise ConfigError(
            f"{key}: {uri!r} is not an MLflow store; expected sqlite:///FILE or an address that starts with "
            f"one of {', '.join(_SCHEMES[1:])}{did_you_mean(scheme, _SCHEMES)}"
        )
    if uri.startswith(_SQLITE):
        _, mark, query = uri.partition("?")
        return _sqlite(Path(os.path.expanduser(_sqlite_file(uri))).resolve()) + mark + query
    return uri


def _is_address(scheme: str, uri: str) -> bool:
    """Return whether an address of a known kind of store is complete."""
    if scheme == "sqlite":
        # Without a file the store is in memory, and lost with the process.
        return uri.startswith(_SQLITE) and uri != _SQLITE
    try:
        host = urlsplit(uri).hostname
    except ValueError:
        return False
    return bool(host) if scheme in ("http", "https") else ":" in uri or scheme == "databricks"


def check_store(folder: str, uri: str, experiment: str) -> None:
    """Refuse a store that a new run needs and that cannot be used, before any time is spent.

    Args:
        folder: of a job; one that has a run continues it, whether the store answers or not.
        uri: from `tracking_uri`.
        experiment: name of the experiment; created if missing.

    Raises:
        ConfigError: the store cannot be reached or written, or the experiment is deleted.
        DataError: the folder's record of its run is damaged.
    """
    if recorded_run(folder) is None:
        with answering(uri) as client:
            _experiment_id(client, uri, experiment)


def _sqlite(file: Path) -> str:
    """Return the address of an SQLite file."""
    return f"{_SQLITE}{_encoded(file)}"


def _encoded(path: Path) -> str:
    """Return a path with codes in place of the characters that mean something else in addresses."""
    return str(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def _sqlite_file(uri: str) -> Path:
    """Return the file of the address of an SQLite store."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))


def open_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    resume_id: str | None = None,
) -> str:
    """Start a run, or continue the one that an earlier start of the same job opened.

    A continued run keeps its first parameters; one that differs now is recorded as the tag `config.changed.KEY`. If
    the store cannot be reached, a run is continued all the same and its metrics wait in the `Tracker`. A new run
    needs the store.

    Args:
        uri: from `tracking_uri`.
        experiment: name of the experiment; created if missing.
        name: name of the run.
        params: the resolved config, flattened.
        tags: further facts about the run.
        resume_id: the run to continue; one that the store no longer has is replaced by a new run.

    Returns:
        The run's id.

    Raises:
        ConfigError: the store cannot be reached or written, or the experiment is deleted.
    """
    wanted = {key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
    try:
        with answering(uri) as client:
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
        log.warning("continuing MLflow run %s while its store cannot be reached: %s", resume_id, error)
        return resume_id


def recorded_run(folder: str) -> tuple[str, str] | None:
    """Read which MLflow run a folder has.

    Args:
        folder: of a job.

    Returns:
        The run's id and its store's address without user and password, or None if no run is recorded.

    Raises:
        DataError: the record is damaged.
    """
    path = storage.join(folder, _RECORD)
    return storage.read_json(path, parse=lambda record: (record["run_id"], record["tracking_uri"]))


def open_recorded_run(
    folder: str, uri: str, experiment: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]
) -> str:
    """Open the run that a folder has, or a new one, and record it in the folder.

    Args:
        folder: of a job.
        uri: from `tracking_uri`.
        experiment: name of the experiment; created if missing.
        name: name of the run.
        params: the resolved config, flattened.
        tags: further facts about the run.

    Returns:
        The run's id.

    Raises:
        ConfigError: a new run is needed and the store cannot be reached, or the experiment is deleted.
    """
    old = recorded_run(folder)
    tags = {"folder": folder, **tags}
    run_id = open_run(uri, experiment, name, params=params, tags=tags, resume_id=old and old[0])
    record = json.dumps({"run_id": run_id, "tracking_uri": shown(uri)})
    storage.publish_text(storage.join(folder, _RECORD), record)
    return run_id


def child_of(parent_id: str) -> dict[str, str]:
    """Return the tags of a run that MLflow shows under another, as a trial under its sweep."""
    return {"mlflow.parentRunId": parent_id}


@contextmanager
def ending(uri: str, run_id: str) -> Iterator[None]:
    """Mark a run as ended after the block: FINISHED, KILLED if the user stopped it, or else FAILED.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
    """
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
    """Mark a run as ended. An MLflow outage is only a warning, since training itself has ended.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        status: how it ended.
    """
    try:
        # MLflow would print the run's address with user and password.
        with answering(uri) as client, redirect_stdout(io.StringIO()):
            client.set_terminated(run_id, status=status)
    except ConfigError as error:
        log.warning("MLflow run %s ended as %s, which could not be recorded: %s", run_id, status, error)


def log_dataset(uri: str, run_id: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
    """Record the data that a run reads as its MLflow dataset input, once, whatever restarts happen.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        digest: hash of the manifest, so that equal data is one dataset in MLflow (cut to 36 characters).
        source: folder or address of the shards; its last part is the name of the data.
        profile: further facts, such as rows, length and tokenizer.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=Path(source).name,
        digest=digest[:_DIGEST_LENGTH],
        source_type=source.split("://")[0] if "://" in source else "local",
        source=json.dumps({"uri": source}),
        profile=json.dumps(dict(profile), default=str),
    )
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    # Another run may add the same dataset at this moment; a second attempt finds it.
    for last in (False, True):
        try:
            with answering(uri) as client:
                client.log_inputs(run_id, datasets=inputs)
            break
        except ConfigError as error:
            if last:
                what = f"dataset {dataset.name} of MLflow run {run_id}"
                log.warning("could not record %s; the next start does: %s", what, error)


def metric_history(uri: str, run_id: str, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Read metrics of a run.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        keys: names of the metrics.

    Returns:
        (step, value) points of each metric by step; of a step that a restart repeated, the last one logged.

    Raises:
        ConfigError: the store cannot be reached.
    """
    history = {}
    with answering(uri) as client:
        for key in keys:
            points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
            history[key] = sorted({point.step: point.value for point in points}.items())
    return history


def connect(uri: str) -> "MlflowClient":
    """Open a client of a store, and keep the store's migrations out of the log.

    Args:
        uri: from `tracking_uri`; a missing SQLite file is created.

    Returns:
        The client.

    Raises:
        OSError: the SQLite file cannot be opened or written, or is no database.
    """
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith(_SQLITE):
        # Checked here, because MLflow retries a file that it cannot open for most of an hour.
        file = _sqlite_file(uri)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} is not writable")
        # Two clients cannot make the tables together.
        with storage.node_lock(file.with_name(f"{file.name}.lock")):
            try:
                with closing(sqlite3.connect(file, timeout=_LOCKED_S)) as database:
                    database.execute("PRAGMA schema_version")
            except sqlite3.Error as error:
                raise OSError(f"{file} is no SQLite file that can be used: {error}") from None
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def answering(uri: str) -> Iterator["MlflowClient"]:
    """Give a client of a store, and turn the errors of MLflow inside the block into a ConfigError that names it.

    Raises:
        ConfigError: MLflow or its store of artifacts refused a call, or did not answer.
    """
    try:
        yield connect(uri)
    except Exception as error:
        if not of_library(error):
            raise
        advice = "; the database's driver must be installed" if isinstance(error, ImportError) else ""
        message = f"tracking.uri: MLflow at {uri!r} failed: {first_line(error)}{advice}"
        raise ConfigError(shown(message)) from error


def of_library(error: Exception) -> bool:
    """Return whether MLflow, or a library that it uses to store files, raised an error; others are defects."""
    ours = isinstance(error, PipelineError)
    return not ours and (isinstance(error, OSError | ImportError) or type(error).__module__ != "builtins")


def ensure(create: Callable[[], object]) -> None:
    """Create something in the store, unless it exists already.

    Args:
        create: the call that creates it.
    """
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """Find an experiment, or create it."""
    if client.get_experiment_by_name(name) is None:
        # MLflow would put the files of an SQLite store into the current folder; they belong beside the store.
        folder = _sqlite_file(uri).parent / "mlartifacts"
        place = _encoded(folder) if uri.startswith(_SQLITE) else None
        ensure(lambda: client.create_experiment(name, artifact_location=place))
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment: {name!r} is deleted in {uri}; expected another name, or its restoration "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def _find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """Find the run to continue; None, with a warning, if the store has lost it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "active":
            return run
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    log.warning("MLflow run %s is gone from its store; a new run replaces it", run_id)
    return None


def _describe(client: "MlflowClient", run: "Run", params: dict[str, str], tags: dict[str, str]) -> None:
    """Log parameters that the run lacks; those that differ from the logged ones, and the tags, as tags."""
    from mlflow.entities import Param, RunTag

    logged = run.data.params
    missing = [Param(key, value) for key, value in params.items() if key not in logged]
    changed = {
        f"config.changed.{key}": f"{logged[key]} -> {value}"[:_TAG_LENGTH]
        for key, value in params.items()
        if key in logged and (logged[key] != value or f"config.changed.{key}" in run.data.tags)
    }
    all_tags = [RunTag(key, value) for key, value in (tags | changed).items()]
    for start in range(0, max(len(missing), len(all_tags)), _PER_REQUEST):
        part = slice(start, start + _PER_REQUEST)
        client.log_batch(run.info.run_id, params=missing[part], tags=all_tags[part])
