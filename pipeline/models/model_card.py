"""Write the README.md of an exported model: what it is, what was measured, how to load and to upload it."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config.model import ModelConfig
from pipeline.models.model_folder import DataFacts

KINDS = {
    "pgm": "partition generative model (arXiv 2505.18883)",
    "ar": "autoregressive language model",
    "mdlm": "masked diffusion language model (arXiv 2406.07524)",
}
LICENSE = "other"  # the hub's word for a licence that it has no word for
NO_LICENSE = (
    "To be filled in: say here, and in the header above, under which terms these weights may be used."
)
FIGURES = "none given: name them as figures.NAME=VALUE when exporting"


def card(
    name: str,
    model: ModelConfig,
    facts: DataFacts,
    parameters: int,
    figures: Mapping[str, Any],
    license_name: str,
    origin: str,
    repository: str | None = None,
) -> str:
    """Return a model card in Markdown, with the header that the Hugging Face hub reads.

    Args:
        name: name of the model, which is that of its folder.
        model: config of the model.
        facts: what the model knows about its data.
        parameters: number of parameters.
        figures: what was measured, by name.
        license_name: as the hub spells it; "other" leaves a line to fill in.
        origin: what the weights were made from, for people.
        repository: of the hub, OWNER/NAME, that the folder is uploaded to; None: the card says how to upload it.
    """
    name, upload = repository or name, ""
    if repository is None:
        upload = f"""
## Upload

    hf auth login
    hf upload OWNER/{name} . --repo-type model    # in this folder
"""
    tags = ["partition-generative-model", "discrete-diffusion", model.kind]
    header = {"license": license_name, "library_name": "partition-pipeline", "tags": tags}
    section = model.model_dump(mode="json")
    sizes = section | section.pop("swap", {})
    sizes |= {"parameters": f"{parameters:,}", "vocabulary": facts.vocab_size, "length": facts.length}
    special_ids = {"BOS": facts.bos, "end of text": facts.eot}
    sizes |= {key: value for key, value in special_ids.items() if value is not None}
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {name}

A {KINDS.get(model.kind, model.kind)}. Made from {origin}.

{_table("size", sizes)}

## Measured

{_table("figure", figures) if figures else FIGURES}

## Use

```python
from pipeline import load_model

model = load_model("{f"hf:{repository}" if repository else name}"){"" if repository else "  # this folder"}
model.sample(num_samples=4, steps={min(64, facts.length - 1)}, seed=0)
```

Logits cover ids 0..{facts.vocab_size - 1}. The loader reads `config.yaml`; `config.json` says the same to the hub.
{upload}
## Licence

{NO_LICENSE if license_name == LICENSE else f"{license_name}."}
"""


def _table(title: str, rows: Mapping[str, Any]) -> str:
    """Return a table in Markdown, one row for each key."""
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        cell = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {key.replace('_', ' ')} | {cell} |")
    return "\n".join(lines)
