"""A consolidated model: a folder that is enough to sample, evaluate, fine-tune or distil from.

model.safetensors   EMA weights, float32
config.yaml         the run's config and what the data fixed: V, L, BOS
tokenizer files     written by the tokenizer itself
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, did_you_mean
from pipeline.models import build
from pipeline.models.denoiser import Denoiser

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


@dataclass(frozen=True)
class DataFacts:
    """What a model must know about the data it was trained on."""

    vocab_size: int
    length: int
    bos: int | None
    eot: int | None


def write(folder: Path, config: RunConfig, facts: DataFacts, tensors: dict[str, Tensor]) -> None:
    """Write weights and config; the tokenizer's files are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    tree = {"run": config.model_dump(mode="json"), "data": asdict(facts)}
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def read(folder: Path) -> tuple[Denoiser, RunConfig, DataFacts]:
    """The model in eval mode on the CPU, its config and its data's facts.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit the config; every one is named.
        ConfigError: the config in the folder is none of this version's.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            there = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
            raise CheckpointError(
                f"{folder}: no {name}; expected a consolidated model folder"
                + (f", found {', '.join(there[:8])}" if there else ", but it does not exist")
            )
    config, facts = _read_config(folder / CONFIG)
    with torch.device("meta"):
        model = build(config.model, facts.vocab_size, facts.length, facts.bos)
    load_weights(model, _read_tensors(folder / WEIGHTS), origin=str(folder / WEIGHTS))
    return model.eval(), config, facts


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors alone.

    Raises:
        CheckpointError: there are none, or the file is damaged.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}; expected a consolidated model folder or a checkpoint")
    return _read_tensors(folder / WEIGHTS)


def load_weights(model: Denoiser, tensors: dict[str, Tensor], origin: str) -> None:
    """Put tensors into a model of exactly their names and shapes (the model may be on the meta device).

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor.
    """
    expected = {name: value.shape for name, value in model.state_dict().items()}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [
        f"extra {name}{did_you_mean(name, expected.keys() - tensors.keys())}"
        for name in tensors
        if name not in expected
    ]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model:\n" + "\n".join(f"  {p}" for p in problems))
    model.load_state_dict(tensors, assign=True)


def _read_config(path: Path) -> tuple[RunConfig, DataFacts]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        run, facts = tree["run"], DataFacts(**tree["data"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); expected the sections run and data") from None
    return parse(run, origin=str(path)), facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
