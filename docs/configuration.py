"""Write the tables of configuration.md from the schema: python docs/configuration.py"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import kinds_of
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
        found = sections(root)
        for title, section in found.items():
            dotted = title.partition(" ")[0]
            chain = [base for base in section.__mro__ if issubclass(base, Section)]
            for own, common in reversed([*pairwise(chain)]):
                if own in written:
                    continue
                written.add(own)
                yield from table(title if own is section else shared(dotted, own, found), own, without=common)


def shared(dotted: str, base: type[Section], found: Mapping[str, type[Section]]) -> str:
    """Return the title of the keys that several kinds of a section have in common."""
    own = [title for title in found if title.startswith(f"{dotted} ")]
    kinds = [kinds_of(found[title])[0] for title in own if issubclass(found[title], base)]
    return f"{dotted} (all kinds)" if len(kinds) == len(own) else f"{dotted} (kinds: {', '.join(kinds)})"


def document() -> str:
    """Return the whole page: the introduction as it is, and the tables."""
    return FILE.read_text("utf-8").partition(MARK)[0] + MARK + "\n".join(tables()) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(), "utf-8")
