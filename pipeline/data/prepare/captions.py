"""Captions of images: lines of a file beside them, members of tar files, columns, and descriptions of the digits."""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int, UInt8

from pipeline import storage
from pipeline.config.data import PairDataConfig
from pipeline.data.prepare.source_files import Problem, SourceFile, fault_of_data
from pipeline.data.prepare.tars import Member, Sample
from pipeline.errors import DataError, did_you_mean, first_line

FILE = "file"  # field of a line that names its image
TEXTS = ("txt", "json")  # suffixes of captions in tar files, the first that is there
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_INK = 255.0  # value of a pixel that is all ink


def checked(value: object, origin: str) -> str:
    """Return a caption without space around it.

    Args:
        value: as it was read.
        origin: where it is from, for the message.

    Raises:
        DataError: it is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        what = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{origin} holds {what}; expected a caption")
    return value.strip()


def of_sample(sample: Sample, data: PairDataConfig) -> str:
    """Read the caption of a sample of a tar file: its `txt`, or the caption's field of its `json`.

    Args:
        sample: whose texts were read.
        data: the data section of the config.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    suffix = next((suffix for suffix in TEXTS if suffix in sample), None)
    if suffix is None:
        expected = f"txt, or json with the field {data.caption_field!r} (data.caption_field)"
        raise DataError(f"no caption among {', '.join(list(sample)[:6])}; expected {expected}")
    content = sample[suffix]
    if isinstance(content, Member):
        raise DataError(f"no caption in {suffix}: {content.fault}")
    try:
        text = content.decode("utf-8-sig")
        tree = {data.caption_field: text} if suffix == "txt" else json.loads(text)
    except Exception as error:  # of JSON and UTF-8, and of too much nesting
        raise DataError(f"no caption in {suffix}: {first_line(error)}") from None
    return _field(tree, data.caption_field, suffix)


def list_captions(
    files: Sequence[SourceFile], data: PairDataConfig
) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Read the file of captions of a folder of images.

    Args:
        files: of the folder, images and the file of captions.
        data: the data section of the config.

    Returns:
        Path and caption of every image that has one, in the order of the lines; and what is wrong with others.

    Raises:
        DataError: there is no such file, or not one file.
    """
    named = [file for file in files if file.name == data.captions]
    paths = {file.name: file.path for file in files if file.name != data.captions}
    if not named:
        near = did_you_mean(data.captions, storage.listing(data.source))
        raise DataError(
            f"data.captions: no file {data.captions!r} in {data.source!r}; expected JSON lines with the fields "
            f"{FILE!r} and {data.caption_field!r}{near}"
        )
    path, found, problems = named[0].path, dict[str, str](), list[Problem]()
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except Exception as error:
        raise DataError(f"data.captions: {path} cannot be read: {fault_of_data(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, caption = _line(line, data.caption_field)
            if name not in paths:
                raise DataError(f"no image {name!r} in the folder{did_you_mean(name, paths)}")
            if paths[name] in found:
                raise DataError(f"a second caption of {name!r}; expected one line for an image")
            found[paths[name]] = caption
        except DataError as error:
            problems.append(Problem(f"{path} line {number}", str(error)))
    return list(found.items()), problems


def _line(line: str, field: str) -> tuple[str, str]:
    """Return the file's name and the caption of a line."""
    try:
        tree = json.loads(line)
    except Exception as error:  # of JSON, and of too much nesting
        raise DataError(f"no JSON: {first_line(error)}") from None
    return _field(tree, FILE, "the line"), _field(tree, field, "the line")


def _field(tree: object, field: str, origin: str) -> str:
    """Return a field of an object of JSON, which must be a text."""
    if not isinstance(tree, dict):
        raise DataError(
            f"{origin} holds a {type(tree).__name__}; expected an object with the field {field!r}"
        )
    if field not in tree:
        raise DataError(f"no field {field!r} in {origin}{did_you_mean(field, map(str, tree))}")
    return checked(tree[field], f"field {field!r} of {origin}")


def measures(pixels: UInt8[np.ndarray, "n S S"]) -> dict[str, Float64[np.ndarray, "n"]]:
    """Measure drawings: how much ink they have, how wide they are, and how they slant.

    Args:
        pixels: bright ink on black.

    Returns:
        `mass`: pixels of ink. `width`: standard deviation of the ink across, over that down. `slant`: shift to the
        right for a step up, from the second moments of the ink.
    """
    ink = pixels / _INK
    mass = ink.sum((1, 2))
    share = ink / np.maximum(mass, 1e-9)[:, None, None]
    down, across = np.mgrid[: pixels.shape[1], : pixels.shape[2]]
    y, x = (place - (share * place).sum((1, 2))[:, None, None] for place in (down, across))
    xx, yy, xy = ((share * a * b).sum((1, 2)) for a, b in ((x, x), (y, y), (x, y)))
    return {"mass": mass, "width": np.sqrt(xx / np.maximum(yy, 1e-9)), "slant": -xy / np.maximum(yy, 1e-9)}


def describe_digits(pixels: UInt8[np.ndarray, "n 8 8"], labels: Int[np.ndarray, "n"]) -> list[str]:
    """Describe digits, such as "a thin wide seven, slanted to the right".

    Every measure says something of the third of a digit's images that have least of it, and of the third that have
    most, so that captions say more than the class.

    Args:
        pixels: all digits.
        labels: their classes.
    """
    thirds = {name: _third(values, labels) for name, values in measures(pixels).items()}
    mass = np.array(["thin ", "", "thick "])[thirds["mass"]]
    width = np.array(["narrow ", "", "wide "])[thirds["width"]]
    slant = np.array([", slanted to the left", "", ", slanted to the right"])[thirds["slant"]]
    words = (WORDS[label] for label in labels.tolist())
    named = (f"{a}{b}{word}{c}" for a, b, word, c in zip(mass, width, words, slant, strict=True))
    return [f"an {name}" if name.startswith("eight") else f"a {name}" for name in named]


def _third(values: Float64[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Tell in which third of its class every value is."""
    thirds = np.zeros(len(values), np.int64)
    for label in np.unique(labels):
        own = labels == label
        thirds[own] = np.searchsorted(np.quantile(values[own], [1 / 3, 2 / 3]), values[own])
    return thirds


def digit_of(caption: str) -> int | None:
    """Return the digit that a description names; None where it names none, or several.

    Args:
        caption: a text as of `describe_digits`.
    """
    named = [digit for digit, word in enumerate(WORDS) if word in caption.replace(",", " ").split()]
    return named[0] if len(named) == 1 else None


@lru_cache(maxsize=1)
def digits() -> tuple[UInt8[np.ndarray, "n 8 8"], Int[np.ndarray, "n"]]:
    """Load 1,797 digits of 8 x 8 pixels in 17 shades, and their classes."""
    from sklearn.datasets import load_digits  # slow to import, and other sources do without

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target
