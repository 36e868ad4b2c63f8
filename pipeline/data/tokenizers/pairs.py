"""The tokenizers of captions and of images, of rows that hold both."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from pipeline.data.tokenizers.interface import Tokenizer

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer


class PairTokenizer:
    """A tokenizer of text and one of images. Their files have different names, and lie in one folder.

    The ids of a row are those of its caption, and behind them its codes, each plus the number of ids of text.

    Args:
        text: of the captions.
        image: of the images.

    Attributes:
        text, image: as given.
        name: for people.
        hash: SHA-256 over everything that determines ids.
    """

    def __init__(self, text: Tokenizer, image: "ImageTokenizer"):
        self.text, self.image = text, image
        self.name = f"{text.name} and {image.name}"
        self.hash = hashlib.sha256(f"{text.hash} {image.hash}".encode()).hexdigest()

    def encode_captions(self, captions: Sequence[str], length: int) -> tuple[Int64[np.ndarray, "n T"], int]:
        """Encode captions, each with end of text up to one length.

        Args:
            captions: any number of them.
            length: T; what a caption has beyond it is cut off.

        Returns:
            The ids, and the number of captions that do not fit with an end of text.

        Raises:
            ConfigError: a caption is no text.
            DataError: the tokenizer fails at one.
        """
        ids, cut = np.full((len(captions), length), self.text.eot, np.int64), 0
        for row, caption in zip(ids, self.text.encode_batch(captions), strict=True):
            row[: len(caption)] = caption[:length]
            cut += len(caption) >= length
        return ids, cut

    def encode_images(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n codes"]:
        """Encode images as ids of rows.

        Args:
            images: square pictures in RGB.
        """
        return self.image.encode(images) + self.text.vocab_size

    def captions(self, rows: Integer[np.ndarray, "n L"], length: int) -> list[str]:
        """Decode the captions of rows, each up to its first end of text.

        Args:
            rows: of ids.
            length: T.
        """
        texts = []
        for ids in rows[:, :length].tolist():
            texts.append(self.text.decode(ids[: ids.index(self.text.eot)] if self.text.eot in ids else ids))
        return texts

    def images(self, rows: Integer[np.ndarray, "n L"], length: int) -> UInt8[np.ndarray, "n S S 3"]:
        """Decode the images of rows.

        Args:
            rows: of ids.
            length: T, tokens of the captions.
        """
        return self.image.decode(rows[:, length:].astype(np.int64) - self.text.vocab_size)

    def save(self, folder: Path) -> None:
        """Write the files of both tokenizers.

        Args:
            folder: made if it does not exist.
        """
        self.text.save(folder)
        self.image.save(folder)
