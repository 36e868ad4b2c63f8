"""The README.md of an exported model: what it is, what was measured, how to load it and where to put it."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config.schema import ModelConfig
from pipeline.models.model_folder import DataFacts

KINDS = {
    "pgm": "partition generative model (arXiv 2505.18883)",
    "ar": "autoregressive language model",
    "mdlm": "masked diffusion language model (arXiv 2406.07524)",
}
LICENSE = "other"  # the hub's word for a licence that it has no word for
FIGURES = "none given: name them as figures.NAME=VALUE when exporting"


def card(
    name: str,
    model: ModelConfig,
    facts: DataFacts,
    parameters: int,
    figures: Mapping[str, Any],
    license_name: str,
    origin: str,
) -> str:
    """Model card in Markdown, with the header that the Hugging Face hub reads.

    Args:
        parameters: their number.
        figures: what was measured, by name.
        license_name: as the hub spells it; "other" leaves a line to fill in.
        origin: what the weights were made from, for people.
    """
    header = yaml.safe_dump(
        {
            "license": license_name,
            "library_name": "partition-pipeline",
            "tags": ["partition-generative-model", "discrete-diffusion", model.kind],
        },
        sort_keys=False,
    )
    section = model.model_dump(mode="json")
    sizes = {key: value for key, value in section.items() if key != "swap"} | section.get("swap", {})
    rows = {**sizes, "parameters": f"{parameters:,}", "vocabulary": facts.vocab_size, "length": facts.length}
    rows |= {
        key: value for key, value in (("BOS", facts.bos), ("end of text", facts.eot)) if value is not None
    }
    licence = (
        "To be filled in: say here, and in the header above, under which terms these weights may be used."
        if license_name == LICENSE
        else f"{license_name}."
    )
    return f"""---
{header}---
# {name}

A {KINDS.get(model.kind, model.kind)}. Made from {origin}.

{_table("size", rows)}

## Measured

{_table("figure", figures) if figures else FIGURES}

## Use

```python
from pipeline import load_model

model = load_model("{name}")  # this folder
model.sample(num_samples=4, steps={min(64, facts.length - 1)}, seed=0)
```

Logits cover ids 0..{facts.vocab_size - 1}. The loader reads `config.yaml`; `config.json` says the same to the hub.

## Upload

    hf auth login
    hf upload OWNER/{name} . --repo-type model    # in this folder

## Licence

{licence}
"""


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    return "\n".join(lines)
