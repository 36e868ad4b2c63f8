"""Published results for models of the same size.

Source: Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883; its own measurements, also those of its baselines.
"""

from dataclasses import dataclass

from pipeline.config.schema import ModelConfig

SOURCE = "Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883"
_OWT, _LM1B, _IMAGENET = "OpenWebText", "LM1B", "ImageNet 256"
_PERPLEXITY, _SPEED = "validation perplexity", "tokens/s, 128 steps, batch 32, A100"
_SAMPLES = "generative perplexity (entropy), 128 steps"
_DISTILLED = "generative perplexity (entropy) after 5 rounds of SDTT, 32 steps"


@dataclass(frozen=True)
class Size:
    """What a model of the paper and one of this project must have in common.

    Attributes:
        kind: of the model.
        blocks: of encoder and decoder (pgm), or of the model.
        hidden: width.
        length: L; of images without BOS.
        complementary: whether a masked model is trained with complementary masks.
    """

    kind: str
    blocks: tuple[int, ...]
    hidden: int
    length: int
    complementary: bool = False


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables.

    Attributes:
        size: of the model.
        name: of the model.
        data: that it was trained on.
        figures: its results by name.
    """

    size: Size
    name: str
    data: str
    figures: dict[str, str]


TABLE = (
    Published(
        Size("mdlm", (12,), 768, 1024),
        "MDLM",
        _OWT,
        {_PERPLEXITY: "23.07", _SPEED: "1,043", _SAMPLES: "122.89 (5.67)", _DISTILLED: "61.65 (5.46)"},
    ),
    Published(
        Size("pgm", (8, 8), 768, 1024),
        "PGM 8/8",
        _OWT,
        {_PERPLEXITY: "22.61", _SPEED: "5,586", _SAMPLES: "122.21 (5.66)"},
    ),
    Published(
        Size("pgm", (6, 6), 1024, 1024),
        "PGM 6/6, H 1024",
        _OWT,
        {_PERPLEXITY: "21.43", _SPEED: "5,518", _SAMPLES: "116.95 (5.67)", _DISTILLED: "84.97 (5.52)"},
    ),
    Published(Size("mdlm", (12,), 768, 128), "MDLM", _LM1B, {_PERPLEXITY: "27.67", _SPEED: "1,082"}),
    Published(
        Size("mdlm", (12,), 768, 128, complementary=True),
        "complementary MDLM",
        _LM1B,
        {_PERPLEXITY: "25.72", _SPEED: "1,082"},
    ),
    Published(Size("pgm", (6, 6), 768, 128), "PGM 6/6", _LM1B, {_PERPLEXITY: "26.80", _SPEED: "1,931"}),
    Published(
        Size("mdlm", (24,), 1024, 1024),
        "MaskGIT",
        _IMAGENET,
        {"FID, Halton, 32 steps, w 1": "5.35", "images/s": "1.05"},
    ),
    Published(
        Size("pgm", (12, 12), 1024, 1024),
        "PGM 12/12",
        _IMAGENET,
        {"FID, Halton, 32 steps, w 3": "5.54", "images/s": "7.93", "FID, Halton, 64 steps, w 2": "4.56"},
    ),
)


def published(model: ModelConfig, length: int) -> list[Published]:
    """List the rows for a model of this size; they may be of other data, which each row names.

    Args:
        model: section of the config.
        length: L; of images without BOS.
    """
    blocks = (model.encoder_blocks, model.decoder_blocks) if model.kind == "pgm" else (model.blocks,)
    complementary = model.kind == "mdlm" and model.complementary
    size = Size(model.kind, blocks, model.hidden, length, complementary)
    return [
        row for row in TABLE if row.size == size and (row.data == _IMAGENET) == (model.classes is not None)
    ]
