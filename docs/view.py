"""Draw the picture of docs/sampling.md: the page that shows how rows were revealed, of text and of images.

It needs Chromium, and the models of the two quickstarts.

    PYTHONPATH=. python docs/view.py runs/quickstart/model runs/image_quickstart/model
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import load_model
from tests.support.browser import chromium, opened

PICTURE = Path(__file__).parent / "view.png"
WIDTH, HEIGHTS = 1140, (550, 720)


def main(text: str, images: str) -> None:
    """Sample from both models, and take a picture of each page.

    Args:
        text: model of text.
        images: model of images.
    """
    program = chromium()
    if program is None:
        sys.exit("no Chromium on this machine (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, opened(program) as browser:
        pages, pictures = [Path(folder) / "text.html", Path(folder) / "images.html"], []
        load_model(text).sample(8, steps=32, order="confidence", seed=1, view=pages[0])
        load_model(images).sample_images(range(10), steps=12, guidance=2.0, order="halton", view=pages[1])
        places = ("#row=6&step=21", "#row=4&step=8")
        for page, place, height in zip(pages, places, HEIGHTS, strict=True):
            browser.open(page, place)
            browser.screenshot(page.with_suffix(".png"), (WIDTH, height), dark=page != pages[0])
            pictures.append(np.asarray(Image.open(page.with_suffix(".png")).convert("RGB")))
        Image.fromarray(np.concatenate(pictures)).quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
