"""Every Markdown page that code, comments, configs or pages refer to exists."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted(
    file for folder in ("pipeline", "jobs", "tests", "cluster") for file in (ROOT / folder).rglob("*.py")
)
YAML = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "cluster").rglob("*.yaml")])
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAME = re.compile(r"[\w./-]*\w\.md\b")
WRITTEN = {"table.md", "report.md", "benchmark.md", "quality_against_steps.md"}  # files that jobs write


def notes(file: Path) -> Iterator[str]:
    """Comments of a YAML file; comments and docstrings of a Python file."""
    text = file.read_text("utf-8")
    if file.suffix == ".yaml":
        yield from re.findall(r"(?:^| )#.*", text, re.MULTILINE)
        return
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


def missing(file: Path) -> list[str]:
    """Pages that a file's notes name and that exist neither in the root of the repository nor beside the file."""
    named = {name for note in notes(file) for name in NAME.findall(note)} - WRITTEN
    return sorted(n for n in named if not ((ROOT / n).exists() or (file.parent / n).exists()))


@pytest.mark.parametrize("file", [*CODE, *YAML], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_pages_that_a_file_names_exist(file: Path) -> None:
    assert missing(file) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Links inside the repository, and file names in code."""
    text = page.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:pipeline|jobs|configs|cluster|tests|docs)/[\w./-]*\w\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_planted_reference_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""See docs/nowhere.md."""\nx = "not/a/note.md"  # and gone.md, README.md\n'
    )
    (tmp_path / "a.yaml").write_text("# see docs/nowhere.md\nkey: value # and docs/configuration.md\n")
    assert missing(tmp_path / "a.py") == ["docs/nowhere.md", "gone.md"]
    assert missing(tmp_path / "a.yaml") == ["docs/nowhere.md"]
