"""The recipes have the settings of the released models, as docs/method.md, section 7, lists them."""

from functools import reduce
from pathlib import Path

import pytest

from pipeline.config.load import load

CONFIGS = Path(__file__).parents[2] / "configs"

ADAM = {
    "optim.betas": (0.9, 0.999),
    "optim.clip": 1.0,
    "optim.schedule": "constant",
    "train.precision": "bf16",
}
TEXT = ADAM | {
    "data.tokenizer": "gpt2",
    "data.length": 1024,
    "data.wrap": "bos_eos",
    "data.validation_documents": 100_000,
    "model.dropout": 0.1,
    "optim.lr": 3e-4,
    "optim.weight_decay": 0.0,
    "optim.warmup_steps": 2500,
    "train.batch": 512,
    "train.steps": 1_000_000,
    "train.ema": 0.9999,
}
IMAGES = ADAM | {
    "data.size": 256,
    "data.factor": 8,
    "data.length": 1025,
    "data.flip": False,
    "model.hidden": 1024,
    "model.heads": 16,
    "model.dropout": 0.1,
    "model.classes": 1000,
    "diffusion.schedule": "arccos",
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.03,
    "optim.warmup_steps": 2500,
    "train.batch": 256,
    "train.steps": 500_000,
    "train.ema": 0.0,
    "train.class_drop": 0.1,
    "sampling.num_samples": 50_000,
    "sampling.order": "halton",
    "sampling.gumbel": 5.0,
}
# The authors' public PGM configs.
SDTT = ADAM | {
    "distill.rounds": 5,
    "distill.teacher_steps": 1024,
    "distill.form": "compatible",
    "distill.divergence": "reverse_kl",
    "distill.next_teacher": "raw",
    "distill.optimizer": "keep",
    "optim.lr": 3e-4,
    "optim.warmup_steps": 2500,
    "train.batch": 128,
    "train.steps": 50_000,
    "train.ema": 0.9999,
    "sampling.steps": 32,
}


def pgm(encoder: int, decoder: int, hidden: int, heads: int) -> dict[str, object]:
    sizes = {"encoder_blocks": encoder, "decoder_blocks": decoder, "hidden": hidden, "heads": heads}
    return {"model.kind": "pgm"} | {f"model.{key}": value for key, value in sizes.items()}


def masked(blocks: int, complementary: bool = False) -> dict[str, object]:
    return {"model.kind": "mdlm", "model.blocks": blocks, "model.complementary": complementary}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text/pgm_8_8", TEXT | pgm(8, 8, 768, 12) | {"model.encoder": "bidirectional"}),
        ("text/pgm_8_8_causal", TEXT | pgm(8, 8, 768, 12) | {"model.encoder": "causal"}),
        ("text/pgm_6_6_dim1024", TEXT | pgm(6, 6, 1024, 16)),
        ("text/mdlm", TEXT | masked(12) | {"model.hidden": 768, "model.heads": 12}),
        ("text/complementary_mdlm", TEXT | masked(12, complementary=True)),
        ("text/ar", TEXT | {"model.kind": "ar", "model.blocks": 12, "model.hidden": 768}),
        (
            "image/pgm_12_12",
            IMAGES | pgm(12, 12, 1024, 16) | {"model.registers": 2, "sampling.guidance": 3.0},
        ),
        ("image/pgm_14_10", IMAGES | pgm(14, 10, 1024, 16) | {"model.registers": 2}),
        ("image/maskgit", IMAGES | masked(24) | {"model.registers": 1, "sampling.guidance": 1.0}),
        ("distill/pgm_8_8", SDTT | {"distill.teacher": "models:/owt-pgm-8-8@teacher"}),
        ("distill/pgm_6_6_dim1024", SDTT | {"distill.teacher": "models:/owt-pgm-6-6-1024@teacher"}),
        ("distill/mdlm", SDTT | {"distill.teacher": "models:/owt-mdlm@teacher"}),
    ],
)
def test_recipe(name: str, expected: dict[str, object]) -> None:
    file = CONFIGS / f"{name}.yaml"
    config = load(file)
    found = {key: reduce(getattr, key.split("."), config) for key in expected}
    assert found == expected
    assert "\n# Follows   " in file.read_text()
