"""What samples are drawn around: a prompt, a text with blanks, an image of which a part is drawn again, or a pair."""

import io
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from pipeline import arguments, storage
from pipeline.config.evaluation import SamplingConfig
from pipeline.data.pixels import square
from pipeline.data.templates import Message, prompt_text
from pipeline.data.tokenizers import PairTokenizer, Tokenizer, saved_tokenizer
from pipeline.errors import CapabilityError, ConfigError, DataError, did_you_mean, first_line
from pipeline.models import model_folder
from pipeline.models.head import Modalities
from pipeline.models.vq import ImageTokenizer

BLANK = re.compile(r"\[\[ *([0-9]+) *\]\]")
WHITE = 128  # least grey level of a mask's pixels that are drawn again


@dataclass(frozen=True)
class Given:
    """Tokens that are given, and how samples around them are shown.

    Attributes:
        known: token by position.
        unknown: number of positions to draw.
        text: as it was given, with its blanks; empty for an image.
        end: samples of text are shown up to this position.
        picture: the image, with the part that is drawn again in grey; None for text.
    """

    known: dict[int, int]
    unknown: int
    text: str = ""
    end: int | None = None
    picture: UInt8[np.ndarray, "S S 3"] | None = None


def prompted(
    text: str,
    tokenizer: Tokenizer,
    length: int,
    bos: int | None,
    key: str = "prompt",
    template: str = "plain",
) -> Given:
    """Give the beginning of a text.

    Args:
        text: the beginning, or the prompt that an answer is drawn to.
        tokenizer: of the model.
        length: L.
        bos: id at position 0, or None.
        key: that the text comes from, for messages.
        template: of the prompts that the model was trained on.

    Raises:
        ConfigError: the text fills the row.
    """
    start = int(bos is not None)
    text = prompt_text([Message("user", arguments.text(key, text))], template)
    ids = tokenizer.encode_batch([text])[0]
    room = length - start - 1
    if len(ids) > room:
        raise ConfigError(f"{key}: {len(ids)} tokens; expected at most {room} for rows of {length}")
    known = {start + i: int(token) for i, token in enumerate(ids)}
    return Given(known, length - start - len(ids), text, length)


def filled(
    text: str, tokenizer: Tokenizer, length: int, bos: int | None, prefix_only: bool, key: str = "template"
) -> Given:
    """Give a text with blanks: `[[12]]` is a blank of 12 tokens. The pieces between them are tokenised by themselves.

    Args:
        text: with at least one blank.
        tokenizer: of the model.
        length: L.
        bos: id at position 0, or None.
        prefix_only: the model is autoregressive, so that the only blank must end the text.
        key: that the text comes from, for messages.

    Raises:
        ConfigError: there is no blank, one without tokens, or the text is longer than a row.
        CapabilityError: an autoregressive model, and text behind a blank.
    """
    pieces = BLANK.split(arguments.text(key, text))  # text, count, text, count, ..., text
    counts = [int(count) for count in pieces[1::2]]
    if not counts or 0 in counts:
        what = "a blank of no tokens, [[0]]" if counts else "no blank"
        raise ConfigError(f"{key}: {what}; expected blanks such as [[12]], which stands for 12 tokens")
    if prefix_only and (len(counts) > 1 or pieces[-1]):
        raise CapabilityError(
            f"{key}: text behind a blank, and an autoregressive model writes from left to right; expected one blank "
            "at the end, or a pgm or mdlm"
        )
    known, start = dict[int, int](), int(bos is not None)
    position = start
    for ids, count in zip(tokenizer.encode_batch(pieces[::2]), [*counts, 0], strict=True):
        known |= {position + i: int(token) for i, token in enumerate(ids)}
        position += len(ids) + count
    if position > length:
        raise ConfigError(
            f"{key}: {position - start} tokens with blanks; expected at most {length - start} for rows of {length}"
        )
    return Given(known, length - start - len(known), text, position)


def painted(
    image: bytes | UInt8[np.ndarray, "h w 3"],
    mask: bytes | Bool[np.ndarray, "h w"],
    tokenizer: ImageTokenizer,
    length: int,
    bos: int | None,
) -> Given:
    """Give an image without the tokens whose squares have a masked pixel.

    The image is cropped and resized as the preparation of data does it.

    Args:
        image: a file's content, or RGB pixels.
        mask: a file's content, whose white pixels are masked, or booleans; of the image's size.
        tokenizer: of the model.
        length: L.
        bos: id at position 0, or None.

    Raises:
        ConfigError: the sizes differ, or nothing is masked.
        DataError: a file is no image.
    """
    start = int(bos is not None)
    grid = math.isqrt(length - start)
    pixels = square(image, grid * tokenizer.factor)
    size = _open("image", image).size if isinstance(image, bytes) else image.shape[1::-1]
    masked = np.asarray(_open("mask", mask).convert("L")) >= WHITE if isinstance(mask, bytes) else mask
    if masked.shape != size[::-1]:
        raise ConfigError(
            f"mask: {masked.shape[1]} x {masked.shape[0]} pixels; expected the image's {size[0]} x {size[1]}"
        )
    if not masked.any():
        raise ConfigError("mask: no white pixel; expected white where the image is drawn again")
    hidden = _squares(masked, grid)
    if not hidden.any():
        raise ConfigError("mask: white outside the centre square alone, to which the image is cropped")
    codes = tokenizer.encode(pixels[None])[0]
    known = {start + i: int(code) for i, code in enumerate(codes) if not hidden.flat[i]}
    large = hidden.repeat(tokenizer.factor, 0).repeat(tokenizer.factor, 1)
    shown = np.where(large[..., None], np.uint8(WHITE), pixels)
    return Given(known, int(hidden.sum()), picture=shown)


@dataclass(frozen=True)
class GivenPair:
    """What is given of a caption and its image.

    Attributes:
        caption: the whole caption, or one with blanks; None: nothing of it.
        image: a file's content, or RGB pixels; None: nothing of it.
        mask: as of `painted`, of the part of the image that is drawn; None: the whole image is given.
        keys: names of the caption and of the image, for messages.
    """

    caption: str | None = None
    image: bytes | UInt8[np.ndarray, "h w 3"] | None = None
    mask: bytes | Bool[np.ndarray, "h w"] | None = None
    keys: tuple[str, str] = ("caption", "image")

    def tokens(self, tokenizer: PairTokenizer, modalities: Modalities, length: int, ar: bool) -> Given:
        """Give what is given of a row.

        Args:
            tokenizer: of the model.
            modalities: of its rows.
            length: L.
            ar: the model is autoregressive, and draws behind a whole caption only.

        Raises:
            ConfigError: a caption that does not fit with an end of text, a mask of no image, or nothing to draw.
            CapabilityError: an autoregressive model that is given more than a caption.
            DataError: a file is no image.
        """
        (places, ids), (caption_key, image_key), known = modalities, self.keys, dict[int, int]()
        blanks, picture = self.caption is not None and BLANK.search(self.caption), None
        if ar and (blanks or self.image is not None):
            raise CapabilityError(
                f"{caption_key if blanks else image_key}: an autoregressive model draws behind a whole caption; "
                "expected a pgm or mdlm"
            )
        if self.caption is not None:
            text = tokenizer.text
            if blanks:
                given = filled(self.caption, text, places, None, prefix_only=False, key=caption_key)
            else:
                given = prompted(self.caption, text, places, None, caption_key)
                given = replace(given, end=len(given.known))
            assert given.end is not None
            known = given.known | dict.fromkeys(range(given.end, places), text.eot)
        if self.image is not None:
            image = self._image(tokenizer.image, length - places)
            known |= {places + place: ids + code for place, code in image.known.items()}
            picture = image.picture
        elif self.mask is not None:
            raise ConfigError(f"mask: without {image_key}, which it is a mask of")
        if len(known) == length:
            raise ConfigError(
                f"{caption_key}: the whole caption, and {image_key} the whole image, so that nothing is left to "
                "draw; expected one of them, blanks such as [[2]], or a mask"
            )
        return Given(known, length - len(known), self.caption or "", picture=picture)

    def _image(self, tokenizer: ImageTokenizer, codes: int) -> Given:
        """Give the image, or a part of it."""
        assert self.image is not None
        if self.mask is not None:
            return painted(self.image, self.mask, tokenizer, codes, None)
        try:
            pixels = square(self.image, math.isqrt(codes) * tokenizer.factor)
        except DataError as error:
            raise DataError(f"{self.keys[1]}: {error}") from None
        return Given(dict(enumerate(tokenizer.encode(pixels[None])[0].tolist())), 0, picture=pixels)


def _squares(masked: Bool[np.ndarray, "h w"], grid: int) -> Bool[np.ndarray, "grid grid"]:
    """Return which squares of the centre's grid have a masked pixel, or a part of one."""
    side = min(masked.shape)
    top, left = ((size - side) // 2 for size in masked.shape)
    centre = masked[top : top + side, left : left + side]
    edges = [(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    return np.array([[centre[a:b, c:d].any() for c, d in edges] for a, b in edges])


def _open(key: str, content: bytes) -> Image.Image:
    """Open an image file, turned as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    except Exception as error:  # PIL's errors are of many kinds
        raise DataError(f"{key}: no image that can be read: {first_line(error)}") from None


def given_by(settings: SamplingConfig, folder: Path) -> Given | None:
    """Read what the settings give, and fit it to a model; the model's weights are not read.

    Args:
        settings: of the sampling.
        folder: local folder of the model.

    Returns:
        The given tokens; None where the settings give none.

    Raises:
        ConfigError, DataError, CapabilityError: as `prompted`, `filled` and `painted`, or a missing file.
    """
    if not (keys := settings.given):
        return None
    key, value = f"sampling.{keys[0]}", str(getattr(settings, keys[0]))
    config, facts = model_folder.read_config(folder)
    if facts.modalities is not None:
        pair = saved_tokenizer(folder)
        assert isinstance(pair, PairTokenizer), folder
        return _pair_of(settings).tokens(pair, facts.modalities, facts.length, config.kind == "ar")
    if len(keys) > 1 or (settings.mask is None and "inpaint" in keys):
        what = f"together with sampling.{keys[1]}" if len(keys) > 1 else "without sampling.mask"
        raise ConfigError(f"{key}: {what}, which only a model of captions and images takes")
    tokenizer, is_image = saved_tokenizer(folder), keys == ["inpaint"]
    if not isinstance(tokenizer, ImageTokenizer if is_image else Tokenizer):
        raise CapabilityError(
            f"{key}: {value!r}: {folder} has no tokenizer of {'images' if is_image else 'text'}"
        )
    if isinstance(tokenizer, Tokenizer):
        if keys == ["prompt"]:
            template = facts.template or "plain"
            return prompted(value, tokenizer, facts.length, facts.bos, key, template)
        text = _text(key, value)
        return filled(text, tokenizer, facts.length, facts.bos, config.kind == "ar", f"{key}: {value!r}")
    content, mask = read_file(key, value), read_file("sampling.mask", str(settings.mask))
    if config.kind == "ar":
        raise CapabilityError(
            f"{key}: an autoregressive model draws from left to right; expected a pgm or mdlm"
        )
    try:
        return painted(content, mask, tokenizer, facts.length, facts.bos)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{key}: {value!r}, sampling.mask: {settings.mask!r}: {error}") from None


def _pair_of(settings: SamplingConfig) -> GivenPair:
    """Read what the settings give of a caption and its image."""
    image, mask = settings.inpaint, settings.mask
    caption, keys = settings.prompt, ("sampling.prompt", "sampling.inpaint")
    if settings.infill is not None:
        caption, keys = _text("sampling.infill", settings.infill), ("sampling.infill", "sampling.inpaint")
    return GivenPair(
        caption,
        None if image is None else read_file("sampling.inpaint", image),
        None if mask is None else read_file("sampling.mask", mask),
        keys,
    )


def _text(key: str, path: str) -> str:
    """Read a file of text."""
    try:
        text = read_file(key, path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path!r} is not UTF-8: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")  # that editors add


def read_file(key: str, path: str | Path) -> bytes:
    """Read a file that a key or an argument names.

    Args:
        key: for messages.
        path: path or URL.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    path = arguments.text(key, str(path))
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        folder, _, name = path.rpartition("/")
        near = did_you_mean(name, storage.listing(folder or "."))
        raise ConfigError(f"{key}: {path!r}: no such file{near}") from None
    except IsADirectoryError:
        raise ConfigError(f"{key}: {path!r} is a folder; expected a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{key}: {path!r} cannot be read: {first_line(error)}") from None


def refuse(settings: SamplingConfig, job: str) -> None:
    """Refuse keys that have a meaning in `jobs.sample` alone.

    Args:
        settings: of the sampling.
        job: the job, for the message.

    Raises:
        ConfigError: one is set.
    """
    for key in settings.given:
        raise ConfigError(
            f"sampling.{key}: {getattr(settings, key)!r} is for jobs.sample; {job} expects null"
        )
    if settings.view:
        raise ConfigError(f"sampling.view: true is for jobs.sample; {job} expects false")
