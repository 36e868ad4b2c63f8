"""Parts of reports: what was run on which data, figures in groups, and what the papers report at the same size."""

from collections.abc import Mapping, Sequence

import yaml

from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.data.manifest import Manifest
from pipeline.reports.measures import HEAD, Group, cells
from pipeline.reports.page import Folded, Section, Table, Text
from pipeline.reports.published import SOURCE, published


def setting_sections(config: RunConfig, manifest: Manifest) -> list[Section]:
    """The data, and the config; without where things are kept, which is nobody's affair."""
    facts = {
        "source": manifest.source.name,
        "tokenizer": manifest.tokenizer.name,
        "vocabulary": f"{manifest.vocabulary:,}",
        "row length": f"{manifest.length:,}",
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}",
        "training rows": f"{manifest.rows('train'):,}",
        "validation rows": f"{manifest.rows('validation'):,}",
        "content": manifest.content_key[:12],
    }
    tree = config.model_dump(mode="json", exclude={"cluster", "tracking"})
    told = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return [
        Section("Data", [Table(["", ""], [[key, value] for key, value in facts.items()])]),
        Section("Config", [Folded("the whole config", told)]),
    ]


def figures_section(title: str, groups: Sequence[Group]) -> Section:
    """A table a group, under how it was measured."""
    blocks: list[Text | Table] = []
    for group in groups:
        blocks += [Text(group.heading), Table(HEAD, [cells(one) for one in group.measures])]
    return Section(title, blocks)


def paper_section(models: Mapping[str, ModelConfig], manifest: Manifest) -> Section:
    """What is published for models of these sizes.

    Args:
        models: the model section of each, by name.
        manifest: of the rows that they read.
    """
    length = manifest.length - (manifest.grid is not None)  # of images without BOS
    rows = [
        [name, row.name, row.data, figure, value]
        for name, section in models.items()
        for row in published(section, length)
        for figure, value in row.figures.items()
    ]
    if not rows:
        return Section("Beside the paper", [Text("The paper has no model of these sizes.")])
    head = ["model here", "in the paper", "its data", "figure", "value"]
    return Section("Beside the paper", [Text(f"Source: {SOURCE}."), Table(head, rows)])
