"""docs/configuration.md and `--help`: every key of the schema, with a description."""

import runpy
from pathlib import Path

import pytest

from jobs.cli import key_list
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import sections_in
from pipeline.config.reference import descriptions, keys, sections
from pipeline.config.schema import ExportConfig, ImportConfig, RunConfig
from pipeline.config.section import Section
from pipeline.config.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
CONFIGS = [RunConfig, SweepConfig, BenchmarkConfig, ImportConfig, ExportConfig]
SECTIONS = {section for config in CONFIGS for section in sections(config).values()}


def test_the_page_is_up_to_date() -> None:
    document = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["document"]
    assert document() == (ROOT / "docs" / "configuration.md").read_text("utf-8"), (
        "python docs/configuration.py"
    )


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda section: section.__name__))
def test_every_key_is_described_and_nothing_else(section: type[Section]) -> None:
    undescribed = section.model_fields.keys() - descriptions(section).keys()
    assert all(sections_in(section.model_fields[name].annotation) for name in undescribed)
    assert descriptions(section).keys() <= section.model_fields.keys()
    for name, kind, _, meaning in keys(section):
        assert kind, name
        assert meaning.endswith("."), f"{name}: a sentence ends with a full stop"
        assert meaning[0].isupper() or meaning[0] == "`", f"{name}: {meaning}"


def test_a_row_of_every_sort() -> None:
    rows = {
        f"{title}.{name}": (kind, default)
        for title, section in sections(RunConfig).items()
        for name, kind, default, _ in keys(section)
    }
    assert rows[".name"] == ("string", "required")
    assert rows["train.batch"] == ("int > 0", "512")
    assert rows["train.ema"] == ("float >= 0, < 1", "0.9999")
    assert rows["train.precision"] == ("fp32, bf16", "bf16")
    assert rows["sampling.top_p"] == ("float > 0, <= 1 or null", "null")
    assert rows["optim.betas"] == ("list of float >= 0, < 1", "[0.9, 0.999]")
    assert rows["cluster.workers"] == ("int > 0 or section", "1")
    assert rows["cluster.workers.max"] == ("int > 0", "required")
    assert rows["evaluation.models"] == ("mapping", "{}")
    assert rows["model (kind: mdlm).blocks"] == ("int > 0", "12")
    assert rows["data (kind: image).flip"] == ("bool", "false")
    assert rows["distill.teacher"] == ("string", "required")


def test_help_lists_all_keys() -> None:
    text = key_list(RunConfig)
    for title, section in sections(RunConfig).items():
        assert f"\n{title or 'top level'}\n" in text
        for name, kind, _, _ in keys(section):
            assert kind == "section" or f"\n  {name} " in text
