"""Released files in every layout they come in: the authors' numbers come out, and what does not fit is named."""

import json
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.api import Model, load_model
from pipeline.errors import CapabilityError, CheckpointError, ConfigError
from pipeline.models.released.architecture import infer
from pipeline.models.released.layouts import read

DATA = Path(__file__).parents[2] / "data"
AGREEMENT = {"atol": 2e-5, "rtol": 0, "check_dtype": False}  # as in test_golden.py: ours are in float64
TEXT = ["pgm_learn_freqs", "pgm_mean_mlp4", "mdlm"]
BUFFER = "backbone.rotary_emb.inv_freq"
Weights = dict[str, Tensor]


def golden(name: str) -> tuple[Weights, Weights, dict[str, Any]]:
    """Recorded tensors, weights by released name, and the authors' config.

    The weights' order is arbitrary, but not the alphabet's: lists of averages follow it.
    """
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    names = sorted(key for key in tensors if key.startswith("weights."))
    random.Random(0).shuffle(names)
    return tensors, {key.removeprefix("weights."): tensors[key] for key in names}, config


def stale(weights: Weights) -> Weights:
    """Weights that are not the averaged ones."""
    return OrderedDict((key, value if key == BUFFER else value + 1) for key, value in weights.items())


def bare(weights: Weights, prefix: str = "") -> Weights:
    return {prefix + key.removeprefix("backbone."): value for key, value in weights.items()}


@pytest.fixture
def omega() -> Iterator[Callable[[Any], Any]]:
    """Makes configuration objects with OmegaConf's insides, whose classes are gone when the file is read."""
    module = types.ModuleType("omegaconf_like")
    exec(
        "class AnyNode:\n    pass\nclass DictConfig:\n    pass\nclass GPT2TokenizerFast:\n    pass",
        module.__dict__,
    )
    sys.modules["omegaconf_like"] = module

    def make(value: Any, parent: Any = None) -> Any:
        node = module.DictConfig() if isinstance(value, dict) else module.AnyNode()
        node.__dict__.update(_parent=parent, _metadata={"ref_type": dict}, _flags_cache=None)
        if isinstance(value, dict):
            node._content = {key: make(entry, node) for key, entry in value.items()}
        else:
            node._val = value
        return node

    make.tokenizer = module.GPT2TokenizerFast()  # type: ignore[attr-defined]
    yield make
    sys.modules.pop("omegaconf_like", None)


def lightning(weights: Weights, config: dict[str, Any], omega: Callable[[Any], Any]) -> dict[str, Any]:
    """A checkpoint as the authors' text trainer saves it."""
    shadow = [value for key, value in weights.items() if key != BUFFER]
    return {
        "epoch": 0,
        "state_dict": stale(weights),
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 3}}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "hyper_parameters": {"config": omega(config), "tokenizer": omega.tokenizer},  # type: ignore[attr-defined]
        "ema": {"decay": 0.9999, "num_updates": 1000, "shadow_params": shadow},
        "sampler": {"random_state": None},
    }


def averaged_by_name(weights: Weights, config: dict[str, Any], omega: Callable[[Any], Any]) -> dict[str, Any]:
    named = {key: value for key, value in weights.items() if key != BUFFER}
    return lightning(weights, config, omega) | {"ema": {"decay": 0.9, "shadow_params": named}}


def compiled(weights: Weights, config: dict[str, Any], omega: Callable[[Any], Any]) -> dict[str, Any]:
    content = lightning(weights, config, omega)
    names = {key: key.replace("backbone.", "backbone._orig_mod.") for key in weights}
    content["state_dict"] = {names[key]: value for key, value in content["state_dict"].items()}
    return content


def without_averages(weights: Weights, config: dict[str, Any], omega: Callable[[Any], Any]) -> dict[str, Any]:
    return lightning(weights, config, omega) | {"state_dict": weights, "ema": None}


def image_trainer(weights: Weights, *_: Any) -> dict[str, Any]:
    return {
        "iter": 5,
        "global_epoch": 1,
        "model_state_dict": bare(weights, "module."),
        "optimizer_state_dict": None,
    }


def image_trainer_averaged(weights: Weights, *_: Any) -> dict[str, Any]:
    ema = bare(weights, "module.") | {"n_averaged": torch.tensor(3)}
    return {"model_state_dict": bare(stale(weights)), "model_ema": ema}


def tensors_alone(weights: Weights, *_: Any) -> dict[str, Any]:
    return bare(weights, "_orig_mod.")


PICKLED = {
    "lightning.ckpt": lightning,
    "averaged_by_name.ckpt": averaged_by_name,
    "compiled.ckpt": compiled,
    "without_averages.ckpt": without_averages,
    "image_trainer.pth": image_trainer,
    "image_trainer_averaged.ckpt": image_trainer_averaged,
    "tensors_alone.pt": tensors_alone,
}
SAFE = {"": "weights.backbone.", "plain": "", "wrapped": "module.backbone."}


def pooled(name: str) -> bool:
    return name == "pgm_mean_mlp4"


def load(name: str, path: Path, says_all: bool) -> Model:
    """Load with the words that a file without hyper-parameters needs."""
    overrides = [] if says_all else ["length=16", *(["model.swap.pooling=mean"] if pooled(name) else [])]
    return load_model(path, overrides=overrides)


def agree(name: str, model: Model) -> None:
    """The recorded outputs, in training and in inference form, computed in float64."""
    model.denoiser.double()
    recorded, _, _ = golden(name)
    vocabulary = recorded["logits"].shape[-1] - 1
    assert (model.denoiser.vocab_size, model.denoiser.length) == (vocabulary, 16)
    if name == "mdlm":
        masked = recorded["tokens"] == vocabulary
        logits = model.logits(recorded["tokens"].masked_fill(masked, 0), masked)[masked]
        torch.testing.assert_close(logits, recorded["logits"][masked][:, :vocabulary], **AGREEMENT)
        return
    logits = model.logits(recorded["tokens"], recorded["groups"])
    torch.testing.assert_close(logits, recorded["logits"][..., :vocabulary], **AGREEMENT)
    inputs = [
        recorded[key] for key in ("clean_tokens", "clean_positions", "clean_lengths", "noisy_positions")
    ]
    torch.testing.assert_close(
        model.predict(*inputs), recorded["inference_logits"][..., :vocabulary], **AGREEMENT
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", PICKLED)
@pytest.mark.parametrize("name", TEXT)
def test_pickled_layouts(tmp_path: Path, omega: Any, name: str, layout: str, legacy: bool) -> None:
    _, weights, config = golden(name)
    content = PICKLED[layout](weights, config, omega)
    torch.save(content, tmp_path / layout, _use_new_zipfile_serialization=not legacy)
    sys.modules.pop("omegaconf_like")
    model = load(name, tmp_path / layout, says_all="hyper_parameters" in content)
    assert "omegaconf_like" not in sys.modules
    (tmp_path / layout).write_bytes(b"")  # the model does not live on the file
    agree(name, model)


@pytest.mark.parametrize("config_in", ["metadata", "beside", "nowhere"])
@pytest.mark.parametrize("prefix", SAFE.values())
@pytest.mark.parametrize("name", TEXT)
def test_safetensors(tmp_path: Path, name: str, prefix: str, config_in: str) -> None:
    _, weights, config = golden(name)
    metadata = {"config": json.dumps(config)} if config_in == "metadata" else None
    if config_in == "beside":
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(bare(weights, prefix), tmp_path / "model.safetensors", metadata)
    agree(name, load(name, tmp_path / "model.safetensors", says_all=config_in != "nowhere"))


def test_the_architecture_comes_from_the_tensors(tmp_path: Path) -> None:
    """All but what tensors cannot show: the pooling, the length; both are said to be guesses."""
    for name, model in {
        "mdlm": {"kind": "mdlm", "hidden": 32, "heads": 4, "dropout": 0.0, "blocks": 3},
        "pgm_mean_mlp4": {
            "kind": "pgm",
            "hidden": 32,
            "heads": 4,
            "dropout": 0.0,
            "encoder_blocks": 1,
            "decoder_blocks": 3,
            "swap": {"positional": True, "pooling": "none", "query": "mlp4", "norm": "layer"},
        },
    }.items():
        save_file(golden(name)[1], tmp_path / "a.safetensors")
        inferred = infer(read(tmp_path / "a.safetensors"))
        assert inferred.model == model
        assert (inferred.length, inferred.bos, inferred.eot, inferred.tokenizer) == (1024, None, None, None)
        assert "length=1024" in inferred.guesses
        assert ("model.swap.pooling=none" in inferred.guesses) == (name != "mdlm")
    with_config = infer(read(DATA / "pgm_mean_mlp4.safetensors"))
    assert with_config.model["swap"]["pooling"] == "mean"
    assert (with_config.length, with_config.guesses) == (16, ())


def test_image_weights_are_recognised() -> None:
    inferred = infer(read(DATA / "pgm_image.safetensors"))
    assert {key: inferred.model[key] for key in ("classes", "registers", "encoder_blocks")} == {
        "classes": 5,
        "registers": 2,
        "encoder_blocks": 2,
    }
    # Codes 0..C-1, mask C, BOS C + 1.
    assert (inferred.vocab_size, inferred.bos, inferred.eot, inferred.length) == (20, 21, None, 17)


def test_an_image_checkpoint(tmp_path: Path) -> None:
    """As the authors' image trainer saves it: no hyper-parameters, no averages."""
    recorded, weights, _ = golden("pgm_image")
    torch.save(image_trainer(weights), tmp_path / "epoch_100.ckpt")
    model = load_model(tmp_path / "epoch_100.ckpt", overrides=["length=17"])
    assert model.bos == 21
    model.denoiser.double()
    labels = recorded["labels"].masked_fill(recorded["drop_label"].bool(), 5)
    logits = model.logits(recorded["tokens"], recorded["groups"], labels)
    torch.testing.assert_close(logits, recorded["logits"][..., :20], **AGREEMENT)


def test_gpt2_sized_weights_are_gpt2s(tmp_path: Path) -> None:
    """EOT is the last of 50,257 ids and begins every row; the mask behind it is not among them."""
    _, weights, _ = golden("pgm_learn_freqs")
    for name, shape in {
        "vocab_embed.embedding": (50258, 32),
        "output_layer.linear.weight": (50258, 32),
        "output_layer.linear.bias": (50258,),
    }.items():
        weights[f"backbone.{name}"] = torch.zeros(shape)
    save_file(weights, tmp_path / "a.safetensors")
    inferred = infer(read(tmp_path / "a.safetensors"))
    assert (inferred.vocab_size, inferred.bos, inferred.eot, inferred.tokenizer) == (
        50257,
        50256,
        50256,
        "gpt2",
    )


def test_a_bare_file_with_its_config_in_the_metadata() -> None:
    agree("pgm_mean_mlp4", load_model(DATA / "pgm_mean_mlp4.safetensors"))


@pytest.mark.parametrize("name", ["mdlm", "pgm_learn_freqs"])
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    _, weights, _ = golden(name)
    block = "backbone.blocks.1." if name == "mdlm" else "backbone.decoder.layers.1."
    weights[f"{block}mlp.0.bais"] = weights.pop(f"{block}mlp.0.bias")
    weights[f"{block}norm2.weight"] = torch.ones(31)
    del weights["backbone.sigma_map.mlp.0.weight"]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "a.ckpt")
    message = str(caught.value)
    inner = block.removeprefix("backbone.")
    assert f"missing {inner}mlp.0.bias [128]" in message
    assert f"extra {inner}mlp.0.bais; did you mean '{inner}mlp.0.bias'" in message
    assert f"{inner}norm2.weight is [31], expected [32]" in message
    assert "missing sigma_map.mlp.0.weight [16, 256]" in message


@pytest.mark.parametrize(
    "lost",
    ["vocab_embed.embedding", "rotary_emb.inv_freq", "sigma_map.mlp.2.weight", "output_layer.linear.bias"],
)
def test_tensors_that_sizes_are_read_from_are_named_too(tmp_path: Path, lost: str) -> None:
    _, weights, _ = golden("mdlm")
    del weights[f"backbone.{lost}"]
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"missing {lost}"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("ema", "says"),
    [
        (lambda shadow: shadow[:-1], r"shadow_params has \d+ entries for \d+ parameters"),
        (lambda shadow: [*shadow[:-1], torch.zeros(7)], "ema does not fit the model"),
        (lambda shadow: {"x": shadow[0]}, r"some that the model lacks: \['x'\]"),
        (lambda shadow: 3, "shadow_params has int entries"),
    ],
)
def test_averages_that_do_not_fit(tmp_path: Path, omega: Any, ema: Callable[[Any], Any], says: str) -> None:
    _, weights, config = golden("mdlm")
    content = lightning(weights, config, omega)
    content["ema"]["shadow_params"] = ema(content["ema"]["shadow_params"])
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=says):
        load_model(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"hello": 1}, "no weights; expected tensors, or one of state_dict"),
        ([torch.ones(2)], "holds list; expected a dict"),
        ({"state_dict": {"conv.weight": torch.ones(2)}}, "not a released PGM, MDLM or AR.*found conv.weight"),
        ({"embedding.weight": torch.ones(2), "head.weight": torch.ones(2)}, "expected the model's folder"),
    ],
)
def test_other_peoples_checkpoints(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=says):
        load_model(tmp_path / "a.pt")


def test_models_that_we_do_not_have(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"tok_emb.weight": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(CapabilityError, match="Halton-MaskGIT"):
        load_model(tmp_path / "a.pth")
    _, weights, _ = golden("mdlm")
    metadata = {"config": json.dumps({"data": {"tokenizer_name_or_path": "bert-base-uncased"}})}
    save_file(weights, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CapabilityError, match="bert-base-uncased"):
        load_model(tmp_path / "a.safetensors")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.cpkt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.cpkt are not read; known: \.ckpt, .*did you mean '\.ckpt'"):
        load_model(tmp_path / "a.cpkt")
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_model(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no such folder or file"):
        load_model(tmp_path / "b.ckpt")


def test_wrong_overrides() -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(DATA / "pgm_learn_freqs.safetensors", overrides=["model.swap.positonal=true", "length=x"])
    assert "model.swap.positonal: no such key in model.swap; did you mean 'positional'" in str(caught.value)
    assert "length: 'x'" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"missing blocks\.3\."):
        load_model(DATA / "mdlm.safetensors", overrides=["model.blocks=4"])
