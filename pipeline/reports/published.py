"""What the papers report, for models of the same size.

Source: Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883; its own measurements, also those of its baselines.
"""

from dataclasses import dataclass

from pipeline.config.schema import ModelConfig

SOURCE = "Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883"


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables.

    Attributes:
        key: kind, blocks (encoder and decoder of PGM), hidden, complementary, L (of images without BOS).
        figures: by name.
    """

    key: tuple[str, tuple[int, ...], int, bool, int]
    name: str
    data: str
    figures: dict[str, str]


def _text(perplexity: str, speed: str, samples: str, distilled: str = "") -> dict[str, str]:
    figures = {"validation perplexity": perplexity, "tokens/s, 128 steps, batch 32, A100": speed}
    figures |= {"generative perplexity (entropy), 128 steps": samples} if samples else {}
    return figures | ({"the same after 5 rounds of SDTT, 32 steps": distilled} if distilled else {})


_OWT, _LM1B, _IMAGENET = "OpenWebText", "LM1B", "ImageNet 256"
TABLE = (
    Published(
        ("mdlm", (12,), 768, False, 1024),
        "MDLM",
        _OWT,
        _text("23.07", "1,043", "122.89 (5.67)", "61.65 (5.46)"),
    ),
    Published(("pgm", (8, 8), 768, False, 1024), "PGM 8/8", _OWT, _text("22.61", "5,586", "122.21 (5.66)")),
    Published(
        ("pgm", (6, 6), 1024, False, 1024),
        "PGM 6/6, H 1024",
        _OWT,
        _text("21.43", "5,518", "116.95 (5.67)", "84.97 (5.52)"),
    ),
    Published(("mdlm", (12,), 768, False, 128), "MDLM", _LM1B, _text("27.67", "1,082", "")),
    Published(("mdlm", (12,), 768, True, 128), "complementary MDLM", _LM1B, _text("25.72", "1,082", "")),
    Published(("pgm", (6, 6), 768, False, 128), "PGM 6/6", _LM1B, _text("26.80", "1,931", "")),
    Published(
        ("mdlm", (24,), 1024, False, 1024),
        "MaskGIT",
        _IMAGENET,
        {"FID, Halton, 32 steps, w 1": "5.35", "images/s": "1.05"},
    ),
    Published(
        ("pgm", (12, 12), 1024, False, 1024),
        "PGM 12/12",
        _IMAGENET,
        {"FID, Halton, 32 steps, w 3": "5.54", "images/s": "7.93", "FID, Halton, 64 steps, w 2": "4.56"},
    ),
)


def published(model: ModelConfig, length: int) -> list[Published]:
    """Rows for a model of this size; of other data than ours perhaps, which each row says.

    Args:
        length: L; of images without BOS.
    """
    blocks = (model.encoder_blocks, model.decoder_blocks) if model.kind == "pgm" else (model.blocks,)
    complementary = model.kind == "mdlm" and model.complementary
    key = (model.kind, blocks, model.hidden, complementary, length)
    return [row for row in TABLE if row.key == key and (row.data == _IMAGENET) == (model.classes is not None)]
