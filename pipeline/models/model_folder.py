"""A consolidated model: a folder that is enough to sample, evaluate, fine-tune or distil from.

model.safetensors   EMA weights, float32
config.yaml         the model section, what the data fixed (V, L, BOS), and where known figures and the run's config
config.json         the first two again, where the Hugging Face hub looks for them
tokenizer files     written by the tokenizer itself
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.load import parse_section
from pipeline.config.schema import ImportConfig, ModelConfig
from pipeline.errors import CheckpointError, did_you_mean
from pipeline.models import build
from pipeline.models.denoiser import Denoiser

WEIGHTS, CONFIG, HUB_CONFIG = "model.safetensors", "config.yaml", "config.json"


@dataclass(frozen=True)
class DataFacts:
    """What a model must know about the data it was trained on."""

    vocab_size: int
    length: int
    bos: int | None
    eot: int | None


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
) -> None:
    """Write weights and configs; the tokenizer's files are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}  # which libraries of the hub ask for
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, metadata)
    section = model.model_dump(mode="json")
    tree = {"model": section, "data": asdict(facts)}
    tree |= {key: dict(value) for key, value in asdict(background).items() if value}
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    hub = {"model_type": model.kind, "library_name": "partition-pipeline", **section, **asdict(facts)}
    (folder / HUB_CONFIG).write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[Denoiser, ModelConfig, DataFacts]:
    """The model in eval mode on the CPU, its config and its data's facts.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit the config; every one is named.
        ConfigError: the model section is one that this version does not have.
    """
    config, facts = read_config(folder)
    with torch.device("meta"):
        model = build(config, facts.vocab_size, facts.length, facts.bos)
    load_weights(model, read_weights(folder), origin=str(folder / WEIGHTS))
    return model.eval(), config, facts


def read_config(folder: Path) -> tuple[ModelConfig, DataFacts]:
    """The model's section and its data's facts, without the weights.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the model section is one that this version does not have.
    """
    tree = _tree(folder)
    # Folders written by earlier versions name the model only in their run.
    section = tree.get("model") or tree["run"]["model"]
    try:
        facts = DataFacts(**tree["data"])
    except TypeError as error:
        raise CheckpointError(
            f"{folder / CONFIG} is damaged ({error}); expected the sections model and data"
        ) from None
    told = {"model": section, "length": facts.length}
    return parse_section(ImportConfig, told, origin=str(folder / CONFIG)).model, facts


def read_background(folder: Path) -> Background:
    """Figures and run of a model folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    tree = _tree(folder)
    return Background(tree.get("figures") or {}, tree.get("run") or {})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors alone.

    Raises:
        CheckpointError: there are none, or the file is damaged.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}; expected a consolidated model folder or a checkpoint")
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}") from None


def load_weights(model: Denoiser, tensors: dict[str, Tensor], origin: str) -> None:
    """Put tensors into a model of exactly their names and shapes (the model may be on the meta device).

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor.
    """
    check_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()}, tensors, origin)
    model.load_state_dict(tensors, assign=True)


def check_shapes(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [
        f"extra {name}{did_you_mean(name, expected.keys() - tensors.keys())}"
        for name in tensors
        if name not in expected
    ]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and list(tensors[name].shape) != list(shape)
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model:\n" + "\n".join(f"  {p}" for p in problems))


def _tree(folder: Path) -> dict[str, Any]:
    """The content of config.yaml."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            there = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
            raise CheckpointError(
                f"{folder}: no {name}; expected a consolidated model folder"
                + (f", found {', '.join(there[:8])}" if there else ", but it does not exist")
            )
    try:
        tree = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not YAML: {error}") from None
    if not isinstance(tree, dict) or "data" not in tree or not {"model", "run"} & tree.keys():
        raise CheckpointError(f"{folder / CONFIG}: expected the sections model and data")
    return tree
