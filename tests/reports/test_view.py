"""The page of the steps of sampling: its data, and what a real browser makes of it."""

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.api import Model
from pipeline.config.model import PGMConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.models.vq import PatchVQ
from pipeline.reports.view import ROWS, Revealed, names_of, pieces
from tests.support.browser import Browser, chromium, opened
from tests.support.small_models import PGM, randomised

BYTES, BOS, L = ByteTokenizer(), 256, 24
EVIL = "</script><script>window.attacked = 1</script><!--<img src=http://a.b/c onerror='attacked=1'>&amp;"
PATCHES = np.random.default_rng(0).integers(0, 256, (12, 2, 2, 3)).astype(np.uint8)
CODES = PatchVQ(PATCHES)
FACTS = {"model": "a <b>bold</b> name", "order": "uniform"}


def data_of(page: str) -> dict[str, Any]:
    """What the script of a page reads."""
    (found,) = re.findall(r'<script id="view" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def text_page(texts: list[str], steps: int = 4) -> tuple[str, list[list[int]]]:
    """A page of texts behind a BOS; the first two bytes of each are given, and the others come in `steps` steps."""
    rows = [np.array([BOS, *text.encode()]) for text in texts]
    at = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for index, row in enumerate(rows):
        at[index, 3 : len(row)] = np.random.default_rng(index).permutation(len(row) - 3) % steps + 1
    shown = [at[index, 1 : len(row)].tolist() for index, row in enumerate(rows)]
    return Revealed(rows, at, steps, BOS, BYTES).to_html(FACTS), shown


def image_page(tokenizer: PatchVQ | None = CODES) -> tuple[str, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    codes, at = rng.integers(0, 12, (3, 16)), np.stack([rng.permutation(16) for _ in range(3)]) // 4 + 1
    images = None if tokenizer is None else tokenizer.decode(codes)
    names = names_of([2, 0, 2], ["boot", "hat", "shoe"])
    return Revealed(codes, at, 4, None, tokenizer, images, names).to_html(FACTS), codes, at


def test_pieces_write_the_text() -> None:
    text = "naïve → 文字 🙂\n\ttail"
    found = pieces(np.array([*text.encode()]), BYTES.decode)
    assert found == [(character, len(character.encode())) for character in text]
    rng = np.random.default_rng(0)
    for _ in range(50):  # broken UTF-8
        ids = rng.integers(0, 256, 30)
        assert sum(count for _, count in pieces(ids, BYTES.decode)) == 30


def test_pieces_of_a_tokenizer_that_joins_words() -> None:
    """As WordPiece does: spaces between words, none at the start, and none before what continues a word."""
    words = ["the", "##rm", "is", "hot", "##ter"]

    def decode(ids: np.ndarray) -> str:
        return " ".join(words[i] for i in ids).replace(" ##", "").removeprefix("##")

    found = pieces(np.array([0, 1, 2, 3, 4]), decode)
    assert found == [("the", 1), ("rm", 1), (" is", 1), (" hot", 1), ("ter", 1)]


def test_the_data_of_texts() -> None:
    page, at = text_page([EVIL, "ab\u2028c"])
    view = data_of(page)
    assert (view["steps"], len(view["rows"])) == (4, 2)
    assert [row["at"] for row in view["rows"]] == at
    assert ["".join(text for text, _ in row["pieces"]) for row in view["rows"]] == [EVIL, "ab\u2028c"]
    assert view["rows"][1]["pieces"] == [["a", 1], ["b", 1], ["\u2028", 3], ["c", 1]]
    assert "a &lt;b&gt;bold" in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\w+:|url\(|@import|fetch\(|https?://""", page)


def test_the_data_of_images() -> None:
    page, codes, at = image_page()
    view = data_of(page)
    for row, code, steps, name in zip(view["rows"], codes, at, ["shoe", "boot", "shoe"], strict=True):
        assert (row["codes"], row["at"], row["name"]) == (code.tolist(), steps.tolist(), name)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["picture"]))))
        assert np.array_equal(shown, CODES.decode(code[None])[0])
    without = data_of(image_page(None)[0])["rows"][0]
    assert without["codes"] == codes[0].tolist()
    assert "picture" not in without
    ids = Revealed(codes[:, :15], at, 4).to_html(FACTS)  # no square, and no tokenizer
    assert data_of(ids)["rows"][0]["pieces"] == [[f"{code} ", 1] for code in codes[0, :15]]
    many = Revealed(np.tile(codes, (40, 1)), np.tile(at, (40, 1)), 4).to_html(FACTS)
    assert len(data_of(many)["rows"]) == ROWS


@pytest.mark.parametrize("order", ["uniform", "confidence", "entropy"])
def test_the_model_object_writes_it(order: str, tmp_path: Path) -> None:
    text = Model(randomised(PGM, 257, L), BOS, BYTES)
    options: dict[str, Any] = {"num_samples": 2, "steps": 5, "order": order, "known": {4: 65}, "seed": 1}
    rows = text.sample(view=str(tmp_path / "new/view.html"), **options)
    assert torch.equal(rows, text.sample(**options))
    view = data_of((tmp_path / "new/view.html").read_text())
    steps = np.array([row["at"] for row in view["rows"]])
    assert (steps[:, 3] == 0).all()
    assert (np.delete(steps, 3, axis=1) > 0).all()
    assert steps.max() <= view["steps"] == 5
    if order == "uniform":
        assert [np.bincount(row, minlength=6).tolist() for row in steps] == [[1, 5, 5, 4, 4, 4]] * 2
    written = ["".join(part for part, _ in row["pieces"]) for row in view["rows"]]
    assert written == text.decode(rows)


def test_the_model_object_shows_images(tmp_path: Path) -> None:
    config = PGMConfig(hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0, classes=3)
    model = Model(randomised(config, 12, 16), None, CODES, ["boot", "hat", "shoe"])
    images = model.sample_images(["hat", "shoe"], steps=4, view=tmp_path / "view.html")
    rows = data_of((tmp_path / "view.html").read_text())["rows"]
    assert [row["name"] for row in rows] == ["hat", "shoe"]
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(row["picture"])))), image)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with opened(program) as running:
        yield running


HIDDEN = "[...document.querySelectorAll('.piece, .image .cell')].map((part) => part.matches('.hidden'))"
STATUS = "document.getElementById('status').textContent"


def test_texts_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "view.html").write_text((page := text_page([EVIL, "ab\u2028c"]))[0], encoding="utf-8")
    at = page[1]
    browser.open(tmp_path / "view.html")
    visible = "document.querySelector('.text').innerText"
    assert browser.evaluate("document.querySelector('.text').textContent") == EVIL
    assert browser.evaluate(HIDDEN) == [step > 0 for step in at[0]]
    assert browser.evaluate(visible).startswith("</")
    for step in range(1, 5):
        browser.press("ArrowRight")
        assert browser.evaluate(HIDDEN) == [number > step for number in at[0]]
        new = sum(number == step for number in at[0])
        known = sum(number <= step for number in at[0])
        assert (
            browser.evaluate(STATUS) == f"Step {step} of 4  · {known} of {len(at[0])} tokens known, {new} new"
        )
    assert browser.evaluate(visible) == EVIL
    browser.press("ArrowDown")
    browser.press("Home")
    assert browser.evaluate(HIDDEN) == [False, False, True, True]
    assert browser.evaluate("location.hash") == "#row=2&step=0"
    browser.open(tmp_path / "view.html", f"#row=2&step={max(at[1][2:5])}")
    assert browser.evaluate(HIDDEN)[2] is False  # a character of three tokens, with its last one
    browser.open(tmp_path / "view.html", f"#row=2&step={max(at[1][2:5]) - 1}")
    assert browser.evaluate(HIDDEN)[2] is True
    assert browser.evaluate("window.attacked") is None
    assert browser.problems == []


def test_images_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page, _, at = image_page()
    (tmp_path / "view.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "view.html", "#row=2&step=2")
    assert browser.evaluate(HIDDEN) == [step > 2 for step in at[1]]
    assert browser.evaluate("document.querySelector('.image img').naturalWidth") == 8
    assert browser.evaluate("document.querySelector('.image').getAttribute('aria-label')") == (
        "Row 2, boot: 8 of 16 tokens known"
    )
    browser.evaluate("document.querySelectorAll('.rows label')[2].click()")
    assert browser.evaluate(HIDDEN) == [step > 2 for step in at[2]]
    browser.evaluate("document.getElementById('speed').value = '4', document.getElementById('first').click()")
    browser.press(" ")
    assert browser.evaluate("document.getElementById('play').getAttribute('aria-label')") == "Pause"
    deadline = time.monotonic() + 20
    while browser.evaluate("document.getElementById('slider').value") != "4":
        assert time.monotonic() < deadline
    assert browser.evaluate(HIDDEN) == [False] * 16
    assert browser.evaluate("document.getElementById('play').getAttribute('aria-label')") == "Play"
    names = "[...document.querySelectorAll('button, input, select')].map((x) => x.ariaLabel || x.labels[0].innerText)"
    assert all(browser.evaluate(names))
    assert browser.problems == []
