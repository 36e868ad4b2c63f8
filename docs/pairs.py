"""Measure a model of the digits and their descriptions in its four uses, and draw docs/pairs.png.

    PYTHONPATH=. python docs/pairs.py runs/pair_quickstart/model [FIGURE.png]

The model is one of configs/pair. Prints one line for every figure of docs/pairs.md.
"""

import sys
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from matplotlib.figure import Figure
from sklearn.svm import SVC

from pipeline import Model, load_model
from pipeline.config.data import PairDataConfig
from pipeline.data.prepare.captions import describe_digits, digit_of, digits, measures
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import held_out
from pipeline.reports.pictures import caption_lines
from pipeline.sampling.logits import Filters

HELD_OUT, GRAY = 297, 208
LIKELIEST = Filters(top_k=1)
Grey = UInt8[np.ndarray, "n 8 8"]


def split() -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "held_out"]]:
    """Return which digits the recipe trains on, and which it holds out."""
    data = PairDataConfig(kind="pair")
    places = np.array([ref.place for ref in list_images(open_images(data), data).refs])
    out = held_out(np.arange(len(places)), HELD_OUT, len(places))
    return places[~out], places[out]


def rgb(images: Grey) -> UInt8[np.ndarray, "n 8 8 3"]:
    """Return grey images as RGB."""
    return np.repeat(images[..., None], 3, -1)


def difference(values: np.ndarray, captions: list[str], labels: np.ndarray, words: tuple[str, str]) -> float:
    """Return the mean difference of a measure between captions with either word, averaged over the digits."""
    first, second = (np.array([word in caption for caption in captions]) for word in words)
    return float(np.mean([
        values[first & (labels == digit)].mean() - values[second & (labels == digit)].mean() for digit in range(10)
    ]))  # fmt: skip


def images_of_captions(
    model: Model, classifier: SVC, captions: list[str], labels: np.ndarray, real: Grey
) -> None:
    """Print how well images that are drawn of held-out captions agree with them, over several images of each."""
    draws = 4
    drawn = np.concatenate([model.draw(captions, seed=seed)[..., 0] for seed in range(draws)])
    told, names = captions * draws, np.tile(labels, draws)
    codec = model.tokenizer.image  # type: ignore[union-attr]
    decoded = codec.decode(codec.encode(rgb(real)))[..., 0]
    right = classifier.predict(drawn.reshape(len(drawn), -1)) == names
    print(f"caption to image: {right.mean():.3f} of {len(right)} recognised as the caption's digit")  # noqa: T201
    right = classifier.predict(decoded.reshape(len(decoded), -1)) == labels
    print(f"  of the real images, through the codes: {right.mean():.3f}")  # noqa: T201
    for measure, words in (
        ("mass", ("thick", "thin")),
        ("width", ("wide", "narrow")),
        ("slant", ("to the right", "to the left")),
    ):
        found = difference(measures(drawn)[measure], told, names, words)
        expected = difference(measures(real)[measure], captions, labels, words)
        share = found / expected
        print(f"  {measure}, {words[0]} less {words[1]}: {found:.3f}, real {expected:.3f}, {share:.2f}")  # noqa: T201


def captions_of_images(model: Model, captions: list[str], labels: np.ndarray, real: Grey) -> None:
    """Print how often captions of held-out images are right, drawn, and as the best of ten by their bounds."""
    images = rgb(real)
    for name, options in (("drawn", {}), ("likeliest tokens, one a step", {"filters": LIKELIEST})):
        written = model.caption(images, **options)
        right = np.array([digit_of(text) == label for text, label in zip(written, labels, strict=True)])
        known = {*describe_digits(*digits())}
        exact = np.mean([a == b for a, b in zip(written, captions, strict=True)])
        form = np.mean([text in known for text in written])
        print(
            f"image to caption, {name}: digit {right.mean():.3f}, whole {exact:.3f}, of a known form {form:.3f}"
        )  # noqa: T201
        for pair in (("thick", "thin"), ("wide", "narrow"), ("right", "left")):
            opposite = [
                pair[1 - (pair[0] in caption)] in text
                for text, caption in zip(written, captions, strict=True)
                if any(word in caption for word in pair)
            ]
            print(f"  the opposite of {'/'.join(pair)}: {np.mean(opposite):.3f}")  # noqa: T201
    words = [
        next(
            text.split()[1]
            for text in describe_digits(*digits())
            if digit_of(text) == d and len(text.split()) == 2
        )
        for d in range(10)
    ]  # noqa: E501
    # The caption with another digit's word in each place.
    own = [words[label] for label in labels]
    scores = np.stack([
        model.score_pairs(
            [("an " if other == "eight" and caption.split()[1].strip(",") == word else "a ")
             + caption.split(" ", 1)[1].replace(word, other) for caption, word in zip(captions, own, strict=True)],
            images,
            draws=16,
        )
        for other in words
    ])  # fmt: skip
    print(f"image to caption, best of ten by the bound: digit {(scores.argmin(0) == labels).mean():.3f}")  # noqa: T201


def figure(model: Model, captions: list[str], real: Grey) -> Figure:
    """Draw all four uses: what is given has a frame, what is drawn has none."""
    told = ["a thick three", "a thin narrow zero", "a thin seven, slanted to the right", "a thick wide two"]
    right = np.broadcast_to(np.arange(8) >= 4, (8, 8))
    drawn, half = model.draw(told), rgb(real[4:6])
    completed = [model.complete(None, image, right, filters=LIKELIEST) for image in half]
    hidden = [np.where(right[..., None], np.uint8(GRAY), image) for image in half]
    gaps = ["a thick[[1]], slanted to the left", "a[[1]] wide eight"]
    filled = [
        model.complete(gap, image, filters=LIKELIEST, seed=3)
        for gap, image in zip(gaps, real_of(model, gaps), strict=True)
    ]  # noqa: E501
    rows = [
        ("image of a caption", [(image, text, False, True) for image, text in zip(drawn, told, strict=True)]),
        ("caption of an image", [
            (image, text, True, False)
            for image, text in zip(rgb(real[:4]), model.caption(rgb(real[:4]), filters=LIKELIEST), strict=True)
        ]),
        ("both from nothing", [(image, text, False, False) for text, image in zip(*model.sample_pairs(4, seed=1), strict=True)]),  # noqa: E501
        ("gaps in either", [
            *((np.concatenate([old, new[0]], 1), f"half of an image: {texts[0]}", True, False)
              for old, (texts, new) in zip(hidden, completed, strict=True)),
            *((new[0], f"{gap}: {texts[0]}", True, False) for gap, (texts, new) in zip(gaps, filled, strict=True)),
        ]),
    ]  # fmt: skip
    page = Figure(figsize=(8, 8.6), dpi=150, layout="constrained")
    for title, part, cells in zip(
        [row[0] for row in rows], page.subfigures(4, 1), [row[1] for row in rows], strict=True
    ):  # noqa: E501
        part.suptitle(title, fontsize=10, x=0.01, ha="left", color="#22262b")
        for axis, (image, text, given_image, given_text) in zip(part.subplots(1, 4), cells, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=given_image, color="#c2410c", linewidth=2)
            axis.set_title(caption_lines(text), fontsize=7, color="#c2410c" if given_text else "#22262b")
    return page


def real_of(model: Model, gaps: list[str]) -> UInt8[np.ndarray, "n 8 8 3"]:
    """Draw the images whose captions have gaps."""
    return model.draw([gap.replace("[[1]]", " three" if "thick" in gap else " thin") for gap in gaps], seed=5)


def main(folder: str, target: str = "docs/pairs.png") -> None:
    """Measure the model of a folder, and draw the figure."""
    model, (train, out) = load_model(folder), split()
    pixels, labels = digits()
    every = describe_digits(pixels, labels)
    captions, real, own = [every[i] for i in out], pixels[out], labels[out]
    classifier = SVC(gamma="scale").fit(pixels[train].reshape(len(train), -1), labels[train])
    accuracy = classifier.score(real.reshape(len(real), -1), own)
    print(f"{model!r}\nclassifier on {len(real)} held-out images: {accuracy:.3f}")  # noqa: T201
    images_of_captions(model, classifier, captions, own, real)
    if not model.denoiser.left_to_right:
        captions_of_images(model, captions, own, real)
        figure(model, captions, real).savefig(Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
