"""Convert weights of the authors' released models to ours (repository jdeschena/pgm, see docs/method.md)."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.config.load import parse_section
from pipeline.config.schema import ImportConfig
from pipeline.errors import CheckpointError
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts, load_weights
from pipeline.models.released.architecture import CLASSES, REGISTERS, TIME_FEATURES, infer
from pipeline.models.released.layouts import FREQUENCIES, read, rename

log = logging.getLogger(__name__)

# Released name -> ours, see `translate` for what is done with the values.
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
    (r"^output_layer\.", "final."),
    (r"^cls_embed\.embedding_table\.", "classes."),
    (r"\.adaLN_modulation\.", ".modulation.map."),
    (r"\.attn_(qkv|kv|q)\.", r".\1_proj."),
    (r"\.attn_out\.", ".out."),
    (r"\.(q|kv)_norm1\.", r".\1_norm."),
    (r"\.mlp\.0\.", ".mlp.up."),
    (r"\.mlp\.2\.", ".mlp.down."),
)
# Layers that make queries or keys, which rotary codes turn; values, if any, are the last H of their rows.
ROTATED = re.compile(r"\.(qkv|kv|q)_proj\.|^swap\.query\.(2\.)?(weight|bias)$")


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Denoiser, ImportConfig, DataFacts]:
    """Load a released file, with its averaged (EMA) weights if it has any.

    Args:
        path: file of released weights.
        overrides: `key=value` words over what the file says, e.g. `model.swap.pooling=mean` or `length=1024`.

    Returns:
        The model in float32 and eval mode on the CPU, its config, and the facts of the data it was trained on.

    Raises:
        CheckpointError: the file is not one of released weights, or is damaged; every missing, extra and
            misshapen tensor is named.
        CapabilityError: the weights are those of a model that this project does not have.
        ConfigError: an override is wrong.
    """
    released = read(path)
    architecture = infer(released)
    tree = {key: getattr(architecture, key) for key in ImportConfig.model_fields}
    config = parse_section(ImportConfig, tree, str(path), overrides)
    for guess in architecture.guesses:
        if not any(word.startswith(guess.partition("=")[0]) for word in overrides):
            log.warning("%s does not say %s: %s is assumed", path, *guess.split("="))
    facts = DataFacts(architecture.vocab_size, config.length, config.bos, config.eot)
    with torch.device("meta"):
        model = build(config.model, facts.vocab_size, facts.length, facts.bos)
    # Copies in float32: what the reader gives may be views of the file.
    tensors = {name: value.to(torch.float32, copy=True) for name, value in released.tensors.items()}
    load_weights(model, translate(tensors, config.model.kind), origin=str(path))
    log.info("%s: %s weights", path, "averaged" if released.averaged else "plain (it has no averaged)")
    return model.eval(), config, facts


def translate(released: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Convert a released model's state dict to our names and shapes.

    The released text models feed every adaLN map one constant vector, `SiLU(MLP(time embedding of 0))`, so each
    map is folded into constant modulation vectors. AR has no maps, so its vectors are those that change nothing.
    Image models feed the map the class vector, and it stays.
    The mask token's row is kept where a model reads it, in the embedding of masked models, and where BOS
    lies behind it. Registers become the last rows of the embedding. Rows of queries and keys are reordered, so
    that the entries that a rotary code turns together are adjacent (`layers.rotate`).

    Args:
        released: tensors by released name, with or without the `backbone.` prefix.
        kind: of the model: "pgm", "mdlm" or "ar".

    Returns:
        Contiguous tensors by our names.

    Raises:
        CheckpointError: there is neither a time embedding to fold nor a class embedding, so that this is no
            released model.
    """
    tensors = {name.removeprefix("backbone."): value for name, value in released.items()}
    is_image = CLASSES in tensors
    time_map = {name: tensors.pop(name) for name in list(tensors) if name.startswith("sigma_map.")}
    if len(time_map) != 4 and not is_image and kind != "ar":
        raise CheckpointError(
            "released weights: no sigma_map (time embedding) tensors; expected 4 of them in a text model, "
            "or cls_embed (class embedding) in an image model"
        )
    half_head = len(tensors.pop(FREQUENCIES))
    registers = tensors.pop(REGISTERS, None)
    out = {rename(name, RENAMES): value for name, value in tensors.items()}
    hidden = out["embedding.weight"].shape[1]
    for name, value in out.items():
        if ROTATED.search(name):
            num_rotated = len(value) - hidden if "kv_proj" in name else len(value)
            out[name] = _make_adjacent(value, num_rotated, half_head)
    for name in ("head.weight", "head.bias"):  # behind the ids stand the mask and, in image models, BOS
        out[name] = out[name][: -2 if is_image else -1]
    if kind != "mdlm" and not is_image:
        out["embedding.weight"] = out["embedding.weight"][:-1]
    if registers is not None:
        out["embedding.weight"] = torch.cat([out["embedding.weight"], registers])
    if "swap.base" in out:
        out["swap.base"] = out["swap.base"].squeeze(0)
    if kind == "ar":
        unchanged = out["head.weight"].new_zeros(6, hidden)
        unchanged[[2, 5]] = 1  # the gates
        blocks = {name.partition(".norm1")[0] for name in out if ".norm1." in name}
        out |= {f"{block}.modulation.vectors": unchanged.clone() for block in blocks}
        out["final.modulation.vectors"] = unchanged.new_zeros(2, hidden)
    elif not is_image:
        condition = _time_vector(time_map)
        for stem in [name.removesuffix("map.weight") for name in out if name.endswith(".map.weight")]:
            modulation = F.linear(condition, out.pop(f"{stem}map.weight"), out.pop(f"{stem}map.bias"))
            out[f"{stem}vectors"] = modulation.view(-1, hidden)  # [shift, scale(, gate) x 2 | x 1, H]
    return {name: value.contiguous() for name, value in out.items()}


def _make_adjacent(
    rows: Float[Tensor, "out *rest"], num_rotated: int, half_head: int
) -> Float[Tensor, "out *rest"]:
    """Put rows i and i + D/2 of every head side by side, in the first `num_rotated` rows."""
    pairs = rows[:num_rotated].unflatten(0, (-1, 2, half_head)).transpose(1, 2).flatten(0, 2)
    return torch.cat([pairs, rows[num_rotated:]])


def _time_vector(time_map: dict[str, Tensor]) -> Tensor:
    """Return the constant condition of the released text models: time 0, cosines (1) before sines (0)."""
    x = torch.cat([torch.ones(TIME_FEATURES // 2), torch.zeros(TIME_FEATURES // 2)])
    for layer in ("sigma_map.mlp.0", "sigma_map.mlp.2"):
        x = F.silu(F.linear(x, time_map[f"{layer}.weight"], time_map[f"{layer}.bias"]))
    return x
