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
    """One row of the paper's tables.

    Attributes:
        name: of the model.
        data: that it was trained on.
        results: by name.
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
    table = pd.read_csv(Path(__file__).with_suffix(".csv"), dtype=str, keep_default_na=False)
    rows = [row for row in table.to_dict("records") if [*row.values()][: len(size)] == size]
    results = table.columns[len(size) + 2 :]
    return [
        Published(row["name"], row["data"], {name: row[name] for name in results if row[name]})
        for row in rows
    ]
