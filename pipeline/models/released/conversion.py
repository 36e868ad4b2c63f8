"""Weights of the authors' released models -> ours (repository jdeschena/pgm; method.md section 2)."""

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.config.schema import ImportConfig
from pipeline.errors import CheckpointError
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts, load_weights
from pipeline.models.released.architecture import BUFFER, infer
from pipeline.models.released.layouts import read

log = logging.getLogger(__name__)

# Released name -> ours; a trailing mask row is cut, adaLN maps are folded, see `translate`.
RENAMES = (
    (r"^vocab_embed\.embedding$", "embedding.weight"),
    (r"^encoder\.blocks\.(\d+)\.", r"encoder.\1."),
    (r"^decoder\.layers\.(\d+)\.", r"decoder.\1."),
    (r"^decoder\.group_swap\.", "swap."),
    (r"^swap\.base_embedding$", "swap.base"),
    (r"^swap\.pre_query_norm\.", "swap.norm."),
    (r"^swap\.query_processor\.", "swap.query."),
    (r"^swap\.hidden_to_key_value\.", "swap.kv_proj."),
    (r"^swap\.output_linear\.", "swap.out."),
    (r"^output_layer\.norm_final\.", "final.norm."),
    (r"^output_layer\.linear\.", "head."),
    (r"^output_layer\.adaLN_modulation\.", "final.adaLN_modulation."),
    (r"^cls_embed\.embedding_table\.", "classes."),
    (r"\.attn_(qkv|kv|q)\.", r".\1_proj."),
    (r"\.attn_out\.", ".out."),
    (r"\.(q|kv)_norm1\.", r".\1_norm."),
    (r"\.mlp\.0\.", ".mlp.up."),
    (r"\.mlp\.2\.", ".mlp.down."),
)
# What rotary codes turn, and the share of its rows that they do: queries and keys.
TURNED = (
    (re.compile(r"\.qkv_proj\."), Fraction(2, 3)),
    (re.compile(r"\.kv_proj\."), Fraction(1, 2)),
    (re.compile(r"\.q_proj\.|^swap\.query\.(2\.)?(weight|bias)$"), Fraction(1)),
)


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Denoiser, ImportConfig, DataFacts]:
    """A released file as a model in eval mode on the CPU; its averaged (EMA) weights, where it has any.

    Args:
        overrides: `key=value` words over what the file says, e.g. `model.swap.pooling=mean` or `length=1024`.

    Raises:
        CheckpointError: the file is none, or damaged; every missing, extra and misshapen tensor is named.
        CapabilityError: weights of a model that this project does not have.
        ConfigError: an override is wrong.
    """
    file = read(path)
    architecture = infer(file)
    config = architecture.config(str(path), overrides)
    for guess in architecture.guesses:
        if not any(word.startswith(guess.partition("=")[0]) for word in overrides):
            log.warning("%s does not say %s: %s is assumed", path, *guess.split("="))
    facts = DataFacts(architecture.vocab_size, config.length, config.bos, config.eot)
    with torch.device("meta"):
        model = build(config.model, facts.vocab_size, facts.length, facts.bos)
    # Copies in float32: what the reader gives may be views of the file.
    tensors = {name: value.to(torch.float32, copy=True) for name, value in file.tensors.items()}
    load_weights(model, translate(tensors, masked=config.model.kind == "mdlm"), origin=str(path))
    log.info("%s: %s weights", path, "averaged" if file.averaged else "plain (it has no averaged)")
    return model.eval(), config, facts


def translate(released: dict[str, Tensor], masked: bool) -> dict[str, Tensor]:
    """A released model's state dict in our names and shapes.

    The released text models feed every adaLN map one constant vector, `SiLU(MLP(time embedding of 0))`, so each
    map is folded into constant modulation vectors. Image models feed it the class vector, and the map stays.
    The mask token's row is kept where a model reads it, in the embedding of masked models, and where BOS
    lies behind it. Registers become the last rows of the embedding. Rows of queries and keys are reordered, so
    that the entries that a rotary code turns together are adjacent (`layers.rotate`).

    Args:
        released: tensors by released name, with or without the `backbone.` prefix.
        masked: whether the model reads a mask token (MDLM, MaskGIT).

    Raises:
        CheckpointError: no rotary frequencies, or neither a time embedding to fold nor a class embedding, so this
            is no released model.
    """
    tensors = {name.removeprefix("backbone."): value for name, value in released.items()}
    frequencies = tensors.pop(BUFFER, None)  # [D/2]
    time_map = {name: tensors.pop(name) for name in list(tensors) if name.startswith("sigma_map.")}
    of_classes = "cls_embed.embedding_table.weight" in tensors
    if len(time_map) != 4 and not of_classes:
        raise CheckpointError(
            "released weights: no sigma_map (time embedding) tensors; expected 4 of them in a text model, "
            "or cls_embed (class embedding) in an image model"
        )
    if frequencies is None:
        raise CheckpointError(f"released weights: no {BUFFER}; expected the rotary frequencies of a head")
    registers = tensors.pop("reg_tokens.weight", None)
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, target in RENAMES:
            name = re.sub(pattern, target, name)
        share = next((share for pattern, share in TURNED if pattern.search(name)), None)
        if share is not None:
            value = _adjacent(value, int(share * len(value)), len(frequencies))
        out[name] = value
    # Behind the ids that can be predicted stand the mask and, in image models, BOS.
    beyond = 2 if of_classes else 1
    out["head.weight"], out["head.bias"] = out["head.weight"][:-beyond], out["head.bias"][:-beyond]
    if not masked and not of_classes:
        out["embedding.weight"] = out["embedding.weight"][:-1]
    if registers is not None:
        out["embedding.weight"] = torch.cat([out["embedding.weight"], registers])
    if "swap.base" in out:
        out["swap.base"] = out["swap.base"].squeeze(0)
    constant = None if of_classes else _time_vector(time_map)
    for name in [name for name in out if name.endswith("adaLN_modulation.weight")]:
        stem = name.removesuffix("adaLN_modulation.weight")
        weight, bias = out.pop(name), out.pop(f"{stem}adaLN_modulation.bias")
        if constant is None:
            out[f"{stem}modulation.map.weight"], out[f"{stem}modulation.map.bias"] = weight, bias
        else:  # [shift, scale(, gate) x 2 | x 1, H]
            folded = F.linear(constant, weight, bias).view(-1, out["embedding.weight"].shape[1])
            out[f"{stem}modulation.vectors"] = folded
    return {name: value.contiguous() for name, value in out.items()}


def _adjacent(rows: Float[Tensor, "out *rest"], turned: int, half: int) -> Float[Tensor, "out *rest"]:
    """The first `turned` rows, heads of 2 `half`, with rows i and i + half of every head side by side."""
    pairs = rows[:turned].unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
    return torch.cat([pairs, rows[turned:]])


def _time_vector(time_map: dict[str, Tensor]) -> Tensor:
    """The constant condition of the released text models: time 0, 256 features, cosines before sines."""
    features = torch.cat([torch.ones(128), torch.zeros(128)])
    x = F.linear(features, time_map["sigma_map.mlp.0.weight"], time_map["sigma_map.mlp.0.bias"])
    x = F.linear(F.silu(x), time_map["sigma_map.mlp.2.weight"], time_map["sigma_map.mlp.2.bias"])
    return F.silu(x)
