"""Files of released weights: what they hold, and the architecture that it implies.

Layouts (repository jdeschena/pgm and the code bases it grew from: kuleshov-group/mdlm, s-sahoo/duo,
valeoai/Halton-MaskGIT; the suffix does not tell them apart):

text    Lightning: `state_dict` under `backbone.`, `ema` = {decay, num_updates, shadow_params: list in the order
        of the trainable parameters}, `hyper_parameters` = {config: OmegaConf, tokenizer}
image   `model_state_dict`, `optimizer_state_dict`, `iter`, `global_epoch`; averaged weights are a file of their own
hub     safetensors, names under `backbone.`, with a `config.json` beside or `config` in its metadata
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError, did_you_mean
from pipeline.models.unpickle import InertObject, read_pickle, to_plain

PICKLES, SAFETENSORS = (".ckpt", ".pth", ".pt", ".bin"), ".safetensors"
PREFIXES = ("weights.", "module.", "backbone.")
WEIGHTS = ("state_dict", "model_state_dict", "model")
AVERAGES = ("ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
BUFFERS = ("rotary_emb.inv_freq",)  # in the state dict, but no parameters: optimisers and averages skip them


@dataclass(frozen=True)
class Released:
    """What a file says.

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
        """The hyper-parameter at `path`, or None."""
        node: Any = self.settings
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read(path: Path) -> Released:
    """Read a file of released weights.

    Raises:
        CheckpointError: it is none, is damaged, or its averages do not fit its weights.
    """
    if path.suffix in PICKLES:
        return _from_pickle(path)
    if path.suffix == SAFETENSORS:
        return _from_safetensors(path)
    known = (*PICKLES, SAFETENSORS)
    raise CheckpointError(
        f"{path}: files of kind {path.suffix or 'without suffix'} are not read; known: {', '.join(known)}"
        f"{did_you_mean(path.suffix, known)}"
    )


def _from_pickle(path: Path) -> Released:
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}; expected a dict with weights")
    key = next((key for key in WEIGHTS if _tensors(content.get(key))), None)
    weights = _tensors(content if key is None else content[key])
    if not weights:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"{path}: no weights; expected tensors, or one of {', '.join(WEIGHTS)}; found {keys}"
        )
    averages = next((content[key] for key in AVERAGES if content.get(key)), None)
    try:
        settings = to_plain(content.get("hyper_parameters", {}))
    except RecursionError:
        raise CheckpointError(f"{path}: hyper_parameters contain themselves") from None
    settings = settings if isinstance(settings, dict) else {}
    settings = settings.get("config", settings)
    tensors = _strip(weights)
    if averages is not None:
        tensors |= _averages(averages, tensors, weights, str(path))
    return Released(str(path), tensors, settings, averages is not None)


def _from_safetensors(path: Path) -> Released:
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
    return Released(str(path), _strip(tensors), settings if isinstance(settings, dict) else {}, False)


def _tensors(tree: Any) -> dict[str, Tensor]:
    """The named tensors of a mapping; empty for anything else."""
    if not isinstance(tree, Mapping):
        return {}
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before them; where some have such a prefix, only those are the model."""
    out = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in out)), None):
        out = {name.removeprefix(prefix): v for name, v in out.items() if name.startswith(prefix)}
    return out


def _averages(
    ema: Any, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Averaged weights by name, from a list in parameter order or from names.

    Source: `ExponentialMovingAverage` of kuleshov-group/mdlm: one entry for each trainable parameter of the
    trunk, then of the noise schedule, in the order in which the state dict lists them too.
    """
    ema = ema.state if isinstance(ema, InertObject) else ema
    shadow = ema.get("shadow_params", ema) if isinstance(ema, Mapping) else ema
    if isinstance(shadow, Mapping):
        named = _strip(_tensors(shadow))
        unknown = [name for name in named if name not in tensors and name != "n_averaged"]
        if unknown or not named:
            raise CheckpointError(
                f"{origin}: ema has no weights, or has some that the model lacks: {unknown}"
            )
        named.pop("n_averaged", None)
    else:
        names = [name for name in tensors if name not in BUFFERS]
        schedule = [name for name in weights if name.startswith("noise.")]
        if not isinstance(shadow, Sequence) or len(shadow) not in (len(names), len(names) + len(schedule)):
            count = len(shadow) if isinstance(shadow, Sequence) else type(shadow).__name__
            raise CheckpointError(
                f"{origin}: ema.shadow_params has {count} entries for {len(names)} parameters"
            )
        named = dict(zip(names, shadow, strict=False))
    wrong = [
        f"{name} {list(tensors[name].shape)}"
        for name, value in named.items()
        if not isinstance(value, Tensor) or value.shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{origin}: ema does not have the shape of {', '.join(wrong)}")
    return named
