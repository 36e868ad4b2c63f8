"""Files of images to squares of pixels: colour, crop, size."""

import io
import re
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from pipeline.errors import DataError

REDUCING_GAP = 3.0  # whole pixels are averaged first down to this times the final size, which then costs less


def square(raw: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The centre of an image as RGB, the longer side cropped to the shorter, then resized to size x size.

    Grey becomes RGB, 16 bits become 8, transparent pixels lie over white, an animation is its first frame, and a
    photograph stands as its EXIF orientation says. An image that has the size already keeps its pixels.

    Args:
        raw: a file's bytes in any format that PIL reads, or grey [h, w] or RGB [h, w, 3] pixels.
        size: S.

    Raises:
        DataError: what is wrong with it; the caller knows where it came from.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large images: what is broken raises
            image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else _open(raw)
            return _fit(_rgb(image), size)
    except DataError:
        raise
    except Exception as error:  # PIL lets errors of many kinds pass from damaged files
        message = re.sub(
            " <.*>", "", str(error)
        )  # of an object in memory, which has another address each time
        raise DataError(f"{type(error).__name__}: {message}") from None


def _open(raw: bytes) -> Image.Image:
    if not raw:
        raise DataError("0 bytes; expected an image")
    image = Image.open(io.BytesIO(raw))
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read, which the pixels do not need
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"pixels of 32 bits (mode {image.mode}); expected 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _fit(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(image.crop(box))
    resized = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
    return np.asarray(resized)
