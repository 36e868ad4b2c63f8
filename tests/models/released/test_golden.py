"""The authors' numerics: released weights give the released outputs, in training and in inference form."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.api import Model
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.errors import CheckpointError
from pipeline.models import build
from pipeline.models.model_folder import load_weights
from pipeline.models.released.conversion import translate

DATA = Path(__file__).parents[2] / "data"
# Our models run in float64, so that the rounding of the recorded float32 is all that differs: up to 8e-6.
AGREEMENT = {"atol": 2e-5, "rtol": 0, "check_dtype": False}


def golden(name: str) -> tuple[dict[str, Tensor], Model]:
    """Recorded inputs and outputs, and our model with the recorded weights in float64; sizes are the file's."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["config"])
        sizes = settings["model"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    released = {
        key.removeprefix("weights."): value for key, value in tensors.items() if key[:8] == "weights."
    }
    trunk = {"hidden": sizes["hidden_size"], "heads": sizes["n_heads"], "dropout": 0}
    trunk |= {"classes": sizes.get("n_class"), "registers": settings.get("register", 0)}
    if "n_blocks" in sizes:
        config = MDLMConfig(kind="mdlm", blocks=sizes["n_blocks"], **trunk)
    else:
        blocks = {f"{part}_blocks": sizes[part]["n_blocks"] for part in ("encoder", "decoder")}
        added = sizes["swap"]["pre_query_mode"].split("+")
        swap = {
            "positional": "freqs" in added,
            "pooling": next((how for how in ("mean", "logsumexp") if how in added), "none"),
            "query": sizes["swap"]["query_process_mode"],
        }
        config = PGMConfig(**blocks, **trunk, swap=swap)
    table = next(value for key, value in released.items() if key.endswith("vocab_embed.embedding"))
    vocabulary = table.shape[0] - (1 if config.classes is None else 2)  # mask, and BOS in image models
    bos = None if config.classes is None else vocabulary + 1
    model = build(config, vocabulary, sizes["length"], bos)
    load_weights(model, translate(released, config.kind), origin=name)
    return tensors, Model(model.double(), bos)


@pytest.fixture(scope="module", params=["pgm_learn_freqs", "pgm_mean_mlp4"])
def pgm(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Model]:
    return golden(request.param)


@pytest.fixture(scope="module")
def mdlm() -> tuple[dict[str, Tensor], Model]:
    return golden("mdlm")


def test_partition_model_in_training_form(pgm: tuple[dict[str, Tensor], Model]) -> None:
    recorded, model = pgm
    logits = model.logits(recorded["tokens"], recorded["groups"])
    assert logits.shape == (3, 16, 32)
    torch.testing.assert_close(logits, recorded["logits"][..., :32], **AGREEMENT)
    moved = recorded["groups"].clone()
    moved[:, 3] ^= 1
    assert (model.logits(recorded["tokens"], moved) - logits).abs().amax((1, 2)).min() > 0.01


def test_partition_model_in_inference_form(pgm: tuple[dict[str, Tensor], Model]) -> None:
    recorded, model = pgm
    logits = model.predict(
        recorded["clean_tokens"],
        recorded["clean_positions"],
        recorded["clean_lengths"],
        recorded["noisy_positions"],
    )
    assert len(set(recorded["clean_lengths"].tolist())) > 1, "else nothing here is ragged"
    torch.testing.assert_close(logits, recorded["inference_logits"][..., :32], **AGREEMENT)


def test_masked_model(mdlm: tuple[dict[str, Tensor], Model]) -> None:
    recorded, model = mdlm
    vocabulary = model.denoiser.vocab_size
    masked = recorded["tokens"] == vocabulary
    assert 0 < masked.sum() < masked.numel()
    logits = model.logits(recorded["tokens"].masked_fill(masked, 0), masked)
    torch.testing.assert_close(logits[masked], recorded["logits"][masked][:, :vocabulary], **AGREEMENT)


def test_masked_model_at_clean_positions(mdlm: tuple[dict[str, Tensor], Model]) -> None:
    """What the loss never asks for, but where the trunk is wrong if it is wrong."""
    recorded, model = mdlm
    tokens, denoiser = recorded["tokens"], model.denoiser
    (rows, length), clean = tokens.shape, tokens < denoiser.vocab_size
    positions = torch.arange(length).expand_as(tokens)
    with torch.no_grad():
        state = denoiser.open(rows)
        denoiser.extend(state, tokens[clean], positions[clean], clean.sum(1).tolist())
        hidden = denoiser.hidden(state, positions.flatten(), [length] * rows)
        logits = denoiser.head(hidden).unflatten(0, (rows, length))
    torch.testing.assert_close(logits, recorded["logits"][..., : model.denoiser.vocab_size], **AGREEMENT)


@pytest.fixture(scope="module")
def image() -> tuple[dict[str, Tensor], Model]:
    return golden("pgm_image")


def labels_of(recorded: dict[str, Tensor]) -> Tensor:
    """Labels as the model saw them: 5 is "no class"."""
    return recorded["labels"].masked_fill(recorded["drop_label"].bool(), 5)


def test_image_model_in_training_form(image: tuple[dict[str, Tensor], Model]) -> None:
    """Registers, BOS and classes, one of them dropped."""
    recorded, model = image
    labels = labels_of(recorded)
    assert len(set(labels.tolist())) > 1
    assert 5 in labels
    logits = model.logits(recorded["tokens"], recorded["groups"], labels)
    assert logits.shape == (3, 17, 20)
    torch.testing.assert_close(logits, recorded["logits"][..., :20], **AGREEMENT)
    for wrong in (None, (labels + 1) % 5):
        changed = model.logits(recorded["tokens"], recorded["groups"], wrong) - logits
        assert changed.abs().amax((1, 2)).max() > 0.01


def test_image_model_in_inference_form(image: tuple[dict[str, Tensor], Model]) -> None:
    recorded, model = image
    known = recorded["clean_positions"]
    logits = model.predict(
        recorded["clean_tokens"],
        known,
        torch.full((3,), known.shape[1]),
        recorded["noisy_positions"],
        condition=labels_of(recorded),
    )
    torch.testing.assert_close(logits, recorded["inference_logits"][..., :20], **AGREEMENT)


def test_weights_of_another_layout_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no sigma_map"):
        translate({"backbone.vocab_embed.embedding": torch.zeros(4, 2)}, "pgm")
