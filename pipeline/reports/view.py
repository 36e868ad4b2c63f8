"""A page that shows step by step how a sampler revealed rows: one HTML file that loads nothing."""

import base64
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Integer, UInt8
from PIL import Image

from pipeline.data.tokenizers import Tokenizer
from pipeline.models.vq import ImageTokenizer
from pipeline.reports.page import templates

ROWS = 80  # of a page, at most
VIEW = "view.html"
_BYTES = 4  # of a character of UTF-8, at most: as many tokens may write it


@dataclass(frozen=True)
class Revealed:
    """Sampled rows, and the step that revealed each of their tokens.

    Attributes:
        rows: tokens, each row as long as it is shown.
        revealed_at: step of every token, from 1; 0 where it was given.
        steps: number of sampling steps.
        bos: id at position 0, which is not shown, or None.
        tokenizer: None: ids of rows that fill a square are shown as codes of a picture, and others as numbers.
        images: the first rows as pictures; None where nothing decodes them.
        names: of the rows; None: they have none.
    """

    rows: Collection[Integer[np.ndarray, "length"]]
    revealed_at: Int[np.ndarray, "n L"]
    steps: int
    bos: int | None = None
    tokenizer: Tokenizer | ImageTokenizer | None = None
    images: UInt8[np.ndarray, "m S S 3"] | None = None
    names: Sequence[str] | None = None

    def to_html(self, facts: Mapping[str, object]) -> str:
        """Write the page of the first rows.

        Args:
            facts: about the samples, for the head of the page; `model` is also its title.
        """
        start = int(self.bos is not None)
        lengths = {len(row) - start for row in self.rows}
        square = len(lengths) == 1 and math.isqrt(min(lengths)) ** 2 == min(lengths)
        shown = []
        for index, row in zip(range(ROWS), self.rows, strict=False):
            ids, steps = row[start:], self.revealed_at[index, start : len(row)].tolist()
            entry: dict[str, object] = {"at": steps, "name": self.names[index] if self.names else ""}
            if isinstance(self.tokenizer, Tokenizer):
                entry["pieces"] = pieces(ids, self.tokenizer.decode)
            elif square:
                entry["codes"] = ids.tolist()
            else:
                entry["pieces"] = [(f"{token} ", 1) for token in ids.tolist()]
            if self.images is not None:
                entry["picture"] = _png(self.images[index])
            shown.append(entry)
        pixels = 0 if self.images is None else self.images.shape[1]
        view = {"steps": self.steps, "rows": shown, "pixels": pixels}
        return templates().get_template("view.html.jinja").render(facts=facts, view=view)


def names_of(labels: Sequence[int] | None, class_names: Sequence[str] | None) -> list[str] | None:
    """Name rows by their classes.

    Args:
        labels: class of every row; None: rows have none.
        class_names: by label; None: the classes have no names.
    """
    if labels is None:
        return None
    return [class_names[label] if class_names else f"class {label}" for label in labels]


def pieces(
    ids: Integer[np.ndarray, "n"], decode: Callable[[Integer[np.ndarray, "m"]], str]
) -> list[tuple[str, int]]:
    """Split the text of a row into the parts that its tokens write.

    Tokens that write a character only together are one part.

    Args:
        ids: of the row.
        decode: of the tokenizer, which may write a token differently behind others.

    Returns:
        The texts, and the number of tokens that each stands for.
    """
    found, before, start = [], 0, 0  # the last part begins at `before`, the next one at `start`
    for end in range(1, len(ids) + 1):
        context, text = decode(ids[before:start]), decode(ids[before:end])
        if text.endswith("\ufffd") and end - start < _BYTES and end < len(ids):
            continue
        # Behind half a character, what was decoded before may change; the part is then decoded by itself.
        part = text[len(context) :] if text.startswith(context) else decode(ids[start:end])
        found.append((part, end - start))
        before, start = start, end
    return found


def _png(image: UInt8[np.ndarray, "S S 3"]) -> str:
    """Encode a picture as the text of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
