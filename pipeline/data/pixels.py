"""Pixels of images: decoding, cropping to squares, and resizing."""

import io
import re
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from pipeline.errors import DataError

_REDUCING_GAP = 3.0  # pixels are first averaged to this times the final size, which is faster


def square(raw: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Return the centre of an image as RGB, the longer side cropped to the shorter, then resized to size x size.

    Grey becomes RGB, 16 bits become 8, transparent pixels lie over white, of an animation the first frame is taken,
    and a photograph is turned as its EXIF orientation says. An image that has the size already keeps its pixels.

    Args:
        raw: a file's bytes in any format that PIL reads, or grey [h, w] or RGB [h, w, 3] pixels.
        size: S.

    Raises:
        DataError: says what is wrong with the image, not which image it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large images: what is broken raises
            image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else _decode(raw)
            return _crop(_to_rgb(image), size)
    except DataError:
        raise
    except Exception as error:  # PIL lets errors of many kinds pass from damaged files
        # Without objects in memory, which have another address each time.
        message = re.sub(" <.*>", "", str(error))
        raise DataError(f"{type(error).__name__}: {message}") from None


def _decode(raw: bytes) -> Image.Image:
    """Decode a file and turn it as its EXIF orientation says."""
    if not raw:
        raise DataError("0 bytes; expected an image")
    image = Image.open(io.BytesIO(raw))
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read, which the pixels do not need
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"pixels of 32 bits (mode {image.mode}); expected 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Crop and resize an image to a square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(image.crop(box))
    resized = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)
    return np.asarray(resized)
