"""What released weights are weights of: kind, sizes and variants, from names, shapes and hyper-parameters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.load import parse_section
from pipeline.config.schema import ImportConfig
from pipeline.errors import CapabilityError, CheckpointError
from pipeline.models.model_folder import check_shapes
from pipeline.models.released.layouts import Released

GPT2_VOCABULARY = 50257  # EOT is the last of them; the released text rows begin with it
TEXT_LENGTH, IMAGE_LENGTH = 1024, 1025  # of every released model; images: 32 x 32 codes and BOS
TIME_FEATURES = 256
SWAP, BUFFER = "decoder.group_swap", "rotary_emb.inv_freq"
CLASSES, REGISTERS = "cls_embed.embedding_table.weight", "reg_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A model section as the tensors imply it, and the facts of the data behind it.

    Attributes:
        model: keys of the config's model section.
        vocab_size: V, without mask and BOS.
        length: L.
        bos, eot: ids, or None.
        tokenizer: a name for `load_tokenizer`, or None.
        guesses: `key=value` words of what neither tensors nor hyper-parameters say.
    """

    model: dict[str, Any]
    vocab_size: int
    length: int
    bos: int | None
    eot: int | None
    tokenizer: str | None
    guesses: tuple[str, ...]

    def config(self, origin: str, overrides: Sequence[str]) -> ImportConfig:
        """The typed form, with `key=value` words applied.

        Raises:
            ConfigError: an override is wrong.
        """
        tree = {
            "model": self.model,
            "length": self.length,
            "bos": self.bos,
            "eot": self.eot,
            "tokenizer": self.tokenizer,
        }
        return parse_section(ImportConfig, tree, origin, overrides)


def infer(released: Released) -> Architecture:
    """The architecture that the tensors imply; every tensor of it is there, and no other.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor.
        CapabilityError: weights of a model that this project does not have.
    """
    names = released.tensors.keys()
    partition = any(name.startswith(("encoder.", "decoder.")) for name in names)
    if not partition and not any(name.startswith("blocks.") for name in names):
        _refuse(released)
    table, frequencies = _shape(released, "vocab_embed.embedding", 2), _shape(released, BUFFER, 1)
    rows, hidden = table
    heads = hidden // (2 * frequencies[0]) if frequencies[0] else 0
    if heads * 2 * frequencies[0] != hidden:
        raise CheckpointError(
            f"{released.origin}: {BUFFER} {list(frequencies)} does not split hidden {hidden} into heads"
        )
    guesses: list[str] = []
    model: dict[str, Any] = {"kind": "pgm" if partition else "mdlm", "hidden": hidden, "heads": heads}
    dropout = released.setting("model", "dropout")
    model["dropout"] = dropout if isinstance(dropout, float) and 0 <= dropout < 1 else 0.0
    if partition:
        model["encoder_blocks"] = _count(released, r"encoder\.blocks\.(\d+)\.")
        model["decoder_blocks"] = _count(released, r"decoder\.layers\.(\d+)\.")
        model["swap"] = _swap(released, guesses)
    else:
        model["blocks"] = _count(released, r"blocks\.(\d+)\.")
    image = CLASSES in names
    if image:
        model["classes"] = _shape(released, CLASSES, 2)[0] - 1  # the last row is "no class"
        model["registers"] = _shape(released, REGISTERS, 2)[0] if REGISTERS in names else 0
    condition = hidden if image else _shape(released, "sigma_map.mlp.2.weight", 2)[0]
    check_shapes(_layout(model, rows, condition), released.tensors, released.origin)
    vocabulary = rows - (2 if image else 1)  # the mask, and images' BOS
    tokenizer = _tokenizer(released, vocabulary, image)
    end = vocabulary - 1 if tokenizer == "gpt2" else None
    length = released.setting("model", "length") or released.setting("model_length")
    if not isinstance(length, int):
        length = IMAGE_LENGTH if image else TEXT_LENGTH
        guesses.append(f"length={length}")
    bos = vocabulary + 1 if image else end
    return Architecture(model, vocabulary, length, bos, end, tokenizer, tuple(guesses))


def _refuse(released: Released) -> None:
    """Say what a file without the authors' trunk is."""
    names = released.tensors
    if "embedding.weight" in names and "head.weight" in names:
        raise CheckpointError(
            f"{released.origin}: weights of this project without their config.yaml; expected the model's folder"
        )
    if "tok_emb.weight" in names:
        raise CapabilityError(
            f"{released.origin}: a Halton-MaskGIT transformer (learned positions, RMS norms, SwiGLU), which is "
            "no model of this project; the released models that are: PGM for text and images, MDLM"
        )
    found = ", ".join(list(names)[:5])
    raise CheckpointError(
        f"{released.origin}: not a released PGM or MDLM; expected tensors encoder.*, decoder.* or blocks.*, "
        f"found {found}"
    )


def _shape(released: Released, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that the sizes are read from."""
    if name not in released.tensors:
        raise CheckpointError(f"{released.origin}: missing {name}")
    shape = tuple(released.tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{released.origin}: {name} is {list(shape)}, expected {dimensions} dimensions")
    return shape


def _count(released: Released, pattern: str) -> int:
    """Number of numbered blocks."""
    found = [match for name in released.tensors if (match := re.match(pattern, name))]
    return max((int(match[1]) for match in found), default=0) + 1


def _swap(released: Released, guesses: list[str]) -> dict[str, Any]:
    """GroupSwap's variant; the authors write its query as e.g. `learn+freqs+mean`."""
    mlp = f"{SWAP}.query_processor.0.weight" in released.tensors
    mode = released.setting("model", "swap", "pre_query_mode")
    if not isinstance(mode, str):
        mode = "learn+freqs"
        guesses += ["model.swap.positional=true", "model.swap.pooling=none"]
    parts = mode.split("+")
    return {
        "positional": "freqs" in parts,
        "pooling": next((how for how in ("mean", "logsumexp") if how in parts), "none"),
        "query": "mlp4" if mlp else "linear",
        "norm": "rms" if released.setting("model", "swap", "normalize_mode") == "rmsnorm" else "layer",
    }


def _tokenizer(released: Released, vocabulary: int, image: bool) -> str | None:
    """The tokenizer by name, where it is one that we have."""
    named = released.setting("data", "tokenizer_name_or_path") or released.setting("tokenizer", "name")
    if isinstance(named, str) and "bert" in named.lower():
        raise CapabilityError(
            f"{released.origin}: tokenizer {named!r} has its mask among its ids; expected a mask behind them"
        )
    return "gpt2" if not image and vocabulary == GPT2_VOCABULARY else None


def _layout(model: dict[str, Any], rows: int, condition: int) -> Shapes:
    """Every tensor of a released model by name.

    Args:
        rows: of the embedding table, mask and BOS included.
        condition: width of the vector that adaLN maps read; images: of the class embedding, H.
    """
    width = model["hidden"]
    shapes: Shapes = {"vocab_embed.embedding": (rows, width), BUFFER: (width // model["heads"] // 2,)}
    shapes |= _linear("output_layer.linear", rows, width)
    shapes |= _linear("output_layer.adaLN_modulation", 2 * width, condition)
    shapes["output_layer.norm_final.weight"] = (width,)
    if "classes" in model:
        shapes[CLASSES] = (model["classes"] + 1, width)
        if model["registers"]:
            shapes[REGISTERS] = (model["registers"], width)
    else:
        shapes |= _linear("sigma_map.mlp.0", condition, TIME_FEATURES)
        shapes |= _linear("sigma_map.mlp.2", condition, condition)
    if model["kind"] == "mdlm":
        for index in range(model["blocks"]):
            shapes |= _self_block(f"blocks.{index}", width, condition)
        return shapes
    for index in range(model["encoder_blocks"]):
        shapes |= _self_block(f"encoder.blocks.{index}", width, condition)
    for index in range(model["decoder_blocks"]):
        shapes |= _cross_block(f"decoder.layers.{index}", width, condition)
    shapes[f"{SWAP}.base_embedding"] = (1, width)
    shapes[f"{SWAP}.pre_query_norm.weight"] = (width,)
    if model["swap"]["norm"] == "layer":
        shapes[f"{SWAP}.pre_query_norm.bias"] = (width,)
    if model["swap"]["query"] == "mlp4":
        shapes |= _linear(f"{SWAP}.query_processor.0", 4 * width, width)
        shapes |= _linear(f"{SWAP}.query_processor.2", width, 4 * width)
    else:
        shapes |= _linear(f"{SWAP}.query_processor", width, width)
    shapes |= _linear(f"{SWAP}.hidden_to_key_value", 2 * width, width)
    return shapes | _linear(f"{SWAP}.output_linear", width, width)


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _self_block(name: str, width: int, condition: int) -> Shapes:
    norms = {f"{name}.{norm}.weight": (width,) for norm in ("norm1", "norm2")}
    attention = {f"{name}.attn_qkv.weight": (3 * width, width), f"{name}.attn_out.weight": (width, width)}
    return norms | attention | _feed_forward(name, width, condition)


def _cross_block(name: str, width: int, condition: int) -> Shapes:
    norms = {f"{name}.{norm}.weight": (width,) for norm in ("q_norm1", "kv_norm1", "norm2")}
    maps = {"attn_q": width, "attn_kv": 2 * width, "attn_out": width}
    attention = {f"{name}.{part}.weight": (out, width) for part, out in maps.items()}
    return norms | attention | _feed_forward(name, width, condition)


def _feed_forward(name: str, width: int, condition: int) -> Shapes:
    return (
        _linear(f"{name}.adaLN_modulation", 6 * width, condition)
        | _linear(f"{name}.mlp.0", 4 * width, width)
        | _linear(f"{name}.mlp.2", width, 4 * width)
    )
