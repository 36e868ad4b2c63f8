"""What a self-contained HTML page must be."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

_POINTING = {
    "src",
    "href",
    "srcset",
    "data",
    "action",
    "poster",
    "background",
    "cite",
    "formaction",
    "xlink:href",
}
_VOID = {"meta", "img", "br", "hr", "input"}


class _Page(HTMLParser):
    """Collects addresses, styles, pictures and texts; complains about tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name in _POINTING:
                self.addresses.append(value or "")
            if name == "style":
                self.styles.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.styles if self._open[-1:] == ["style"] else self.texts).append(data)

    def close(self) -> None:
        super().close()
        assert not self._open


def check_page(html: str) -> tuple[list[Image.Image], str]:
    """The decoded pictures and the text of a page that needs nothing from outside."""
    page = _Page()
    page.feed(html)
    page.close()
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not any(re.search(r"url\s*\(|@import", style, re.I) for style in page.styles)
    pictures = []
    for address in page.addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64", address[:80]
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        picture.load()
        pictures.append(picture)
    return pictures, "\n".join(page.texts)
