"""Write the tables of configuration.md from the schema: python docs/configuration.py"""

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.reference import keys, sections, summary
from pipeline.config.schema import ExportConfig, ImportConfig, RunConfig
from pipeline.config.section import Section
from pipeline.config.sweep import SweepConfig

FILE = Path(__file__).with_suffix(".md")
MARK = "<!-- Everything below this line is written by docs/configuration.py. -->\n"
PARTS = {
    "Keys of a run": RunConfig,
    "Keys of a sweep": SweepConfig,
    "Keys of a benchmark": BenchmarkConfig,
    "Keys of jobs.convert for released files": ImportConfig,
    "Keys of jobs.convert for the model card": ExportConfig,
}


def table(title: str, section: type[Section], without: type[Section] = Section) -> Iterator[str]:
    """Yield the lines of a section's table, without the keys of another section."""
    if title:
        dotted, _, kind = title.partition(" ")
        yield f"\n### `{dotted}` {kind}".rstrip() + "\n"
    yield summary(section) + "\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, kind, default, meaning in keys(section):
        if name not in without.model_fields:
            shown = f"`{default}`" if default not in ("", "required") else default
            yield f"| `{name}` | {kind} | {shown} | {meaning} |".replace("p(x|c)", "p(x\\|c)")


def tables() -> Iterator[str]:
    """Yield the lines of all tables, each section type once."""
    written: set[type[Section]] = set()
    for heading, root in PARTS.items():
        yield f"\n## {heading}\n"
        for title, section in sections(root).items():
            (common,) = section.__bases__
            if common is not Section and common not in written:
                yield from table(f"{title.partition(' ')[0]} (all kinds)", common)
            if section not in written:
                yield from table(title, section, without=common)
            written |= {common, section}


def document() -> str:
    """Return the whole page: the introduction as it is, and the tables."""
    return FILE.read_text("utf-8").partition(MARK)[0] + MARK + "\n".join(tables()) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(), "utf-8")
