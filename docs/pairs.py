"""Measure a model of the digits and their descriptions, and draw its four uses, the picture of docs/pairs.md.

    PYTHONPATH=. python docs/pairs.py runs/pair_quickstart/model [PICTURE.png]

Every figure of the page is a line of what this prints; the model is one of configs/pair.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline import Model, load_model
from pipeline.data.prepare.captions import WORDS
from pipeline.reports.pictures import caption_lines
from tests.support.digit_pairs import (
    LIKELIEST,
    Digits,
    best_of_ten,
    captions_of_images,
    images_of_captions,
    split,
)

PICTURE = Path(__file__).parent / "pairs.png"
INK, GIVEN, GREY = "#22262b", "#c2410c", np.uint8(208)
TOLD = ["a thick three", "a thin narrow zero", "a thin seven, slanted to the right", "a thick wide two"]
Cell = tuple[np.ndarray, str, bool, bool]  # image, caption, and whether each is given


def uses(model: Model, real: Digits) -> dict[str, list[Cell]]:
    """Let the model do everything that it does, with four examples each."""
    whole, halves = real.images[:4], real.images[4:6]
    right = np.arange(8) >= np.full((8, 1), 4)
    texts, images = model.sample_pairs(4, seed=1)
    rows: dict[str, list[Cell]] = {
        "image of a caption": [(*pair, False, True) for pair in zip(model.draw(TOLD), TOLD, strict=True)],
        "caption of an image": [
            (*pair, True, False) for pair in zip(whole, model.caption(whole, filters=LIKELIEST), strict=True)
        ],
        "both from nothing": [(*pair, False, False) for pair in zip(images, texts, strict=True)],
        "gaps in either": [],
    }
    for image in halves:
        captions, filled = model.complete(None, image, right, filters=LIKELIEST)
        shown = np.concatenate([np.where(right[..., None], GREY, image), filled[0]], 1)
        rows["gaps in either"].append((shown, captions[0], True, False))
    for gaps in ("a thick[[1]], slanted to the right", "a[[1]] wide eight"):
        captions, filled = model.complete(gaps, seed=2)
        rows["gaps in either"].append((filled[0], f"{gaps}: {captions[0]}", False, True))
    return rows


def figure(rows: dict[str, list[Cell]]) -> Figure:
    """Draw a line for every use; what was given is framed or written in another colour."""
    page = Figure(figsize=(8, 8.6), dpi=150, layout="constrained")
    for (title, cells), part in zip(rows.items(), page.subfigures(len(rows), 1), strict=True):
        part.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
        for axis, (image, text, given_image, given_text) in zip(part.subplots(1, 4), cells, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=given_image, color=GIVEN, linewidth=2)
            axis.set_title(caption_lines(text), fontsize=7, color=GIVEN if given_text else INK)
    return page


def main(folder: str, picture: str = str(PICTURE)) -> None:
    """Print all figures of the model of a folder, and draw the picture.

    Args:
        folder: of the model.
        picture: file to write.
    """
    model, (train, held_out) = load_model(folder), split()
    found = {"caption to image": images_of_captions(model, train, held_out, draws=4)}
    scored = {"p(image | caption)": best_of_ten(model, held_out, WORDS, "caption")}
    if not model.denoiser.left_to_right:
        found["likeliest caption"] = captions_of_images(model, held_out, filters=LIKELIEST)
        found["best of 16 captions"] = captions_of_images(model, held_out, best_of=16)
        scored["p(caption | image)"] = best_of_ten(model, held_out, WORDS, "image")
        figure(uses(model, held_out)).savefig(picture)
    found["digit, best of ten"] = scored
    lines = [f"{use}: {name}: {value:.3f}\n" for use, part in found.items() for name, value in part.items()]
    sys.stdout.write("".join([f"{model!r}\n", *lines]))


if __name__ == "__main__":
    main(*sys.argv[1:])
