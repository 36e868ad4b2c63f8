"""A report of text, tables, pictures and samples, written as one HTML file and as Markdown."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from pipeline import storage
from pipeline.reports.figures import png
from pipeline.reports.tables import is_number, markdown

_EXCERPT_TEXTS, _EXCERPT_LENGTH = 3, 500  # texts of a column, and characters of each
HTML, MARKDOWN = "report.html", "report.md"


@dataclass(frozen=True)
class Text:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    table: pd.DataFrame


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, without the suffix.
        png: content of the file.
        caption: below the picture.
    """

    name: str
    png: bytes
    caption: str

    @property
    def base64(self) -> str:
        """Return the PNG as text."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Columns:
    """Texts side by side, as (title, text)."""

    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """A long text under a title, which opens it with a click."""

    title: str
    text: str


Block = Text | Table | Picture | Columns | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a title."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report: sections under a title."""

    title: str
    sections: Sequence[Section]

    def to_html(self) -> str:
        """Write one HTML file that contains its pictures and refers to no address."""
        return self._render("page.html.jinja")

    def to_markdown(self) -> str:
        """Write Markdown; pictures are files next to it."""
        return self._render("page.md.jinja")

    def publish(self, into: str) -> list[str]:
        """Write HTML, Markdown and the pictures into a folder.

        Args:
            into: folder or URL of one.

        Returns:
            Names of the files.
        """
        files = {HTML: self.to_html().encode(), MARKDOWN: self.to_markdown().encode()}
        blocks = [block for section in self.sections for block in section.blocks]
        files |= {f"{block.name}.png": block.png for block in blocks if isinstance(block, Picture)}
        for name, content in files.items():
            storage.publish_bytes(storage.join(into, name), content)
        return list(files)

    def _render(self, template: str) -> str:
        """Fill a template of this package in."""
        environment = templates()
        environment.tests["numeric"] = is_number
        environment.filters |= {"markdown": markdown, "fenced": _fenced}
        return environment.get_template(template).render(page=self)


def templates() -> Environment:
    """Make the environment of this package's templates; values in HTML are escaped."""
    return Environment(
        loader=PackageLoader("pipeline.reports", "."),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """Make a block of a figure.

    Args:
        name: of the PNG file, without the suffix.
        figure: to show.
        caption: below the figure.
    """
    return Picture(name, png(figure), caption)


def excerpt(texts: Sequence[str]) -> str:
    """Join the beginnings of the first texts, for a column.

    Args:
        texts: all texts.
    """
    return "\n\n".join(text[:_EXCERPT_LENGTH] for text in texts[:_EXCERPT_TEXTS])


def _fenced(text: str) -> str:
    """Put a fence around a text, longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
