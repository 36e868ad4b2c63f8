"""Trained models by name: find them, and read model folders and released weights alike."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage, tracking
from pipeline.config.location import HUB
from pipeline.config.model import ModelConfig
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, saved_tokenizer
from pipeline.errors import CheckpointError, ConfigError, did_you_mean
from pipeline.models import model_folder
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import CONFIG, HUB_CONFIG, WEIGHTS, Background, DataFacts
from pipeline.models.released import conversion
from pipeline.models.vq import ImageTokenizer
from pipeline.storage import hub

log = logging.getLogger(__name__)

REGISTERED = "models:/"
KINDS = "a model folder, released weights"


@dataclass(frozen=True)
class TrainedModel:
    """A model that was read, and everything that an export passes on.

    Attributes:
        denoiser: in eval mode on the CPU, float32.
        config: of the model.
        facts: what the model knows about its data.
        tokenizer: converts rows to text or images; None where there is none.
        background: where the model comes from.
        without_tokenizer: the weights name a tokenizer that this machine does not have.
    """

    denoiser: Denoiser
    config: ModelConfig
    facts: DataFacts
    tokenizer: Tokenizer | ImageTokenizer | None
    background: Background
    without_tokenizer: bool = False

    def write(self, folder: Path, background: Background) -> None:
        """Write a model folder with the tokenizer's files.

        Args:
            folder: where to write.
            background: where the model comes from.
        """
        model_folder.write(folder, self.config, self.facts, self.denoiser.state_dict(), background)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


def is_path(name: str) -> bool:
    """Return whether the name of a model is a path or URL, and not one of a registry or of the hub.

    Args:
        name: of a model.
    """
    return not name.startswith((REGISTERED, HUB))


def find(name: str, uri: str, key: str = "model", kinds: str = KINDS) -> tuple[Path, str]:
    """Find a model, and copy it to this machine unless it lies here.

    Args:
        name: a folder or file by path or URL, models:/NAME@ALIAS, models:/NAME/VERSION, or hf:OWNER/NAME/PATH.
        uri: of the MLflow store that has registered models.
        key: that names the model, for the message.
        kinds: of folders and files that can be named, for the message.

    Returns:
        The local folder or file, and the name without what may change its meaning: an alias is a version, and a
        branch of the hub is a commit.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the name has another form, or the MLflow store cannot be reached.
    """
    if name.startswith(REGISTERED):
        version = tracking.find_version(uri, name)
        name = f"{REGISTERED}{version.name}/{version.version}"
        return tracking.download_model(uri, name), name
    if name.startswith(HUB):
        copy = hub.fetch(name)
        return copy.path, copy.name
    if not storage.exists(name):
        parent, _, last = storage.resolve(name).rstrip("/").removesuffix("/model").rpartition("/")
        near = did_you_mean(last, storage.listing(parent or "/"))
        raise CheckpointError(
            f"{key}: {name!r}: no such folder or file{near}; expected {kinds}, "
            "models:/NAME@ALIAS or hf:OWNER/NAME/FILE"
        )
    return _whole(storage.fetch(name)), name


def _whole(local: Path) -> Path:
    """Return a model's folder for its weights file, and the weights file of a folder of released weights."""
    if local.name == WEIGHTS and (local.parent / CONFIG).is_file():
        return local.parent
    if (local / WEIGHTS).is_file() and (local / HUB_CONFIG).is_file() and not (local / CONFIG).is_file():
        return local / WEIGHTS
    return local


def read(local: Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """Read a model folder or a file of released weights.

    Args:
        local: from `find`.
        overrides: for files, `key=value` words over what the file says.

    Raises:
        CheckpointError: a file is missing or damaged, or not one of a model.
        CapabilityError: the weights are those of a model that this project does not have.
        ConfigError: a wrong override, or an override of a folder.
    """
    if local.is_file():
        denoiser, config, facts = conversion.load(local, overrides)
        chosen = any(word.startswith("tokenizer=") for word in overrides)
        tokenizer = _tokenizer(config.tokenizer, facts.vocab_size, chosen)
        missing = config.tokenizer is not None and tokenizer is None
        return TrainedModel(denoiser, config.model, facts, tokenizer, Background(), missing)
    if overrides:
        raise ConfigError(
            f"override {overrides[0]!r}: {local}: overrides apply only to released weight files; the config.yaml "
            "of a model folder fixes the architecture"
        )
    denoiser, model, facts = model_folder.read(local)
    return TrainedModel(denoiser, model, facts, saved_tokenizer(local), model_folder.read_background(local))


def placed(name: str, uri: str, root: str, key: str) -> str:
    """Find a model as a model folder that all nodes can read, and make that folder where there is none.

    Args:
        name: as for `find`.
        uri: of the MLflow store.
        root: folder that all nodes see; what is no model folder there is converted or copied into it, once.
        key: that names the model, for the message.

    Returns:
        Path or URL of the folder.

    Raises:
        CheckpointError, CapabilityError, ConfigError: as `find` and `read`.
    """
    if is_path(name) and storage.folder_complete(name) and storage.exists(storage.join(name, CONFIG)):
        return storage.resolve(name)
    local, name = find(name, uri, key)
    if name.startswith(REGISTERED) or (is_path(name) and storage.is_local(name) and local.is_dir()):
        return str(local)
    digest = hashlib.sha256(f"{name} {_version(local, name)}".encode()).hexdigest()[:12]
    target = storage.join(root, f"{local.stem}-{digest}")
    if not storage.folder_complete(target):
        model = read(local)
        if model.without_tokenizer:
            target = f"{target}-ids"  # a later job may find the tokenizer
        with storage.publishing_folder(target) as folder:
            model.write(folder, model.background)
        log.info("%s: a model folder of it was written to %s", name, target)
    return target


def _version(local: Path, name: str) -> str:
    """What changes with the content of a file, as far as its name does not: that of the hub has the commit."""
    if name.startswith(HUB):
        return ""
    stat = local.stat()
    # The copy of a remote file has the time of its download.
    return f"{stat.st_size} {stat.st_mtime_ns if storage.is_local(name) else ''}"


def _tokenizer(name: str | None, vocabulary: int, chosen: bool) -> Tokenizer | None:
    """The tokenizer of released weights; one that the user did not choose may be missing on this machine."""
    if name is None:
        return None
    try:
        tokenizer = load_tokenizer(name)
    except ConfigError as error:
        if chosen:
            raise
        log.warning("loading the model without a tokenizer, because %s", error)
        return None
    if tokenizer.vocab_size != vocabulary:
        raise ConfigError(
            f"tokenizer: {name!r} has {tokenizer.vocab_size} ids; expected the model's {vocabulary}"
        )
    return tokenizer
