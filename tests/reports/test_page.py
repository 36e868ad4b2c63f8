"""Reports as pages: nothing from outside, nothing lost, nothing of a sample taken for markup."""

import re
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from matplotlib.figure import Figure

from pipeline.config.model import MDLMConfig, ModelConfig, PGMConfig, SwapConfig
from pipeline.reports.page import Columns, Folded, Page, Section, Table, Text, picture
from pipeline.reports.published import _figures, published
from pipeline.reports.tables import aligned
from tests.support.page_check import check_page

SAMPLE = "</pre><script src='http://x'></script> <img src=https://y/z.png> `code` ```fence``` & <b> | @import url(z)"


def page() -> Page:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return Page(
        "A <title>",
        [
            Section("First & last", [Text("a < b"), picture("curve", figure, 'said "so"')]),
            Section("Table", [Table(pd.DataFrame({"name": ["a|b", SAMPLE], "value": ["1.5", "-3"]}))]),
            Section("Samples", [Columns([("one", SAMPLE), ("two", "x\ny")]), Folded("config", SAMPLE)]),
        ],
    )


def test_html_is_one_file() -> None:
    pictures, text = check_page(page().to_html())
    assert [one.size for one in pictures] == [(200, 100)]
    assert text.count(SAMPLE) == 3
    assert "A <title>" in text
    assert '<td class="number">1.5</td>' in page().to_html()


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://x/y.png">',
        '<script>1</script>',
        '<link href="a.css">',
        '<p style="background: url(http://x)">a</p>',
        "<style>@import 'a.css'</style>",
        '<a href="http://x">a</a>',
        '<img src="data:image/png;base64,AAAA">',
    ],
)  # fmt: skip
def test_a_planted_address_is_found(planted: str) -> None:
    html = page().to_html().replace("</body>", planted + "</body>")
    with pytest.raises((AssertionError, OSError)):
        check_page(html)


def test_markdown_and_files(tmp_path: Path) -> None:
    names = page().publish(str(tmp_path))
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["curve.png"]
    assert "| a\\|b | 1.5 |" in text
    # Samples stand in fences that nothing in them closes.
    assert text.count(f"````\n{SAMPLE}\n````") == 2


def test_aligned() -> None:
    assert aligned(pd.DataFrame({"a": ["x", "longer"], "long": ["y", "z"]})).splitlines() == [
        "  a       long",
        "  x       y",
        "  longer  z",
    ]


def pgm_6_6(pooling: Literal["none", "mean", "logsumexp"]) -> PGMConfig:
    return PGMConfig(encoder_blocks=6, decoder_blocks=6, swap=SwapConfig(pooling=pooling))


@pytest.mark.parametrize(
    ("model", "length", "names"),
    [
        (PGMConfig(), 1024, ["PGM 8/8"]),
        (pgm_6_6("none"), 128, ["PGM 6/6"]),
        (PGMConfig(hidden=1024, heads=16, encoder_blocks=6, decoder_blocks=6), 1024, ["PGM 6/6, H 1024"]),
        (MDLMConfig(kind="mdlm"), 1024, ["MDLM"]),
        (MDLMConfig(kind="mdlm", complementary=True), 128, ["complementary MDLM"]),
        (MDLMConfig(kind="mdlm", hidden=1024, heads=16, blocks=24, classes=1000), 1024, ["MaskGIT"]),
        (MDLMConfig(kind="mdlm", hidden=1024, heads=16, blocks=24), 1024, []),
        (PGMConfig(), 128, []),
        (pgm_6_6("mean"), 128, ["PGM 6/6, mean"]),
        (pgm_6_6("logsumexp"), 128, ["PGM 6/6, logsumexp"]),
        (PGMConfig(hidden=384), 1024, []),
    ],
)
def test_published_figures_of_the_same_size(model: ModelConfig, length: int, names: list[str]) -> None:
    assert [row.name for row in published(model, length)] == names


def test_published_figures_are_those_of_the_method_page() -> None:
    """Every number of docs/method.md, section 8, stands in the file, and no other."""
    page = (Path(__file__).parents[2] / "docs/method.md").read_text()
    section = page.split("## 8 Published figures")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|")[1:] for line in section.splitlines() if re.match(r"\| [^-|]", line)]
    listed = {cell.strip() for row in cells for cell in row if re.fullmatch(r" [\d,.]+M? ", cell)}
    listed -= {"32", "64", "128", "1", "2", "3"}  # steps and weights of guidance
    values = {part.strip("()") for *_, value in _figures() for part in value.split(" ")}
    assert values == listed
