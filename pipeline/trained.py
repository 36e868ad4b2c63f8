"""Trained models by name: find them, and read model folders and released weights alike."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline import storage, tracking
from pipeline.config.location import HUB
from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import PairTokenizer, Tokenizer, load_tokenizer, saved_tokenizer
from pipeline.errors import CheckpointError, ConfigError, did_you_mean
from pipeline.models import build, model_folder
from pipeline.models.adapters.folder import read_base
from pipeline.models.adapters.lora import adapt, merged
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import ADAPTER, CONFIG, HUB_CONFIG, WEIGHTS, Background, DataFacts
from pipeline.models.released import conversion
from pipeline.models.vq import ImageTokenizer
from pipeline.storage import hub

log = logging.getLogger(__name__)

REGISTERED = "models:/"
KINDS = "a model folder, an adapter folder, released weights"


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
    tokenizer: Tokenizer | ImageTokenizer | PairTokenizer | None
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
    if local.name in (WEIGHTS, ADAPTER) and (local.parent / CONFIG).is_file():
        return local.parent
    if (local / WEIGHTS).is_file() and (local / HUB_CONFIG).is_file() and not (local / CONFIG).is_file():
        return local / WEIGHTS
    return local


def read(local: Path, overrides: Sequence[str] = (), uri: str | None = None) -> TrainedModel:
    """Read a model folder, an adapter folder or a file of released weights.

    Args:
        local: from `find`.
        overrides: for files, `key=value` words over what the file says; for adapter folders `base=MODEL`.
        uri: of the MLflow store that has registered models, for an adapter of one; None: that of runs with default
            settings.

    Returns:
        The model; an adapter is part of its weights.

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
    if (local / ADAPTER).is_file():
        return _read_adapter(local, overrides, uri)
    if overrides:
        raise ConfigError(
            f"override {overrides[0]!r}: {local}: overrides apply only to released weight files; the config.yaml "
            "of a model folder fixes the architecture"
        )
    denoiser, model, facts = model_folder.read(local)
    return TrainedModel(denoiser, model, facts, saved_tokenizer(local), model_folder.read_background(local))


def _read_adapter(local: Path, overrides: Sequence[str], uri: str | None) -> TrainedModel:
    """Read an adapter folder and the model that it belongs to, and add the adapter to the weights."""
    if unknown := [word for word in overrides if not word.startswith("base=")]:
        raise ConfigError(
            f"override {unknown[0]!r}: {local}: expected base=MODEL for the folder of an adapter"
        )
    (config, facts), base = model_folder.read_config(local), read_base(local)
    if config.lora is None:
        raise CheckpointError(f"{local / CONFIG} is damaged: model.lora: missing")
    for word in overrides:
        base = replace(base, name=word.removeprefix("base="))
    uri = uri or tracking.tracking_uri(RunConfig(name="any"))
    original = read(find(base.name, uri, f"base of the adapter {local}")[0], uri=uri).denoiser.state_dict()
    base.check(original)
    factors = model_folder.read_weights(local, ADAPTER)
    with torch.device("meta"):
        adapted = build(config, facts.vocab_size, facts.length, facts.bos, facts.modalities)
        adapt(adapted, config.lora)
    shapes = {key: value.shape for key, value in adapted.state_dict().items()}
    model_folder.check_shapes(shapes, original | factors, str(local / ADAPTER))
    weights = merged(original, factors, config.lora)
    denoiser = model_folder.assembled(config.merged, facts, weights, str(local))
    background = model_folder.read_background(local)
    return TrainedModel(denoiser, config.merged, facts, saved_tokenizer(local), background)


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
    whole = is_path(name) and storage.folder_complete(name) and storage.exists(storage.join(name, CONFIG))
    if whole and not storage.exists(storage.join(name, ADAPTER)):
        return storage.resolve(name)
    local, name = find(name, uri, key)
    adapts = (local / ADAPTER).is_file()
    folder = is_path(name) and storage.is_local(name) and local.is_dir() and not adapts
    if name.startswith(REGISTERED) or folder:
        return str(local)
    digest = hashlib.sha256(f"{name} {_version(local, name)}".encode()).hexdigest()[:12]
    target = storage.join(root, f"{local.stem}-{digest}")
    if not storage.folder_complete(target):
        model = read(local, uri=uri)
        if model.without_tokenizer:
            target = f"{target}-ids"  # a later job may find the tokenizer
        with storage.publishing_folder(target) as written:
            model.write(written, model.background)
        log.info("%s: a model folder of it was written to %s", name, target)
    return target


def _version(local: Path, name: str) -> str:
    """What changes with the content of a file, as far as its name does not: that of the hub has the commit."""
    if name.startswith(HUB):
        return ""
    if (local / ADAPTER).is_file():
        return storage.sha256(str(local / ADAPTER))
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
