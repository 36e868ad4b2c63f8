"""Infer what released weights are weights of, from names, shapes and hyper-parameters."""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import CapabilityError, CheckpointError
from pipeline.models.model_folder import check_shapes
from pipeline.models.released.layouts import FREQUENCIES, ReleasedWeights, count_blocks, tensor_shape

GPT2_VOCABULARY = 50257  # EOT is the last of them; the released text rows begin with it
TEXT_LENGTH, IMAGE_LENGTH = 1024, 1025  # of every released model; images: 32 x 32 codes and BOS
TIME_FEATURES = 256
SWAP = "decoder.group_swap"
CLASSES, REGISTERS = "cls_embed.embedding_table.weight", "reg_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The model section that the tensors imply, and what they imply of the data.

    Attributes:
        model: keys of the config's model section.
        vocab_size: V, without mask and BOS.
        length: L.
        bos: id of BOS, or None.
        eot: id of the end of a text, or None.
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


def infer(released: ReleasedWeights) -> Architecture:
    """Infer the architecture from the tensors, and check that they are exactly those that it has.

    Args:
        released: the content of a file.

    Returns:
        The architecture. Its `guesses` name what a user may have to correct.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen; every one is named.
        CapabilityError: the weights are those of a model that this project does not have.
    """
    tensors, origin = released.tensors, released.origin

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        return tensor_shape(tensors, name, dimensions, origin)

    if {"embedding.weight", "head.weight"} <= tensors.keys():
        raise CheckpointError(
            f"{origin}: weights of this project, but no config.yaml beside them; expected the model's folder"
        )
    is_pgm = any(name.startswith(("encoder.", "decoder.")) for name in tensors)
    if not is_pgm and not any(name.startswith("blocks.") for name in tensors):
        raise _unknown_model(released)
    rows, hidden = shape("vocab_embed.embedding")
    (half_head,) = shape(FREQUENCIES, dimensions=1)
    heads, rest = divmod(hidden, 2 * half_head)
    if rest:
        raise CheckpointError(
            f"{origin}: {FREQUENCIES} [{half_head}] does not split hidden {hidden} into heads of {2 * half_head}"
        )
    dropout = released.setting("model", "dropout")
    dropout = dropout if isinstance(dropout, float) and 0 <= dropout < 1 else 0.0
    is_ar = not is_pgm and not any("adaLN_modulation" in name for name in tensors)
    kind = "pgm" if is_pgm else "ar" if is_ar else "mdlm"
    model: dict[str, Any] = {"kind": kind, "hidden": hidden, "heads": heads, "dropout": dropout}
    guesses: list[str] = []
    if is_pgm:
        model["encoder_blocks"] = count_blocks(tensors, r"encoder\.blocks\.(\d+)\.")
        model["decoder_blocks"] = count_blocks(tensors, r"decoder\.layers\.(\d+)\.")
        model["swap"] = _group_swap(released, guesses)
    else:
        model["blocks"] = count_blocks(tensors, r"blocks\.(\d+)\.")
    if is_ar:
        model["start"] = "bos"
    is_image = CLASSES in tensors
    if is_image:
        model["classes"] = shape(CLASSES)[0] - 1  # the last row is "no class"
        model["registers"] = shape(REGISTERS)[0] if REGISTERS in tensors else 0
    condition = None if is_ar else hidden if is_image else shape("sigma_map.mlp.2.weight")[0]
    check_shapes(_expected_shapes(model, rows, condition), tensors, origin)
    vocab_size = rows - (2 if is_image else 1)  # the mask, and images' BOS
    length = released.setting("model", "length") or released.setting("model_length")
    length = length or released.setting("data_preprocess", "seq_len")
    if not isinstance(length, int):
        length = IMAGE_LENGTH if is_image else TEXT_LENGTH
        guesses.append(f"length={length}")
    is_gpt2 = _has_gpt2_vocabulary(released, vocab_size, is_image)
    eot = vocab_size - 1 if is_gpt2 else None
    bos = vocab_size + 1 if is_image else eot
    if is_ar and bos is None:
        bos = vocab_size - 1
        guesses.append(f"bos={bos}")
    return Architecture(model, vocab_size, length, bos, eot, "gpt2" if is_gpt2 else None, tuple(guesses))


def _unknown_model(released: ReleasedWeights) -> CheckpointError | CapabilityError:
    """Return an error that says what a file without the authors' trunk is."""
    names = released.tensors
    if "tok_emb.weight" in names:
        return CapabilityError(
            f"{released.origin}: a Halton-MaskGIT transformer (learned positions, RMS norms, SwiGLU), which is "
            "not a model of this project; expected a released PGM for text or images, MDLM or AR"
        )
    return CheckpointError(
        f"{released.origin}: not a released PGM, MDLM or AR; expected tensors encoder.*, decoder.* or blocks.*, "
        f"found {', '.join(list(names)[:5])}"
    )


def _group_swap(released: ReleasedWeights, guesses: list[str]) -> dict[str, Any]:
    """Return GroupSwap's variant; the authors write its query as e.g. `learn+freqs+mean`."""
    mode = released.setting("model", "swap", "pre_query_mode")
    if not isinstance(mode, str):
        mode = "learn+freqs"
        guesses += ["model.swap.positional=true", "model.swap.pooling=none"]
    terms = mode.split("+")
    return {
        "positional": "freqs" in terms,
        "pooling": next((pooling for pooling in ("mean", "logsumexp") if pooling in terms), "none"),
        "query": "mlp4" if f"{SWAP}.query_processor.0.weight" in released.tensors else "linear",
        "norm": "rms" if released.setting("model", "swap", "normalize_mode") == "rmsnorm" else "layer",
    }


def _has_gpt2_vocabulary(released: ReleasedWeights, vocab_size: int, is_image: bool) -> bool:
    """Return whether ids are GPT-2's; refuse a tokenizer whose ids cannot be ours."""
    name = released.setting("data", "tokenizer_name_or_path") or released.setting("tokenizer", "name")
    if isinstance(name, str) and "bert" in name.lower():
        raise CapabilityError(
            f"{released.origin}: tokenizer {name!r} has its mask among its ids; expected a mask behind them"
        )
    return not is_image and vocab_size == GPT2_VOCABULARY


def _expected_shapes(model: dict[str, Any], rows: int, condition: int | None) -> Shapes:
    """Return the shape of every tensor of a released model by name.

    Args:
        model: keys of the config's model section.
        rows: of the embedding table, mask and BOS included.
        condition: width of the vector that adaLN maps read; images: of the class embedding, H; None: there are none.
    """
    width = model["hidden"]
    head = {"linear": (rows, width)} | _map(2 * width, condition)
    shapes = {"vocab_embed.embedding": (rows, width), FREQUENCIES: (width // model["heads"] // 2,)}
    shapes |= _layers("output_layer", linear=head, weights={"norm_final": (width,)})
    if "classes" in model:
        shapes[CLASSES] = (model["classes"] + 1, width)
        if model["registers"]:
            shapes[REGISTERS] = (model["registers"], width)
    elif condition is not None:
        time_map = {"mlp.0": (condition, TIME_FEATURES), "mlp.2": (condition, condition)}
        shapes |= _layers("sigma_map", linear=time_map)
    common: Shapes = {"norm2": (width,), "attn_out": (width, width)}
    self_attention: Shapes = common | {"norm1": (width,), "attn_qkv": (3 * width, width)}
    cross_attention: Shapes = common | {"attn_q": (width, width), "attn_kv": (2 * width, width)}
    cross_attention |= {"q_norm1": (width,), "kv_norm1": (width,)}
    feed_forward = {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
    block = feed_forward | _map(6 * width, condition)
    for stem, key, attention in (
        ("blocks", "blocks", self_attention),
        ("encoder.blocks", "encoder_blocks", self_attention),
        ("decoder.layers", "decoder_blocks", cross_attention),
    ):
        for index in range(model.get(key, 0)):
            shapes |= _layers(f"{stem}.{index}", linear=block, weights=attention)
    if model["kind"] == "pgm":
        query = {f"query_processor.{part[-1]}": shape for part, shape in feed_forward.items()}
        swap = {"hidden_to_key_value": (2 * width, width), "output_linear": (width, width)}
        swap |= query if model["swap"]["query"] == "mlp4" else {"query_processor": (width, width)}
        shapes |= _layers(SWAP, linear=swap, weights={"pre_query_norm": (width,)})
        shapes[f"{SWAP}.base_embedding"] = (1, width)
        if model["swap"]["norm"] == "layer":
            shapes[f"{SWAP}.pre_query_norm.bias"] = (width,)
    return shapes


def _map(width: int, condition: int | None) -> dict[str, tuple[int, int]]:
    """Return the shape of an adaLN map, which models without a condition do not have."""
    return {} if condition is None else {"adaLN_modulation": (width, condition)}


def _layers(stem: str, linear: dict[str, tuple[int, int]], weights: Shapes | None = None) -> Shapes:
    """Return the shapes of linear layers with a bias, and of layers that have a weight alone."""
    shapes = {f"{stem}.{name}.weight": shape for name, shape in (linear | (weights or {})).items()}
    return shapes | {f"{stem}.{name}.bias": shape[:1] for name, shape in linear.items()}
