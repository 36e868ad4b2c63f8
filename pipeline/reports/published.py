"""Published results for models of the same size, from published.csv.

Source: Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883; its own measurements, also those of its baselines.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipeline.config.model import ModelConfig

SOURCE = "Deschenaux, Tran, Gulcehre, ICLR 2026, arXiv 2505.18883"


@dataclass(frozen=True)
class Published:
    """A model of the paper's tables.

    Attributes:
        name: of the model.
        data: that it was trained on.
        results: by name, in the order of the file.
    """

    name: str
    data: str
    results: dict[str, str]


def published(model: ModelConfig, length: int) -> list[Published]:
    """List the published models of the same size, which may be trained on other data.

    Args:
        model: section of the config.
        length: L; of images without BOS.
    """
    blocks = f"{model.encoder_blocks}+{model.decoder_blocks}" if model.kind == "pgm" else model.blocks
    complementary, classes = model.kind == "mdlm" and model.complementary, model.classes is not None
    size = [str(value) for value in (model.kind, blocks, model.hidden, length, complementary, classes)]
    pooling = model.swap.pooling if model.kind == "pgm" else ""
    results: dict[tuple[str, str], dict[str, str]] = {}
    for *key, own_pooling, name, data, metric, value in _figures():
        if key == size and own_pooling in ("", pooling):  # empty where the paper does not vary it
            results.setdefault((name, data), {})[metric] = value
    return [Published(name, data, own) for (name, data), own in results.items()]


def _figures() -> list[list[str]]:
    """Read the rows of the file: the size of a model, what it is, and one of its figures."""
    table = pd.read_csv(Path(__file__).with_suffix(".csv"), dtype=str, keep_default_na=False)
    return table.to_numpy().tolist()
