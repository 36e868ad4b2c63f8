"""A page of text, tables, pictures and samples, written once and told twice: as HTML in one file, and as Markdown."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pipeline import storage
from pipeline.reports.figures import png

_SHOWN, _SHOWN_LENGTH = 3, 500  # texts of a column, and characters of one
HTML, MARKDOWN = "report.html", "report.md"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #e0e3e7 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { text-align: left; padding: 3px 10px; border-bottom: 1px solid #e8ebee; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } th { color: #5c646d; font-weight: 600 }
img { max-width: 100% } figure { margin: 1em 0 } figcaption { color: #5c646d; font-size: 13px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f8; padding: .6em .8em; margin: 0 }
pre { font-size: 12px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px }
.columns h3 { font-size: 13px; margin: 0 0 4px } details { margin: .5em 0 }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG; `name` is its file's, without the suffix."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Columns:
    """Texts side by side, each under a title."""

    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """A long text that is opened with a click."""

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
    """A whole report."""

    title: str
    sections: Sequence[Section]

    def to_html(self) -> str:
        """One file that needs nothing else: pictures are in it, and no address is."""
        parts = [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(self.title)}</h1>",
        ]
        for section in self.sections:
            parts.append(f"<h2>{html.escape(section.title)}</h2>")
            parts += [_html(block) for block in section.blocks]
        return "\n".join([*parts, "</body>\n</html>"]) + "\n"

    def to_markdown(self) -> str:
        """The same; its pictures are files beside it."""
        lines = [f"# {self.title}"]
        for section in self.sections:
            lines += ["", f"## {section.title}"]
            for block in section.blocks:
                lines += ["", *_markdown(block)]
        return "\n".join(lines) + "\n"

    def publish(self, into: str) -> list[str]:
        """Write both and the pictures into a folder; returns the files' names."""
        files = {HTML: self.to_html().encode(), MARKDOWN: self.to_markdown().encode()}
        files |= {
            f"{block.name}.png": block.png
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Picture)
        }
        for name, content in files.items():
            storage.publish_bytes(storage.join(into, name), content)
        return list(files)


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """A figure as a block."""
    return Picture(name, png(figure), caption)


def excerpt(texts: Sequence[str]) -> str:
    """The first texts, cut, for a column."""
    return "\n\n".join(text[:_SHOWN_LENGTH] for text in texts[:_SHOWN])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _html(block: Block) -> str:
    match block:
        case Text(words):
            return f"<p>{html.escape(words)}</p>"
        case Table(head, rows):
            lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
            lines += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
            return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
        case Picture(_, png, caption):
            data, told = base64.b64encode(png).decode(), html.escape(caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{told}">'
                f"<figcaption>{told}</figcaption></figure>"
            )
        case Columns(texts):
            cells = [
                f"<div><h3>{html.escape(title)}</h3><pre>{html.escape(text)}</pre></div>"
                for title, text in texts
            ]
            return '<div class="columns">\n' + "\n".join(cells) + "\n</div>"
        case Folded(title, text):
            return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def _cell(text: str) -> str:
    number = ' class="number"' if re.fullmatch(r"[-+]?[\d,.]+%?", text) else ""
    return f"<td{number}>{html.escape(text)}</td>"


def _markdown(block: Block) -> list[str]:
    match block:
        case Text(words):
            return [words]
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *rows]
            return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]
        case Picture(name, _, caption):
            return [f"![{caption}]({name}.png)"]
        case Columns(texts):
            parts = [[f"**{title}**", "", *_fenced(text)] for title, text in texts]
            return [line for part in parts for line in ([] if part is parts[0] else [""]) + part]
        case Folded(title, text):
            return [f"{title}:", "", *_fenced(text)]


def _fenced(text: str) -> list[str]:
    """Verbatim: a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]
