"""Draw the diagrams of the documentation as SVG files.

Run it from any folder; it rewrites `docs/images/*.svg`. A test compares the committed files with what this
script draws, byte for byte.

    python docs/diagrams.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
Point = tuple[float, float]

INK, SOFT, LINE, PAPER, BORDER = "#1f2328", "#57606a", "#57606a", "#ffffff", "#d0d7de"


@dataclass(frozen=True)
class Style:
    """Colours of a box and of the text in it."""

    fill: str
    stroke: str
    ink: str = INK
    dash: str = ""


GROUP_0 = Style("#dbeafe", "#2563eb", "#1e3a8a")
GROUP_1 = Style("#ffedd5", "#ea580c", "#7c2d12")
MASK = Style("#e5e7eb", "#8c959f", "#424a53")
EMPTY = Style("none", "#afb8c1", SOFT, "3 3")
NOTHING = Style("none", "none")
QUERY = Style("#ffffff", "#ea580c", "#7c2d12", "4 3")
BLOCK = Style("#f6f8fa", "#57606a")
FILES = Style("#e6f6ec", "#1a7f37", "#0f4d22")
TRACKING = Style("#f3ecff", "#8250df", "#4a2a8a")
FAILURE = Style("#ffebe9", "#cf222e", "#82071e")
GROUPS = (GROUP_0, GROUP_1)

# Widths in em of the characters of a wide sans-serif font: text that fits by these fits in other fonts too.
_NARROW, _SLIM, _WIDE = "ijl.,:;'|!", 'frtI()[]{}/ "-', "mwMW@%"


def width_of(text: str, size: float, bold: bool = False) -> float:
    """Return an upper estimate of the width of a line of text, in pixels."""
    total = 0.0
    for character in text:
        if character in _NARROW:
            total += 0.33
        elif character in _SLIM:
            total += 0.41
        elif character in _WIDE:
            total += 0.95
        elif character.isupper():
            total += 0.72
        else:
            total += 0.62
    return total * size * (1.1 if bold else 1.0)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{round(value, 2):g}"


class Drawing:
    """An SVG picture on a light card, readable on light and on dark pages.

    Args:
        width: in pixels.
        height: in pixels.
        title: for people who cannot see the picture.
    """

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
        ]
        self.rect(0.5, 0.5, width - 1, height - 1, Style(PAPER, BORDER), radius=10)

    def rect(self, x: float, y: float, w: float, h: float, style: Style, radius: float = 5) -> None:
        """Draw a rectangle with round corners."""
        dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
        self._parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" '
            f'rx="{number(radius)}" fill="{style.fill}" stroke="{style.stroke}"{dash}/>'
        )

    def text(
        self,
        at: Point,
        line: str,
        size: float = 13,
        bold: bool = False,
        ink: str = INK,
        anchor: str = "middle",
    ) -> None:
        """Write a line of text whose baseline starts, ends or has its middle at a point.

        Raises:
            ValueError: the text leaves the picture.
        """
        wide = width_of(line, size, bold)
        left = at[0] - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        if left < 4 or left + wide > self.width - 4 or not size * 0.8 < at[1] < self.height - 3:
            raise ValueError(f"text {line!r} at {at} leaves the picture of {self.width} x {self.height}")
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{number(at[0])}" y="{number(at[1])}" font-size="{number(size)}" fill="{ink}" '
            f'text-anchor="{anchor}"{weight}>{escape(line)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        lines: Sequence[str],
        style: Style = BLOCK,
        size: float = 13,
    ) -> None:
        """Draw a box with centred lines of text; the first of several is bold.

        Raises:
            ValueError: the text does not fit in the box.
        """
        self.rect(x, y, w, h, style)
        small = size - 1.5
        sizes = [size] + [small] * (len(lines) - 1)
        bold = [len(lines) > 1] + [False] * (len(lines) - 1)
        gap = 1.35
        total = sum(sizes) + small * (gap - 1) * (len(lines) - 1)
        if total > h - 4:
            raise ValueError(f"{len(lines)} lines do not fit in a box of height {h}: {lines}")
        baseline = y + (h - total) / 2 - 0.12 * size
        for line, line_size, heavy in zip(lines, sizes, bold, strict=True):
            if width_of(line, line_size, heavy) > w - 6:
                raise ValueError(f"{line!r} does not fit in a box of width {w}")
            baseline += line_size
            self.text((x + w / 2, baseline), line, line_size, heavy, style.ink)
            baseline += small * (gap - 1)

    def line(self, points: Sequence[Point], color: str = LINE, dash: str = "", width: float = 1.6) -> None:
        """Draw a line through points."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{number(width)}"{dashed}/>'
        )

    def arrow(self, points: Sequence[Point], color: str = LINE, dash: str = "", width: float = 1.6) -> None:
        """Draw a line through points with a head at its end."""
        (x0, y0), (x1, y1) = points[-2], points[-1]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        base_x, base_y = x1 - 8 * dx, y1 - 8 * dy
        self.line([*points[:-1], (base_x, base_y)], color, dash, width)
        corners = [(x1, y1), (base_x - 4 * dy, base_y + 4 * dx), (base_x + 4 * dy, base_y - 4 * dx)]
        path = " ".join(f"{number(x)},{number(y)}" for x, y in corners)
        self._parts.append(f'<polygon points="{path}" fill="{color}"/>')

    def tokens(
        self,
        x: float,
        y: float,
        words: Sequence[tuple[str, Style]],
        w: float = 54,
        h: float = 27,
        gap: float = 5,
        size: float = 13,
    ) -> list[float]:
        """Draw a row of token boxes.

        Returns:
            The middle of every box on the x axis.
        """
        middles = []
        for index, (word, style) in enumerate(words):
            left = x + index * (w + gap)
            if word:
                self.box(left, y, w, h, [word], style, size)
            else:
                self.rect(left, y, w, h, style)
            middles.append(left + w / 2)
        return middles

    def svg(self) -> str:
        """Return the picture as text."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def pgm_and_masked() -> str:
    """Draw what a PGM computes in training and sampling, beside a masked model."""
    d = Drawing(
        880,
        520,
        "A masked model learns from the masked positions and computes all positions at every sampling step; "
        "a PGM learns from every position and computes known tokens and queried positions only",
    )
    words = ["the", "cat", "sat", "on", "the", "mat"]
    left, right, wide = 122, 508, 349
    d.text((left + wide / 2, 30), "Masked model", 16, bold=True)
    d.text((right + wide / 2, 30), "Partition Generative Model", 16, bold=True)
    d.line([(12, 44), (868, 44)], BORDER, width=1)
    d.line([(12, 342), (868, 342)], BORDER, width=1)
    d.line([(490, 16), (490, 504)], BORDER, width=1)
    d.text((14, 176), "Training", 14, bold=True, anchor="start")
    d.text((14, 404), "One step", 14, bold=True, anchor="start")
    d.text((14, 422), "of sampling", 14, bold=True, anchor="start")

    # Training, masked model: three of six positions are hidden, and predicted.
    hidden = {1, 3, 5}
    middles = d.tokens(
        left, 58, [("[M]", MASK) if i in hidden else (word, BLOCK) for i, word in enumerate(words)]
    )
    for x in middles:
        d.arrow([(x, 85), (x, 124)])
    d.box(left, 124, wide, 100, ["Transformer", "reads all 6 positions, masks included"])
    for i in sorted(hidden):
        d.arrow([(middles[i], 224), (middles[i], 264)])
    d.tokens(left, 264, [(word, FILES) if i in hidden else ("", EMPTY) for i, word in enumerate(words)])
    d.text((left + wide / 2, 323), "learns from 3 of 6 positions", 14, ink=FILES.ink, bold=True)

    # Training, PGM: each group is encoded alone, and predicts the other.
    middles = d.tokens(right, 58, [(word, GROUPS[i % 2]) for i, word in enumerate(words)])
    ends = {i: right + 181 * (i % 2) + 34 + 50 * (i // 2) for i in range(6)}
    for i, x in enumerate(middles):
        d.arrow([(x, 85), (ends[i], 124)], GROUPS[i % 2].stroke, width=1.3)
        d.arrow([(ends[i], 224), (x, 264)], GROUPS[i % 2].stroke, width=1.3)
    d.box(right, 124, 168, 34, ["encode the, sat, the"], GROUP_0)
    d.box(right + 181, 124, 168, 34, ["encode cat, on, mat"], GROUP_1)
    d.arrow([(right + 84, 158), (right + 265, 190)], GROUP_0.stroke, width=2)
    d.arrow([(right + 265, 158), (right + 84, 190)], GROUP_1.stroke, width=2)
    d.box(right, 190, 168, 34, ["predict positions 0, 2, 4"], GROUP_0, 12.5)
    d.box(right + 181, 190, 168, 34, ["predict positions 1, 3, 5"], GROUP_1, 12.5)
    d.tokens(right, 264, [(word, FILES) for word in words])
    d.text((right + wide / 2, 323), "learns from 6 of 6 positions", 14, ink=FILES.ink, bold=True)

    # Sampling: two tokens are known, one more is drawn.
    known, drawn = {0, 2}, 5
    result = [(word, FILES) if i == drawn else ("", EMPTY) for i, word in enumerate(words)]
    middles = d.tokens(
        left, 358, [(word, BLOCK) if i in known else ("[M]", MASK) for i, word in enumerate(words)]
    )
    for x in middles:
        d.arrow([(x, 385), (x, 406)])
    d.box(left, 406, wide, 30, ["transformer over all 6 positions"])
    d.arrow([(middles[drawn], 436), (middles[drawn], 457)])
    d.tokens(left, 457, result)
    d.text((left + wide / 2, 507), "computes 6 positions", 14, ink=FILES.ink, bold=True)
    shown = [
        (word, GROUP_0) if i in known else ("?", QUERY) if i == drawn else ("", EMPTY)
        for i, word in enumerate(words)
    ]
    middles = d.tokens(right, 358, shown)
    for i in (0, 2):
        d.arrow([(middles[i], 385), (middles[i], 406)], GROUP_0.stroke)
    d.arrow([(middles[drawn], 385), (middles[drawn], 406)], GROUP_1.stroke)
    d.box(right, 406, wide, 30, ["encode 2 known tokens, decode 1 position"])
    d.arrow([(middles[drawn], 436), (middles[drawn], 457)])
    d.tokens(right, 457, result)
    d.text((right + wide / 2, 507), "computes 3 positions", 14, ink=FILES.ink, bold=True)
    return d.svg()


def partition_transformer() -> str:
    """Draw the partition transformer: encoder inside the groups, GroupSwap, decoder, head."""
    d = Drawing(
        880,
        578,
        "Partition transformer: each group is encoded alone; GroupSwap and the decoder read the encoder outputs "
        "of the other group; the head predicts every position from the tokens of the other group",
    )
    columns = (
        (28, GROUP_0, [("the", 0), ("sat", 2), ("the", 4)]),
        (532, GROUP_1, [("cat", 1), ("on", 3), ("mat", 5)]),
    )
    wide = 320
    for side, (x, style, words) in enumerate(columns):
        middle = x + wide / 2
        d.text((middle, 30), f"Group {side}", 16, bold=True, ink=style.ink)
        d.tokens(x + 71, 44, [(word, style) for word, _ in words], 54, 28, 8)
        for index, (_, position) in enumerate(words):
            d.text((x + 98 + 62 * index, 87), f"position {position}", 10.5, ink=SOFT)
        d.arrow([(middle, 94), (middle, 112)], style.stroke)
        d.box(x, 112, wide, 58, ["Encoder blocks", "self-attention within the group, then MLP"], style)
        d.arrow([(middle, 170), (middle, 190)], style.stroke)
        d.box(x, 190, wide, 30, ["encoder outputs: one vector per token"], style, 12.5)
        positions = ", ".join(str(position) for _, position in words)
        d.box(
            x,
            288,
            wide,
            66,
            [
                "GroupSwap",
                f"one query for each of the positions {positions}:",
                "learned vector + position code, no token",
            ],
        )
        d.arrow([(middle, 354), (middle, 378)])
        d.box(x, 378, wide, 58, ["Decoder blocks", "cross-attention, then MLP; no self-attention"])
        d.arrow([(middle, 436), (middle, 460)])
        d.box(x, 460, wide, 30, ["final norm + head: logits over V tokens"], BLOCK, 12.5)
        d.arrow([(middle, 490), (middle, 510)])
        d.tokens(x + 71, 510, [(word, FILES) for word, _ in words], 54, 28, 8)
        d.text((middle, 561), f"group {side} predicted from group {1 - side}", 13, ink=FILES.ink, bold=True)
    # Keys and values cross over, once for the swap and once for every decoder block.
    d.line([(692, 220), (692, 240), (386, 264), (386, 407)], GROUP_1.stroke, width=2)
    d.arrow([(386, 321), (348, 321)], GROUP_1.stroke, width=2)
    d.arrow([(386, 407), (348, 407)], GROUP_1.stroke, width=2)
    d.line([(188, 220), (188, 240), (494, 264), (494, 407)], GROUP_0.stroke, width=2)
    d.arrow([(494, 321), (532, 321)], GROUP_0.stroke, width=2)
    d.arrow([(494, 407), (532, 407)], GROUP_0.stroke, width=2)
    d.text((440, 330), "keys and", 12, ink=SOFT)
    d.text((440, 346), "values of", 12, ink=SOFT)
    d.text((440, 362), "the other", 12, ink=SOFT)
    d.text((440, 378), "group", 12, ink=SOFT)
    d.text((440, 137), "same weights for", 12, ink=SOFT)
    d.text((440, 153), "both groups", 12, ink=SOFT)
    return d.svg()


def _matrix(
    d: Drawing,
    at: Point,
    cell: float,
    queries: Sequence[tuple[int, Style]],
    keys: Sequence[tuple[int, Style]],
) -> None:
    """Draw which keys (columns) each query (row) sees: query segment i sees key segment i."""
    x, y = at
    total_q, total_k = sum(n for n, _ in queries), sum(n for n, _ in keys)
    d.rect(x, y, total_k * cell, total_q * cell, Style("#ffffff", BORDER), radius=0)
    top, left = y, x
    for (rows, row_style), (columns, column_style) in zip(queries, keys, strict=True):
        d.rect(x - 9, top + 1, 6, rows * cell - 2, Style(row_style.stroke, row_style.stroke), radius=1)
        d.rect(
            left + 1, y - 9, columns * cell - 2, 6, Style(column_style.stroke, column_style.stroke), radius=1
        )
        for i in range(rows):
            for j in range(columns):
                d.rect(
                    left + j * cell + 1, top + i * cell + 1, cell - 2, cell - 2, Style("#8c959f", "none"), 1
                )
        top, left = top + rows * cell, left + columns * cell


def segments() -> str:
    """Draw how tokens are sorted by group and packed, and who attends to whom in training and sampling."""
    d = Drawing(
        900,
        588,
        "Tokens of every row are sorted by group and packed along one axis; the encoder attends inside segments, "
        "GroupSwap and decoder from each segment to that of the other group; sampling uses the same form",
    )
    groups = [[0, 1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 1, 1, 0, 1, 1]]
    names = ["a", "b"]

    d.text((24, 30), "1. Rows of tokens, each in group 0 or 1", 14, bold=True, anchor="start")
    for row, members in enumerate(groups):
        y = 46 + row * 36
        d.text((24, y + 18), f"row {names[row]}", 12.5, ink=SOFT, anchor="start")
        d.tokens(80, y, [(f"{names[row]}{i}", GROUPS[g]) for i, g in enumerate(members)], 34, 26, 4, 12)
    d.rect(560, 58, 16, 16, GROUP_0, 3)
    d.text((584, 71), "group 0", 12.5, anchor="start")
    d.rect(660, 58, 16, 16, GROUP_1, 3)
    d.text((684, 71), "group 1, hidden at time t", 12.5, anchor="start")
    d.text(
        (560, 100), "Letter: row. Digit: position in the row. Rotary codes", 11.5, ink=SOFT, anchor="start"
    )
    d.text((560, 116), "use it, so sorting changes no result.", 11.5, ink=SOFT, anchor="start")

    d.text(
        (24, 150), "2. Sorted by group and packed along one axis: 4 segments", 14, bold=True, anchor="start"
    )
    x = 80.0
    packed: list[tuple[int, Style]] = []
    for row, members in enumerate(groups):
        for group in (0, 1):
            places = [i for i, g in enumerate(members) if g == group]
            d.tokens(x, 166, [(f"{names[row]}{i}", GROUPS[group]) for i in places], 34, 26, 2, 12)
            end = x + 36 * len(places) - 2
            d.line([(x, 198), (x, 203), (end, 203), (end, 198)], SOFT, width=1.2)
            d.text(((x + end) / 2, 218), f"{len(places)} tokens", 11.5, ink=SOFT)
            packed.append((len(places), GROUPS[group]))
            x = end + 14

    swapped = [packed[1], packed[0], packed[3], packed[2]]
    d.text((24, 256), "3. Training", 14, bold=True, anchor="start")
    cell = 13.0
    d.text((150, 284), "Encoder", 13, bold=True)
    d.text((150, 300), "74 of 128 pairs within rows", 11.5, ink=SOFT)
    _matrix(d, (46, 324), cell, packed, packed)
    d.text((412, 284), "GroupSwap and decoder", 13, bold=True)
    d.text((412, 300), "54 of 128 pairs within rows", 11.5, ink=SOFT)
    _matrix(d, (308, 324), cell, swapped, packed)
    d.text(
        (282, 559),
        "Rows: queries. Columns: keys. Segment i of the queries reads segment i of the keys.",
        11.5,
        ink=SOFT,
    )
    d.line([(556, 244), (556, 572)], BORDER, width=1)

    d.text((574, 256), "4. Sampling", 14, bold=True, anchor="start")
    known, queried = [(5, GROUP_0), (2, GROUP_0)], [(2, GROUP_1), (3, GROUP_1)]
    d.text((652, 284), "Encoder", 13, bold=True)
    d.text((652, 300), "known tokens", 11.5, ink=SOFT)
    _matrix(d, (606, 324), cell, known, known)
    d.text((800, 284), "GroupSwap, decoder", 13, bold=True)
    d.text((800, 300), "positions of this step", 11.5, ink=SOFT)
    _matrix(d, (754, 324), cell, queried, known)
    for index, line in enumerate(
        (
            "Row a has K = 5 known tokens and Q = 2 queried",
            "positions, row b has K = 2 and Q = 3. Unknown",
            "positions that are not queried cost nothing.",
            "Rows of different lengths need no padding.",
        )
    ):
        d.text((574, 452 + 18 * index), line, 12, anchor="start")
    return d.svg()


def data_flow() -> str:
    """Draw how data and models flow from sources to shards, checkpoints, figures and students."""
    d = Drawing(
        920,
        446,
        "Data flow: text and images are prepared as token shards, pretraining reads shards and writes checkpoints "
        "and a model folder, which evaluation, sampling and distillation read; MLflow records all of it",
    )
    d.box(20, 70, 116, 46, ["Text", "files or a hub"], FILES, 13)
    d.box(20, 192, 116, 46, ["Images", "files or a hub"], FILES, 13)
    d.box(164, 62, 128, 62, ["tokenise, pack", "Ray Data", "jobs.prepare"], BLOCK, 12.5)
    d.box(164, 184, 128, 62, ["crop, VQ encode", "Ray Data actors", "jobs.prepare"], BLOCK, 12.5)
    d.arrow([(136, 93), (164, 93)])
    d.arrow([(136, 215), (164, 215)])
    d.box(322, 118, 108, 72, ["Shards", "Parquet rows +", "manifest.json"], FILES, 13)
    d.arrow([(292, 93), (307, 93), (307, 142), (322, 142)])
    d.arrow([(292, 215), (307, 215), (307, 166), (322, 166)])
    d.box(460, 112, 124, 84, ["Pretraining", "Ray Train +", "DeepSpeed ZeRO", "jobs.pretrain"], BLOCK, 13)
    d.arrow([(430, 154), (460, 154)])
    d.box(614, 118, 108, 72, ["Model", "checkpoints,", "model folder"], FILES, 13)
    d.arrow([(584, 154), (614, 154)])
    # What reads a model.
    d.box(766, 40, 134, 46, ["Evaluation", "jobs.evaluate"], BLOCK, 13)
    d.box(766, 131, 134, 46, ["Sampling", "jobs.sample"], BLOCK, 13)
    d.box(766, 222, 134, 46, ["Distillation", "jobs.distill"], BLOCK, 13)
    d.arrow([(722, 154), (766, 154)])
    d.arrow([(744, 154), (744, 63), (766, 63)])
    d.arrow([(744, 154), (744, 245), (766, 245)])
    d.line([(833, 268), (833, 290), (668, 290)])
    d.arrow([(668, 290), (668, 190)])
    d.text((744, 284), "students", 11.5, ink=SOFT)
    d.text((833, 103), "tables, figures", 11.5, ink=SOFT)
    d.text((833, 194), "text, images", 11.5, ink=SOFT)
    # Sweeps start pretraining runs; distillation reads shards too.
    d.box(460, 32, 124, 46, ["Sweep", "jobs.sweep"], BLOCK, 13)
    d.arrow([(522, 78), (522, 112)])
    d.text((530, 100), "variants", 11.5, ink=SOFT, anchor="start")
    d.line([(376, 190), (376, 316), (876, 316)])
    d.arrow([(876, 316), (876, 268)])
    d.text((640, 310), "rows, also for evaluation", 11.5, ink=SOFT)
    # MLflow below all.
    d.rect(20, 350, 880, 78, TRACKING, 8)
    d.text((34, 372), "MLflow", 14, bold=True, ink=TRACKING.ink, anchor="start")
    for index, words in enumerate(
        (
            ["one run", "continued by restarts"],
            ["dataset input", "name, hash, rows"],
            ["metrics, samples", "kept over an outage"],
            ["child run per trial", "of a sweep"],
            ["registered models", "alias teacher"],
        )
    ):
        d.box(34 + index * 172, 382, 160, 38, words, Style("#ffffff", TRACKING.stroke, TRACKING.ink), 12)
    d.arrow([(522, 196), (522, 350)], TRACKING.stroke, "4 3")
    d.text((530, 340), "every job logs", 11.5, ink=SOFT, anchor="start")
    return d.svg()


def run_life() -> str:
    """Draw the life of a run: job, Ray, workers, checkpoints, a failure and a restart, the finished model."""
    d = Drawing(
        940,
        420,
        "Life of a run: the job checks the config and prepares data, Ray Train starts workers, workers resume and "
        "train and save checkpoints, a failure restarts the group, and the finished model is registered",
    )
    lanes = ("Job (driver)", "Ray Train", "Workers", "Run folder", "MLflow")
    tops = (20, 98, 176, 254, 332)
    for name, y in zip(lanes, tops, strict=True):
        d.rect(12, y, 916, 70, Style("#f6f8fa", BORDER), 6)
        d.text((22, y + 40), name, 13, bold=True, anchor="start")
    job, ray, worker, folder, mlflow = (y + 11 for y in tops)
    d.box(128, job, 124, 48, ["check", "config, resources"], BLOCK, 12.5)
    d.box(268, job, 116, 48, ["prepare data", "if it is missing"], BLOCK, 12.5)
    d.box(776, job, 140, 48, ["finish", "consolidate, register"], BLOCK, 12.5)
    d.arrow([(252, job + 24), (268, job + 24)])
    d.box(330, ray, 104, 48, ["start group", "W workers"], BLOCK, 12.5)
    d.box(560, ray, 112, 48, ["restart group", "W may change"], BLOCK, 12.5)
    d.arrow([(350, job + 48), (350, ray)])
    d.box(330, worker, 104, 48, ["begin", "or resume"], BLOCK, 11.5)
    d.box(446, worker, 74, 48, ["train", "steps"], BLOCK, 12.5)
    d.box(532, worker, 62, 48, ["worker", "lost"], FAILURE, 12)
    d.box(626, worker, 72, 48, ["resume", "step 500"], BLOCK, 12.5)
    d.box(710, worker, 74, 48, ["train", "to the end"], BLOCK, 12)
    d.arrow([(382, ray + 48), (382, worker)])
    d.arrow([(434, worker + 24), (446, worker + 24)])
    d.arrow([(520, worker + 24), (532, worker + 24)])
    d.arrow([(580, worker), (580, ray + 48)], FAILURE.stroke)
    d.arrow([(650, ray + 48), (650, worker)])
    d.arrow([(698, worker + 24), (710, worker + 24)])
    d.arrow([(784, worker + 24), (846, worker + 24), (846, job + 48)])
    # Checkpoints and what reads them.
    d.box(128, folder, 168, 48, ["config.yaml, run.json", "written at the start"], FILES, 12)
    d.box(446, folder, 88, 48, ["checkpoint", "step 500"], FILES, 12)
    d.box(704, folder, 86, 48, ["checkpoint", "step 1000"], FILES, 12)
    d.box(806, folder, 110, 48, ["model/", "safetensors + yaml"], FILES, 11.5)
    d.arrow([(483, worker + 48), (483, folder)], FILES.stroke)
    d.arrow([(534, folder + 24), (662, folder + 24), (662, worker + 48)], FILES.stroke)
    d.arrow([(747, worker + 48), (747, folder)], FILES.stroke)
    d.arrow([(880, job + 48), (880, folder)], FILES.stroke)
    d.box(128, mlflow, 168, 48, ["run opened", "params, dataset input"], TRACKING, 12.5)
    d.box(
        446,
        mlflow,
        344,
        48,
        ["metrics, samples, pictures", "same run after every restart; delivered later after an outage"],
        TRACKING,
        12,
    )
    d.box(806, mlflow, 110, 48, ["model version", "alias teacher"], TRACKING, 12)
    return d.svg()


def batch_life() -> str:
    """Draw the life of a batch: shards, streams, global batch, micro-batches, groups, segments, loss, update."""
    d = Drawing(
        940,
        452,
        "Life of a batch: permuted shards are cut into streams, a global batch takes rows of every stream, workers "
        "serve streams in micro-batches, times and groups are drawn, segments are packed, losses are summed",
    )
    shades = ("#cfe3ff", "#ffe1bf", "#d3f0dc", "#e9dcff")
    edges = ("#2563eb", "#ea580c", "#1a7f37", "#8250df")
    d.text((24, 30), "1. Shards, permuted by (seed, epoch)", 13.5, bold=True, anchor="start")
    for index, shard in enumerate((3, 0, 5, 1, 4, 2)):
        d.box(24 + index * 46, 44, 42, 34, [f"{shard}"], FILES, 13)
    d.text((24, 98), "Parquet files of token rows [L]", 11.5, ink=SOFT, anchor="start")
    d.arrow([(304, 61), (344, 61)])

    d.text((352, 30), "2. C streams of equal length", 13.5, bold=True, anchor="start")
    for stream in range(4):
        y = 42 + stream * 21
        for row in range(12):
            style = Style(shades[stream], edges[stream]) if row in (4, 5) else Style("#f6f8fa", "#c4cad1")
            d.rect(352 + row * 17, y, 15, 16, style, 2)
    d.text((352, 144), "rows are shuffled in windows", 11.5, ink=SOFT, anchor="start")
    d.arrow([(560, 82), (604, 82)])

    d.text((612, 30), "3. Global batch: batch / C rows a stream", 13.5, bold=True, anchor="start")
    for stream in range(4):
        for row in range(2):
            style = Style(shades[stream], edges[stream])
            d.box(612 + (2 * stream + row) * 38, 48, 34, 30, [f"{2 * stream + row}"], style, 13)
    d.line([(612, 84), (612, 89), (760, 89), (760, 84)], SOFT, width=1.2)
    d.line([(764, 84), (764, 89), (912, 89), (912, 84)], SOFT, width=1.2)
    d.text((686, 105), "worker 0", 12)
    d.text((838, 105), "worker 1", 12)
    d.text((612, 126), "The rows are the same for 1 to C workers.", 11.5, ink=SOFT, anchor="start")

    d.line([(16, 166), (924, 166)], BORDER, width=1)
    d.text((24, 194), "4. On each worker: micro-batches of m rows", 13.5, bold=True, anchor="start")
    d.box(24, 210, 176, 62, ["Rows", "tokens [m, L], labels [m]", "place in the global batch"], FILES, 13)
    d.box(
        224, 210, 192, 62, ["Times and groups", "t [m], groups [m, L]", "from (seed, step, place)"], BLOCK, 13
    )
    d.box(440, 210, 176, 62, ["Batch", "targets, weights w(t)", "1 / normaliser"], BLOCK, 13)
    d.box(
        640,
        210,
        276,
        62,
        ["Segments", "2m packed sequences, sorted by group", "known lengths, no mask tensor"],
        BLOCK,
        13,
    )
    for left, right in ((200, 224), (416, 440), (616, 640)):
        d.arrow([(left, 241), (right, 241)])
    d.arrow([(778, 272), (778, 306)])
    d.text((24, 330), "5. Loss and update", 13.5, bold=True, anchor="start")
    d.box(
        640,
        306,
        276,
        62,
        ["Model", "encoder, swap, decoder, head", "cross-entropy in chunks of rows, float32"],
        BLOCK,
        13,
    )
    d.box(440, 306, 176, 62, ["Row losses [m]", "summed over the batch", "missing rows weigh 0"], BLOCK, 13)
    d.box(224, 306, 192, 62, ["Backward", "gradients of the sum", "over all workers"], BLOCK, 13)
    d.arrow([(640, 337), (616, 337)])
    d.arrow([(440, 337), (416, 337)])
    d.arrow([(320, 368), (320, 392)])
    d.box(224, 392, 192, 44, ["Update", "clip, AdamW, EMA"], BLOCK, 13)
    d.text(
        (440, 410), "Everything random is a function of (seed, step, place in the batch),", 12, anchor="start"
    )
    d.text(
        (440, 428), "so a resumed run and another number of workers see the same draws.", 12, anchor="start"
    )
    return d.svg()


def halton_cells(side: int) -> list[int]:
    """Return the cells of a square grid in the order in which a Halton sequence first visits them."""

    def radical_inverse(index: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while index:
            scale /= base
            index, digit = divmod(index, base)
            value += digit * scale
        return value

    visited: dict[int, None] = {}
    index = 1
    while len(visited) < side * side:
        row, column = int(radical_inverse(index, 2) * side), int(radical_inverse(index, 3) * side)
        visited.setdefault(row * side + column)
        index += 1
    return list(visited)


def arccos_counts(cells: int, steps: int) -> list[int]:
    """Return how many cells every step reveals under the arccos schedule."""
    growth = [math.acos(1 - (step + 1) / steps) for step in range(steps)]
    ends = [round(sum(growth[: i + 1]) / sum(growth) * (cells - steps)) for i in range(steps)]
    return [1 + end - before for end, before in zip(ends, [0, *ends], strict=False)]


def reveal_orders() -> str:
    """Draw which positions the steps of sampling reveal, in three orders."""
    d = Drawing(
        900,
        318,
        "Positions revealed over the steps of sampling: a random order in equal parts, left to right, and a Halton "
        "order of a grid with an arccos schedule",
    )
    shuffled = [9, 2, 14, 5, 11, 0, 7, 12, 4, 15, 1, 8, 13, 6, 3, 10]
    new = Style("#ffedd5", "#ea580c")
    old = Style("#bfdbfe", "#2563eb")
    d.text((160, 32), "uniform", 15, bold=True)
    d.text((160, 50), "random order, equal parts", 12, ink=SOFT)
    d.text((468, 32), "left_to_right", 15, bold=True)
    d.text((468, 50), "one position a step (AR)", 12, ink=SOFT)
    d.text((768, 32), "halton", 15, bold=True)
    d.text((768, 50), "spread over the grid, arccos counts", 12, ink=SOFT)
    for left, order, counts in ((62, shuffled, [4, 4, 4, 4]), (370, list(range(16)), [1, 1, 1, 1])):
        done = 0
        for step, count in enumerate(counts):
            y = 78 + step * 34
            d.text((left - 10, y + 14), f"step {step + 1}", 11, ink=SOFT, anchor="end")
            for position in range(16):
                place = order.index(position)
                style = (
                    new
                    if done <= place < done + count
                    else old
                    if place < done
                    else Style("#ffffff", "#c4cad1")
                )
                d.rect(left + position * 12.6, y, 10.8, 20, style, 2)
            done += count
    d.text((160, 222), "16 positions in 4 steps", 12)
    d.text((468, 222), "the first 4 of 16 steps, with a cache", 12)
    side, steps = 8, 8
    counts = arccos_counts(side * side, steps)
    order, shown = halton_cells(side), (2, 4, 6, 8)
    for panel, until in enumerate(shown):
        x, y = 652 + (panel % 2) * 124, 70 + (panel // 2) * 112
        before, after = sum(counts[: until - 1]), sum(counts[:until])
        for place, cell_index in enumerate(order):
            style = new if before <= place < after else old if place < before else Style("#ffffff", "#c4cad1")
            d.rect(x + cell_index % side * 11, y + cell_index // side * 11, 9.5, 9.5, style, 1.5)
        d.text((x + 43, y + 101), f"step {until} of {steps}", 11, ink=SOFT)
    d.rect(62, 262, 14, 14, new, 2)
    d.text((84, 274), "revealed in this step", 12.5, anchor="start")
    d.rect(230, 262, 14, 14, old, 2)
    d.text((252, 274), "known from earlier steps", 12.5, anchor="start")
    d.rect(422, 262, 14, 14, Style("#ffffff", "#c4cad1"), 2)
    d.text((444, 274), "unknown", 12.5, anchor="start")
    return d.svg()


def distillation_round() -> str:
    """Draw a round of distillation: two steps of the teacher, one step of the student; and the rounds."""
    d = Drawing(
        900,
        424,
        "A round of distillation: the teacher takes two steps and the student learns to predict in one step what "
        "the teacher predicted where each position was revealed; every round halves the number of steps",
    )
    known = {0, 3, 6}
    first = {2, 7}
    words = ["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7"]
    new, later = Style("#ffedd5", "#ea580c", "#7c2d12"), Style("#f3ecff", "#8250df", "#4a2a8a")

    def row(y: float, label: str, detail: str, cells: list[tuple[str, Style]]) -> list[float]:
        d.text((24, y + 12), label, 13, bold=True, anchor="start")
        d.text((24, y + 27), detail, 11.5, ink=SOFT, anchor="start")
        return d.tokens(252, y, cells, 50, 30, 6, 12.5)

    cells = [(word, GROUP_0) if i in known else ("", EMPTY) for i, word in enumerate(words)]
    middles = row(24, "Row at time t", "group 1 is hidden", cells)
    cells = [
        (word, GROUP_0) if i in known else (word, new) if i in first else ("", EMPTY)
        for i, word in enumerate(words)
    ]
    row(82, "Teacher, step 1", "t to t - dt: some are revealed", cells)
    cells = [
        (word, GROUP_0) if i in known else (word, new) if i in first else (word, later)
        for i, word in enumerate(words)
    ]
    row(140, "Teacher, step 2", "t - dt to t - 2 dt: the others", cells)
    cells = [("", NOTHING) if i in known else ("q1", new) if i in first else ("q2", later) for i in range(8)]
    row(198, "Targets", "distribution q of the step", cells)
    cells = [("", NOTHING) if i in known else ("p", FILES) for i in range(8)]
    row(256, "Student, one step", "from the row at time t", cells)
    for i in range(8):
        if i not in known:
            d.line([(middles[i], 228), (middles[i], 256)], FILES.stroke, "3 3")
    for y in (54, 112, 170):
        d.arrow([(474, y), (474, y + 28)])
    for index, (title, detail) in enumerate(
        (
            ("Loss", "divergence of p from q,"),
            ("", "by default KL(p || q), at the"),
            ("", "positions hidden at time t"),
        )
    ):
        if title:
            d.text((722, 228), title, 13, bold=True, anchor="start")
        d.text((722, 246 + 17 * index), detail, 12, ink=SOFT, anchor="start")
    d.text((722, 44), "dashed: hidden", 12, ink=SOFT, anchor="start")
    d.line([(16, 306), (884, 306)], BORDER, width=1)
    d.text(
        (24, 332),
        "Rounds: the student of a round is the teacher of the next",
        13.5,
        bold=True,
        anchor="start",
    )
    steps = (1024, 512, 256, 128, 64, 32)
    for index, count in enumerate(steps):
        x = 24 + index * 146
        label = "teacher" if index == 0 else f"round {index}"
        d.box(x, 350, 112, 50, [label, f"{count:,} steps"], BLOCK if index == 0 else FILES, 13)
        if index:
            d.arrow([(x - 34, 375), (x, 375)])
    return d.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "pgm_and_masked.svg": pgm_and_masked,
    "partition_transformer.svg": partition_transformer,
    "segments.svg": segments,
    "data_flow.svg": data_flow,
    "run_life.svg": run_life,
    "batch_life.svg": batch_life,
    "reveal_orders.svg": reveal_orders,
    "distillation_round.svg": distillation_round,
}


def main() -> None:
    """Write every picture into the folder of images."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
