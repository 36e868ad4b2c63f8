"""Sections of reports: metrics in groups, data and config, and published results for models of the same size."""

from collections.abc import Mapping, Sequence

import yaml

from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.reports.measures import Group, measure_table
from pipeline.reports.page import Block, Folded, Section, Table, Text
from pipeline.reports.published import SOURCE, published
from pipeline.reports.tables import table_of


def setting_sections(config: RunConfig, manifest: Manifest) -> list[Section]:
    """Describe the data and the config, without the places where things are kept.

    Args:
        config: of the run.
        manifest: of its data.
    """
    facts = {
        "source": manifest.source.name,
        "tokenizer": manifest.tokenizer.name,
        "vocabulary": f"{manifest.vocabulary:,}",
        "row length": f"{manifest.length:,}",
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}",
        "training rows": f"{manifest.rows('train'):,}" if "train" in manifest.splits else "none",
        "validation rows": f"{manifest.rows('validation'):,}",
        "content": manifest.content_key[:12],
    }
    tree = config.model_dump(mode="json", exclude={"cluster", "tracking"})
    table = table_of({"property": key, "value": value} for key, value in facts.items())
    return [
        Section("Data", [Table(table)]),
        Section("Config", [Folded("all keys", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))]),
    ]


def metrics_section(title: str, groups: Sequence[Group]) -> Section:
    """Show a table per group, under how it was measured.

    Args:
        title: of the section.
        groups: of metrics.
    """
    blocks: list[Block] = []
    for group in groups:
        blocks += [Text(group.heading), Table(measure_table(group.measures))]
    return Section(title, blocks)


def paper_section(models: Mapping[str, ModelConfig], manifest: Manifest) -> Section:
    """Show what is published for models of these sizes.

    Args:
        models: model sections by name.
        manifest: of the rows that the models read.
    """
    length = manifest.length - (manifest.grid is not None)  # of images without BOS
    rows = [
        {"model": name, "in the paper": row.name, "its data": row.data, "metric": metric, "value": value}
        for name, section in models.items()
        for row in published(section, length)
        for metric, value in row.results.items()
    ]
    if not rows:
        return Section("Published results", [Text("The paper has no model of these sizes.")])
    return Section("Published results", [Text(f"Source: {SOURCE}."), Table(table_of(rows))])
