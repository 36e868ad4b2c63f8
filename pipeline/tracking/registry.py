"""Registered models: a consolidated model folder as a version that other jobs find by name and alias."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError, did_you_mean, first_line
from pipeline.tracking.runs import answering, ensure, of_library

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def register_model(uri: str, run_id: str, folder: Path, name: str, tags: Mapping[str, str]) -> str:
    """Log a consolidated model folder to a run and register it; the same weights again give the same version.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        folder: the model.
        name: of the registered model; created if missing.
        tags: of the version.

    Returns:
        The version, as in `models:/NAME/VERSION`.

    Raises:
        CheckpointError: the folder has no files.
        ConfigError: the store cannot be reached, or the files cannot be stored.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise CheckpointError(
            f"model folder {str(folder)!r} is missing or empty; expected a consolidated model"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    # Named by content: another model of the same run never overwrites the files of a registered version.
    artifact_folder = f"model-{digest.hexdigest()[:8]}"
    with answering(uri) as client:
        ensure(lambda: client.create_registered_model(name))
        source = f"{client.get_run(run_id).info.artifact_uri}/{artifact_folder}"
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((version for version in versions if version.source == source), None)
        if version is None:
            client.log_artifacts(run_id, str(folder), artifact_folder)
            version = client.create_model_version(name, source, run_id=run_id, tags=dict(tags))
        else:
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
    return str(version.version)


def set_alias(uri: str, name: str, alias: str, version: str) -> None:
    """Make `models:/NAME@ALIAS` stand for a version.

    Args:
        uri: from `tracking_uri`.
        name: of the registered model.
        alias: any name; an existing alias is moved.
        version: from `register_model`.

    Raises:
        ConfigError: the store cannot be reached, or has no such model.
    """
    with answering(uri) as client:
        client.set_registered_model_alias(name, alias, version)


def find_version(uri: str, reference: str) -> "ModelVersion":
    """Find the version that a reference stands for now.

    Args:
        uri: from `tracking_uri`.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Returns:
        MLflow's record of the version.

    Raises:
        CheckpointError: no such model, alias or version; names the existing ones.
        ConfigError: the store cannot be reached.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))", reference)
    if parts is None:
        raise CheckpointError(f"model {reference!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    with answering(uri) as client:
        versions = {str(found.version): found for found in client.search_model_versions(f"name = '{name}'")}
        if not versions:
            known = [model.name for model in client.search_registered_models()]
            raise CheckpointError(
                f"model {reference!r}: {uri} has no versions of a model {name!r}"
                f"{did_you_mean(name, known)}; registered: {', '.join(known) or 'none'}"
            )
        aliases = {key: str(value) for key, value in client.get_registered_model(name).aliases.items()}
    version = versions.get(aliases.get(alias, "") if alias else number)
    if version is None:
        missing = f"alias {alias!r}{did_you_mean(alias, aliases)}" if alias else f"version {number}"
        raise CheckpointError(
            f"model {reference!r}: {name!r} has no {missing}; "
            f"versions: {', '.join(sorted(versions, key=int))}; "
            f"aliases: {', '.join(f'{key} -> {value}' for key, value in aliases.items()) or 'none'}"
        )
    return version


def download_model(uri: str, reference: str, destination: Path | None = None) -> Path:
    """Make a registered model available as a local folder.

    Args:
        uri: from `tracking_uri`.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        destination: folder to copy into; None: where the files are if that is local, else a temporary folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: no such model, alias or version, or its files cannot be read.
        ConfigError: the store cannot be reached.
    """
    from mlflow.artifacts import download_artifacts

    version = find_version(uri, reference)
    target = str(destination) if destination else None
    try:
        return Path(download_artifacts(artifact_uri=version.source, dst_path=target, tracking_uri=uri))
    except Exception as error:
        if not of_library(error):
            raise
        raise CheckpointError(
            f"model {reference!r}: version {version.version} is registered, but its files cannot be read "
            f"({version.source}): {first_line(error)}"
        ) from error
