"""How well a model of the digits and their descriptions does what it is trained for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.svm import SVC

from pipeline import Model
from pipeline.config.data import PairDataConfig
from pipeline.data.prepare.captions import describe_digits, digit_of, digits, measures
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import held_out
from pipeline.metrics.likelihood import Part
from pipeline.sampling.logits import Filters

LIKELIEST = Filters(top_k=1)
OPPOSITES = {"mass": ("thick", "thin"), "width": ("wide", "narrow"), "slant": ("right", "left")}


@dataclass(frozen=True)
class Digits:
    """Grey digits, their classes and their descriptions."""

    pixels: np.ndarray
    labels: np.ndarray
    captions: list[str]

    @property
    def images(self) -> np.ndarray:
        """[n, 8, 8, 3] in RGB."""
        return np.repeat(self.pixels[..., None], 3, -1)

    @property
    def flat(self) -> np.ndarray:
        """[n, 64] for a classifier."""
        return self.pixels.reshape(len(self.pixels), -1)


def split(validation: int = 297) -> tuple[Digits, Digits]:
    """The digits that configs/pair/quickstart.yaml trains on, and those that it holds out."""
    data = PairDataConfig(kind="pair")
    places = np.array([ref.place for ref in list_images(open_images(data), data).refs])
    out = held_out(np.arange(len(places)), validation, len(places))
    pixels, labels = digits()
    captions = np.array(describe_digits(pixels, labels))
    train, rest = (Digits(pixels[i], labels[i], captions[i].tolist()) for i in (places[~out], places[out]))
    return train, rest


def difference(values: np.ndarray, told: Digits, words: tuple[str, str]) -> float:
    """Mean difference of a measure between captions with either word, averaged over the digits that have both."""
    first, second = (np.array([word in caption for caption in told.captions]) for word in words)
    own = [told.labels == digit for digit in range(10)]
    pairs = [(values[first & digit], values[second & digit]) for digit in own]
    return float(np.mean([a.mean() - b.mean() for a, b in pairs if len(a) and len(b)]))


def images_of_captions(model: Model, train: Digits, told: Digits, draws: int = 1) -> dict[str, float]:
    """How often a classifier of real digits sees the caption's digit, and which part of real differences is drawn."""
    classifier = SVC(gamma="scale").fit(train.flat, train.labels)
    drawn = [model.draw(told.captions, seed=seed)[..., 0] for seed in range(draws)]
    agree = np.mean([
        classifier.predict(part.reshape(len(part), -1)) == told.labels for part in drawn
    ])  # fmt: skip
    found = {"digit": float(agree), "digit, real images": classifier.score(told.flat, told.labels)}
    for name, words in OPPOSITES.items():
        shares = [difference(measures(part)[name], told, words) for part in drawn]
        found[name] = float(np.mean(shares)) / difference(measures(told.pixels)[name], told, words)
    return found


def captions_of_images(model: Model, told: Digits, **options: Any) -> dict[str, float]:
    """How often captions, drawn with options of `Model.caption`, have the form of the data and the right words."""
    written = model.caption(told.images, **options)
    pairs = [*zip(written, told.captions, strict=True)]
    known = {*describe_digits(*digits())}
    found = {
        "digit": float(np.mean([digit_of(a) == digit_of(b) for a, b in pairs])),
        "whole caption": float(np.mean([a == b for a, b in pairs])),
        "a caption of the data's form": float(np.mean([a in known for a in written])),
    }
    for name, words in OPPOSITES.items():
        for text, place in ((f"{name}, right word", 0), (f"{name}, opposite", 1)):
            hits = [words[place ^ (words[1] in b)] in a for a, b in pairs if any(w in b for w in words)]
            found[text] = float(np.mean(hits))
    return found


def best_of_ten(model: Model, told: Digits, words: Sequence[str], given: Part, draws: int = 16) -> float:
    """How often the caption with the right digit, of ten, has the smallest bound.

    The bound is on -log p(caption | image) with `given` "image", and on -log p(image | caption) with "caption".
    """
    scores = []
    for other in words:
        captions = [
            caption.replace("an eight", "a eight").replace(words[label], other).replace("a eight", "an eight")
            for caption, label in zip(told.captions, told.labels, strict=True)
        ]
        scores.append(model.score_pairs(captions, told.images, given=given, draws=draws))
    return float((np.argmin(scores, 0) == told.labels).mean())
