"""Models in repositories of the Hugging Face hub: downloads through its cache, and uploads.

Token, address and cache are those of huggingface_hub: `hf auth login` or HF_TOKEN, HF_ENDPOINT, HF_HOME.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from pipeline.config.location import HubName
from pipeline.errors import CheckpointError, ConfigError, did_you_mean, kind_and_line
from pipeline.storage.retries import of_network, status

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, HUB_CONFIG = "model.safetensors", "config.yaml", "config.json"  # of a model folder
_NAMED = 8  # files in a message


@dataclass(frozen=True)
class HubCopy:
    """A model in this machine's cache of the hub.

    Attributes:
        path: the model's folder or file.
        name: of the model, with the commit as its revision.
    """

    path: Path
    name: str


def fetch(name: str) -> HubCopy:
    """Download a model unless the cache has it, and use the cache where the hub cannot be reached.

    A folder is a model if it has a `model.safetensors`. Beside a `config.yaml` it is a model folder of this project,
    whose other files are downloaded too; without one it is a file of released weights.

    Args:
        name: `hf:OWNER/NAME/PATH` or `hf:OWNER/NAME@REVISION/PATH`; without PATH the repository is the folder.

    Raises:
        ConfigError: the name has another form.
        CheckpointError: no such repository, revision or file, or the hub cannot be reached and the cache does not
            have the model; says what to download and where to put it.
    """
    try:
        place = HubName.parse(name)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    try:
        files = _online(place)
    except _Unreachable as error:
        files = _cached(place)
        if not files:
            raise CheckpointError(f"{name}: {error}, and the cache {_advice(place)}") from None
        log.warning("%s: %s; the copy in the cache is used", name, error)
    return _copy(place, files)


class _Unreachable(Exception):
    """The hub cannot be reached; the message says why."""


@contextmanager
def _asking(place: HubName) -> Iterator[None]:
    """Describe errors of the hub in terms of the name."""
    name = place.at(place.revision, place.path)
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise _Unreachable("HF_HUB_OFFLINE forbids downloads") from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: access must be requested at {constants.ENDPOINT}/{place.repository}, then given by "
            "`hf auth login` or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no model repository {place.repository!r} at {constants.ENDPOINT}, or a private one, which "
            "`hf auth login` or HF_TOKEN gives access to"
        ) from None
    except errors.RevisionNotFoundError:
        branches = _revisions(place)
        raise CheckpointError(
            f"{name}: {place.repository!r} has no revision {place.revision!r}"
            f"{did_you_mean(place.revision, branches)}; has {_listed(branches)}"
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{name}: {kind_and_line(error)}") from None
    except Exception as error:
        if isinstance(error, CheckpointError) or not (of_network(error) or isinstance(error, OSError)):
            raise
        if status(error) in (401, 403):
            raise CheckpointError(f"{name}: the hub refuses access: {kind_and_line(error)}") from None
        raise _Unreachable(f"{constants.ENDPOINT} cannot be reached ({kind_and_line(error)})") from error


def _online(place: HubName) -> list[Path]:
    """Download what the name stands for; the last file is the weights."""
    with _asking(place):
        api = huggingface_hub.HfApi()
        info = api.model_info(place.repository, revision=place.revision)
        files = [sibling.rfilename for sibling in info.siblings or []]
        wanted = _wanted(place, files)
        # The first file is asked for by the name of the revision, so that the cache knows the name too.
        revisions = [place.revision, *[info.sha] * (len(wanted) - 1)]
        return [
            Path(api.hf_hub_download(place.repository, file, revision=revision))
            for file, revision in zip(wanted, revisions, strict=True)
        ]


def _wanted(place: HubName, files: list[str]) -> list[str]:
    """List the files that belong to the model, its weights last: a cache that has them is complete."""
    path = place.path
    weights = path if path in files else f"{path}/{WEIGHTS}".lstrip("/")
    if weights not in files:
        raise CheckpointError(f"{place.at(place.revision, path)}: {_missing(place, files)}")
    folder = PurePosixPath(weights).parent
    beside = [file for file in files if PurePosixPath(file).parent == folder and file != weights]
    if PurePosixPath(weights).name != WEIGHTS or str(folder / CONFIG) not in beside:
        config = str(folder / HUB_CONFIG)  # hyper-parameters of released weights
        beside = [config] if weights.endswith(".safetensors") and config in beside else []
    return [*beside, weights]


def _missing(place: HubName, files: list[str]) -> str:
    """Describe that a repository lacks what a name asks for."""
    path, inside = place.path, [file for file in files if file.startswith(f"{place.path}/".lstrip("/"))]
    weights = [file for file in inside or files if not file.endswith((".md", ".json", ".gitattributes"))]
    if inside:  # a folder
        where = f"folder {path!r}" if path else "the repository"
        return f"{where} has no {WEIGHTS}; expected a model folder, or one of its files: {_listed(weights)}"
    near = did_you_mean(path, files) or did_you_mean(path.rpartition("/")[2], files)
    return f"{place.repository!r} has no file {path!r}{near}; has {_listed(weights)}"


def _revisions(place: HubName) -> list[str]:
    """List branches and tags of a repository, for a message."""
    try:
        refs = huggingface_hub.HfApi().list_repo_refs(place.repository)
    except OSError:
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "") if names else "none"


def _cached(place: HubName) -> list[Path]:
    """Find the model in the cache; empty if it is not there."""

    def find(file: str) -> Path | None:
        cache = constants.HF_HUB_CACHE
        found = huggingface_hub.try_to_load_from_cache(place.repository, file, cache, place.revision)
        return Path(found) if isinstance(found, str) else None

    folder = f"{place.path}/{WEIGHTS}".lstrip("/")
    weights = (find(place.path) if place.path else None) or find(folder)
    return [weights] if weights is not None and weights.is_file() else []


def _copy(place: HubName, files: list[Path]) -> HubCopy:
    """Name the local copy of a model by its commit."""
    weights = files[-1]
    inner = place.path if place.path.endswith(weights.name) else f"{place.path}/{WEIGHTS}".lstrip("/")
    commit = weights.parents[inner.count("/")].name  # snapshots/COMMIT/PATH
    is_folder = weights.name == WEIGHTS and (weights.parent / CONFIG).is_file()
    path = inner.removesuffix(WEIGHTS).rstrip("/") if is_folder else inner
    return HubCopy(weights.parent if is_folder else weights, place.at(commit, path))


def _advice(place: HubName) -> str:
    """Say what to download, and where to put it."""
    revision = f" --revision {place.revision}" if place.revision else ""
    what = (
        place.path
        if "." in place.path.rpartition("/")[2]
        else f"--include '{place.path}/*'".replace("'/", "'")
    )
    what = what if place.path else ""
    return (
        f"{constants.HF_HUB_CACHE} does not have it. On a machine with access, run `hf download "
        f"{place.repository} {what}{revision} --local-dir FOLDER`".replace("  ", " ")
        + f", copy FOLDER here, and name the model by its path, {'/'.join(['FOLDER', *filter(None, [place.path])])}; "
        "or copy the cache, and set HF_HOME to the folder above its `hub`"
    )


def check_upload(repository: str) -> None:
    """Check that a model can be uploaded to a repository, before time is spent on it.

    Args:
        repository: OWNER/NAME.

    Raises:
        ConfigError: another form of name, no token, a token that the hub refuses, or one of another owner.
    """
    try:
        named = HubName.parse(repository)
    except ValueError:
        named = None
    if named is None or named.at(None, "") != f"hf:{repository}":
        raise ConfigError(f"push: {repository!r}; expected OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"push: {repository!r} needs a token that may write; run `hf auth login`, or set HF_TOKEN"
        )
    with _uploading(repository):
        account = huggingface_hub.HfApi().whoami()
    owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    owner = repository.partition("/")[0]
    if owner not in owners:
        raise ConfigError(
            f"push: {repository!r}: the token belongs to {account['name']!r}; expected an owner of "
            f"{', '.join(owners)}{did_you_mean(owner, owners)}"
        )


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload the files of a folder to a repository, which is made if it does not exist.

    Args:
        folder: local.
        repository: OWNER/NAME.
        private: whether a new repository is private; that of an existing one does not change.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: the hub cannot be reached, or refuses the upload.
    """
    api = huggingface_hub.HfApi()
    with _uploading(repository):
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a model")
    return str(made)


@contextmanager
def _uploading(repository: str) -> Iterator[None]:
    """Describe errors of an upload."""
    try:
        yield
    except Exception as error:
        if not (of_network(error) or isinstance(error, OSError)):
            raise
        code, refused = status(error), "the hub refuses the token; expected one that may write (HF_TOKEN)"
        why: Any = refused if code in (401, 403) else f"{constants.ENDPOINT}: {kind_and_line(error)}"
        raise ConfigError(f"push: {repository!r}: {why}") from error
