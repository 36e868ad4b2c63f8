"""Squares of pixels: every colour mode, orientation, crop, size, and files that are none."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.pixels import square
from pipeline.errors import DataError


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_an_image_of_the_size_keeps_its_pixels() -> None:
    pixels = colours(8, 8)
    assert np.array_equal(square(file(Image.fromarray(pixels)), 8), pixels)
    assert np.array_equal(square(pixels, 8), pixels)


@pytest.mark.parametrize(("height", "width", "box"), [(8, 13, (0, 2)), (14, 8, (3, 0)), (9, 8, (0, 0))])
def test_the_longer_side_is_cropped_at_the_centre(height: int, width: int, box: tuple[int, int]) -> None:
    pixels, (top, left) = colours(height, width), box
    assert np.array_equal(square(pixels, 8), pixels[top : top + 8, left : left + 8])


def test_resizing_keeps_what_is_smooth() -> None:
    """A ramp stays a ramp, whether it shrinks a lot, shrinks a little or grows."""
    for side in (400, 40, 20):
        ramp = np.repeat(np.linspace(0, 255, side)[None], side, 0).astype(np.uint8)
        row = square(ramp, 32)[16, :, 1].astype(float)
        expected = ((np.arange(32) + 0.5) / 32 * side - 0.5) / (side - 1) * 255
        assert np.abs(row - expected)[2:-2].max() < 2, side


def test_grey_of_all_kinds() -> None:
    grey = colours(8, 8)[..., 0]
    rgb = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(square(file(Image.fromarray(grey)), 8), rgb)
    sixteen = grey.astype(np.uint16) * 257
    assert np.array_equal(square(file(Image.fromarray(sixteen)), 8), rgb)
    assert np.array_equal(square(file(Image.fromarray(sixteen), "TIFF"), 8), rgb)
    bits = Image.fromarray(np.where(grey > 99, 255, 0).astype(np.uint8)).convert("1")
    assert np.array_equal(square(file(bits), 8), np.where(rgb > 99, 255, 0))
    with pytest.raises(DataError, match=r"32 bits \(mode F\); expected 8 or 16"):
        square(file(Image.fromarray(grey.astype(np.float32)), "TIFF"), 8)


def test_cmyk_and_palette() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        assert np.abs(square(file(red, kind), 8).astype(int) - (255, 0, 0)).max() <= 2
    pixels = np.where(colours(8, 8)[..., :1] > 127, [[250, 10, 60]], [[0, 99, 200]]).astype(np.uint8)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert palette.mode == "P"
    assert np.array_equal(square(file(palette), 8), pixels)


def test_transparent_pixels_lie_over_white() -> None:
    pixels = colours(8, 8)
    alpha = np.zeros((8, 8, 1), np.uint8)
    alpha[:, :4] = 255
    seen = np.where(alpha == 255, pixels, 255)
    image = Image.fromarray(np.concatenate([pixels, alpha], 2))
    assert np.array_equal(square(file(image), 8), seen)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert set(square(file(half), 8).reshape(-1).tolist()) == {127}
    grey = Image.fromarray(np.concatenate([pixels[..., :1], alpha], 2), "LA")
    assert np.array_equal(square(file(grey), 8), np.where(alpha == 255, pixels[..., :1], 255).repeat(3, 2))
    keyed = Image.new("P", (8, 8), 0)
    keyed.putpalette([9, 9, 9, 200, 0, 0])
    keyed.putpixel((0, 0), 1)
    seen = np.full((8, 8, 3), 255)
    seen[0, 0] = (200, 0, 0)
    assert np.array_equal(square(file(keyed, transparency=0), 8), seen)


def test_photographs_stand_as_their_camera_says() -> None:
    pixels = colours(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    turned = square(file(Image.fromarray(pixels), exif=exif), 8)
    assert np.array_equal(turned, np.rot90(pixels, -1)[2:10])
    broken = file(Image.fromarray(pixels), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert square(broken, 8).shape == (8, 8, 3)


def test_one_pixel_fills_the_square() -> None:
    assert (square(file(Image.new("RGB", (1, 1), (3, 4, 5))), 8) == (3, 4, 5)).all()


def test_files_that_are_no_images() -> None:
    whole = file(Image.fromarray(colours(64, 64)), "JPEG", quality=95)
    for cut in (len(whole) // 2, len(whole) // 3, 30):
        with pytest.raises(DataError):
            square(whole[:cut], 8)
    with pytest.raises(DataError, match="truncated"):
        square(whole[: len(whole) // 2], 8)
    png = file(Image.fromarray(colours(64, 64)))
    for spoilt in (png[:400], png[:60] + b"\0\0\0\0" + png[64:]):
        with pytest.raises(DataError):
            square(spoilt, 8)
    with pytest.raises(DataError, match="cannot identify"):
        square(b"thesis", 8)
    with pytest.raises(DataError, match="0 bytes"):
        square(b"", 8)
