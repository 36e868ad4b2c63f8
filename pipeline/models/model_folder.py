"""Read and write model folders, which are enough to sample, evaluate, fine-tune or distil from.

model.safetensors   EMA weights, float32; an adapter folder has adapter.safetensors in its place
config.yaml         the model section and the facts of the data (V, L, BOS); figures and the run's config where known
config.json         the first two again, where the Hugging Face hub looks for them
tokenizer files     written by the tokenizer itself

The config.yaml of an adapter folder names the adapted model in its section `base`, and there is no config.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import storage
from pipeline.config.data import TemplateName
from pipeline.config.load import check, parse_section
from pipeline.config.model import ModelConfig
from pipeline.config.schema import ImportConfig
from pipeline.config.section import NonNegativeInt, Section
from pipeline.errors import CheckpointError, did_you_mean
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Modalities
from pipeline.storage.hub import CONFIG, HUB_CONFIG, WEIGHTS

ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class DataFacts:
    """What a model must know about the data it was trained on.

    Attributes:
        vocab_size: V, without mask and BOS.
        length: L, BOS included.
        bos: id of BOS, or None.
        eot: id of the end of a text, or None.
        pad: id behind the tokens of a row, or None where rows have no padding.
        row_lengths: number of training rows of every length from 0 on, or None where rows have no padding.
        class_names: by label, where the data names its classes.
        answer_block: answers to prompts go on with end of text up to a multiple of so many tokens; None where rows
            are no prompts and answers.
        template: how prompts become text (`data.template`), or None.
        caption: tokens of a row's caption, behind which its image begins, or None where rows are no such pairs.
        text_ids: number of ids of text in such rows, behind which those of images begin, or None.
    """

    vocab_size: int
    length: int
    bos: int | None
    eot: int | None
    pad: int | None = None
    row_lengths: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    answer_block: int | None = None
    template: TemplateName | None = None
    caption: int | None = None
    text_ids: int | None = None

    @property
    def modalities(self) -> Modalities | None:
        """The modalities of rows of captions and images; None for other rows."""
        if self.caption is None or self.text_ids is None:
            return None
        return Modalities(self.caption, self.text_ids)


class _Facts(Section):
    """`DataFacts`, as the file has them."""

    vocab_size: PositiveInt
    length: Annotated[int, Field(ge=2)]
    bos: NonNegativeInt | None = None
    eot: NonNegativeInt | None = None
    pad: NonNegativeInt | None = None
    row_lengths: tuple[NonNegativeInt, ...] | None = None
    class_names: tuple[str, ...] | None = None
    answer_block: PositiveInt | None = None
    template: TemplateName | None = None
    caption: PositiveInt | None = None
    text_ids: PositiveInt | None = None


@dataclass(frozen=True)
class Background:
    """Where a model comes from; nothing depends on it.

    Attributes:
        figures: what was measured, by name.
        run: the config of the run that trained it; empty for a model that was imported.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


def write(
    folder: Path,
    model: ModelConfig,
    facts: DataFacts,
    tensors: Mapping[str, Tensor],
    background: Background,
    base: Mapping[str, str] | None = None,
) -> None:
    """Write weights and configs; the caller adds the tokenizer's files.

    Args:
        folder: where to write; it is made if it does not exist.
        model: config of the model.
        facts: what the model must know about its data.
        tensors: the model's state dict.
        background: where the model comes from.
        base: what an adapter folder says of the adapted model; None: the tensors are a model.
    """
    file = folder / (WEIGHTS if base is None else ADAPTER)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}  # which libraries of the hub ask for
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    storage.follow_umask(file)
    section = model.model_dump(mode="json")
    data = {key: value for key, value in asdict(facts).items() if value is not None}
    known = {key: dict(value) for key, value in asdict(background).items() if value}
    tree = {"model": section, "data": data} | ({} if base is None else {"base": dict(base)}) | known
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    if base is not None:
        return
    hub = {"model_type": model.kind, "library_name": "partition-pipeline", **section, **data}
    (folder / HUB_CONFIG).write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[Denoiser, ModelConfig, DataFacts]:
    """Read a model folder.

    Args:
        folder: a folder that `write` wrote.

    Returns:
        The model in eval mode on the CPU, its config, and what it knows about its data.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit the config; every one is named.
        ConfigError: this version does not have the model section or one of its keys.
    """
    config, facts = read_config(folder)
    return assembled(config, facts, read_weights(folder), str(folder / WEIGHTS)), config, facts


def assembled(config: ModelConfig, facts: DataFacts, tensors: dict[str, Tensor], origin: str) -> Denoiser:
    """Build a model around its weights.

    Args:
        config: of the model.
        facts: what the model knows about its data.
        tensors: its state dict; the model takes these tensors without a copy.
        origin: where they are from, for messages.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: as `load_weights`.
    """
    with torch.device("meta"):
        model = build(config, facts.vocab_size, facts.length, facts.bos, facts.modalities)
    load_weights(model, tensors, origin)
    return model.eval()


def read_config(folder: Path) -> tuple[ModelConfig, DataFacts]:
    """Read the config of a model folder, without the weights.

    Args:
        folder: a folder that `write` wrote.

    Returns:
        The model's config, and what the model knows about its data.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: this version does not have the model section or one of its keys.
    """
    tree, origin = read_tree(folder), str(folder / CONFIG)
    data, run = tree["data"], tree.get("run")
    facts, flaws = check(_Facts, data) if isinstance(data, dict) else (None, [f"{data!r}; expected its keys"])
    if facts is None:
        raise CheckpointError(f"{origin} is damaged: data: {'; '.join(flaws)}")
    # Folders written by earlier versions name the model only in their run.
    model = tree.get("model") or (run.get("model") if isinstance(run, dict) else None)
    if model is None:
        raise CheckpointError(f"{origin} is damaged: model: missing")
    section = {"model": model, "length": facts.length}
    return parse_section(ImportConfig, section, origin).model, DataFacts(**facts.model_dump())


def read_background(folder: Path) -> Background:
    """Read where the model of a model folder comes from.

    Args:
        folder: a folder that `write` wrote.

    Returns:
        Its figures and its run.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    tree = read_tree(folder)
    figures, run = (tree.get(key) or {} for key in ("figures", "run"))
    if not isinstance(figures, dict) or not isinstance(run, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged; expected keys in the sections figures and run")
    return Background(figures, run)


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Read the tensors of a model folder by name.

    Args:
        folder: of the file.
        name: of the file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = _existing(folder, name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def load_weights(model: Denoiser, tensors: dict[str, Tensor], origin: str) -> None:
    """Put tensors into a model.

    Args:
        model: the model, which may be on the meta device.
        tensors: its state dict; the model takes these tensors without a copy.
        origin: where they are from, for messages.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen, or not finite; every one is named.
    """
    check_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()}, tensors, origin)
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{origin} holds values that are not finite: {', '.join(bad)}")
    model.load_state_dict(tensors, assign=True)


def check_shapes(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Args:
        expected: shapes by name.
        tensors: what to check.
        origin: where the tensors are from, for messages.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen; every one is named.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    missing = expected.keys() - tensors.keys()
    problems += [f"extra {name}{did_you_mean(name, missing)}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and list(tensors[name].shape) != list(shape)
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model:\n" + "\n".join(f"  {p}" for p in problems))


def _existing(folder: Path, name: str) -> Path:
    """Return the path of a file in a model folder, which must exist."""
    if not (folder / name).is_file():
        contents = sorted(path.name for path in folder.glob("*"))[:8] if folder.is_dir() else None
        detail = "but it does not exist" if contents is None else f"found {', '.join(contents) or 'nothing'}"
        raise CheckpointError(f"{folder}: no {name}; expected a consolidated model folder, {detail}")
    return folder / name


def read_tree(folder: Path) -> dict[str, Any]:
    """Read the content of config.yaml.

    Args:
        folder: a folder that `write` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    _existing(folder, ADAPTER if (folder / ADAPTER).is_file() else WEIGHTS)
    path = _existing(folder, CONFIG)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict) or "data" not in tree or not {"model", "run"} & tree.keys():
        raise CheckpointError(f"{path}: expected the sections model and data")
    return tree
