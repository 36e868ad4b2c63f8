"""Read files of released weights: the tensors by name, and the hyper-parameters that stand beside them.

The layouts are those of the repositories jdeschena/pgm and jdeschena/sdtt and of the code bases they grew from
(kuleshov-group/mdlm, s-sahoo/duo, valeoai/Halton-MaskGIT). The suffix of a file does not tell them apart:

text    Lightning: `state_dict` under `backbone.`, `ema` = {decay, num_updates, shadow_params: list in the order
        of the trainable parameters}, `hyper_parameters` = {config: OmegaConf, tokenizer}
image   `model_state_dict`, `optimizer_state_dict`, `iter`, `global_epoch`; averaged weights are a file of their own
hub     safetensors, names under `backbone.`, with a `config.json` beside or `config` in its metadata
SDTT    as hub; students of the published MDLM have its names, under `backbone.` twice
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError, did_you_mean
from pipeline.models.model_folder import check_shapes
from pipeline.models.released.pickles import InertObject, read_pickle, to_plain

SAFETENSORS = ".safetensors"
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", SAFETENSORS)  # of the files that `read` takes
PREFIXES = ("weights.", "module.", "backbone.")
WEIGHTS = ("state_dict", "model_state_dict", "model")
AVERAGES = ("ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
# Rotary codes of a head. They are in the state dict, but not a parameter, so averages in a list leave them out.
FREQUENCIES = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class ReleasedWeights:
    """The content of a file of released weights.

    Attributes:
        origin: the file, for messages.
        tensors: weights by released name without prefixes, averaged (EMA) where the file has averages.
        settings: hyper-parameters, nested as in the authors' configs; empty where the file has none.
        averaged: whether the weights are averages.
    """

    origin: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    averaged: bool

    def setting(self, *path: str) -> Any:
        """Return the hyper-parameter at `path`, or None if the file does not have it."""
        node: Any = self.settings
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read(path: Path) -> ReleasedWeights:
    """Read a file of released weights.

    Args:
        path: a file with one of the `SUFFIXES`. Tensors of a pickle may be views of it.

    Returns:
        Its tensors and hyper-parameters.

    Raises:
        CheckpointError: the file is of another kind, is damaged, or its averages do not fit its weights.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path}: files of kind {path.suffix or 'without suffix'} are not read; known: {', '.join(SUFFIXES)}"
            f"{did_you_mean(path.suffix, SUFFIXES)}"
        )
    return _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path)


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply rules (regular expression, replacement) to the name of a tensor, one after the other.

    Args:
        name: the tensor's name.
        rules: in the order in which they apply.

    Returns:
        The new name.
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def tensor_shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, origin: str) -> tuple[int, ...]:
    """Return the shape of a tensor from which sizes of the model are read.

    Args:
        tensors: all tensors by name.
        name: the tensor's name.
        dimensions: the number of dimensions that it must have.
        origin: the file, for messages.

    Raises:
        CheckpointError: the tensor is missing, empty or of another number of dimensions.
    """
    if name not in tensors:
        raise CheckpointError(f"{origin}: missing {name}{did_you_mean(name, tensors)}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{origin}: {name} is {list(shape)}, expected {dimensions} dimensions above 0")
    return shape


def count_blocks(tensors: Iterable[str], pattern: str) -> int:
    """Return the number of numbered blocks, which is at least 1.

    Args:
        tensors: names of tensors.
        pattern: regular expression for the start of a block's names; its group is the number, from 0 on.
    """
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=0) + 1


def _read_pickle(path: Path) -> ReleasedWeights:
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}; expected a dict with weights")
    candidates = (*(content.get(key) for key in WEIGHTS), content)
    weights = next((tensors for candidate in candidates if (tensors := _tensors(candidate))), None)
    if weights is None:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"{path}: no weights; expected tensors, or one of {', '.join(WEIGHTS)}; found {keys}"
        )
    try:
        settings = to_plain(content.get("hyper_parameters"))
    except RecursionError:
        raise CheckpointError(f"{path}: hyper_parameters contain themselves") from None
    settings = settings if isinstance(settings, dict) else {}
    tensors = _strip_prefixes(weights)
    averages = next((content[key] for key in AVERAGES if content.get(key)), None)
    if averages is not None:
        tensors |= _averages(averages, tensors, sum(name.startswith("noise.") for name in weights), path)
    return ReleasedWeights(str(path), tensors, settings.get("config", settings), averages is not None)


def _read_safetensors(path: Path) -> ReleasedWeights:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        beside = path.with_name("config.json")
        text = metadata.get("config") or (beside.read_text(encoding="utf-8") if beside.is_file() else "{}")
        settings = json.loads(text)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: its config is not JSON: {error}") from None
    settings = settings if isinstance(settings, dict) else {}
    return ReleasedWeights(str(path), _strip_prefixes(tensors), settings, averaged=False)


def _tensors(tree: Any) -> dict[str, Tensor]:
    """Return the named tensors of a mapping; empty for anything else."""
    items = tree.items() if isinstance(tree, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}


def _strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put before names; where some names have such a prefix, only those are the model."""
    stripped = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in stripped)), None):
        stripped = {name.removeprefix(prefix): v for name, v in stripped.items() if name.startswith(prefix)}
    return stripped


def _averages(ema: Any, tensors: Mapping[str, Tensor], num_noise: int, path: Path) -> dict[str, Tensor]:
    """Return averaged weights by name, from a list in the order of the parameters or from a mapping.

    Source: `ExponentialMovingAverage` of kuleshov-group/mdlm: one entry for each trainable parameter of the
    trunk, then of the noise schedule (`num_noise` of them), in the order in which the state dict lists them too.
    """
    ema = ema.state if isinstance(ema, InertObject) else ema
    shadow = ema.get("shadow_params", ema) if isinstance(ema, Mapping) else ema
    if isinstance(shadow, Mapping):
        averages = _strip_prefixes(_tensors(shadow))
        averages.pop("n_averaged", None)
        unknown = sorted(averages.keys() - tensors.keys())
        if unknown or not averages:
            raise CheckpointError(f"{path}: ema has no weights, or has some that the model lacks: {unknown}")
    else:
        names = [name for name in tensors if name != FREQUENCIES]
        count = len(shadow) if isinstance(shadow, Sequence) else type(shadow).__name__
        if count not in (len(names), len(names) + num_noise):
            raise CheckpointError(
                f"{path}: ema.shadow_params has {count} entries for {len(names)} parameters"
            )
        averages = dict(zip(names, shadow, strict=False))
    expected = {name: tuple(tensors[name].shape) for name in averages}
    check_shapes(expected, _tensors(averages), origin=f"{path}: ema")
    return averages
