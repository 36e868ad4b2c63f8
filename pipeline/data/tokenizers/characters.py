"""Tokenizers whose ids are bytes or the characters of a fixed alphabet."""

import hashlib
import string
from collections.abc import Iterable

import numpy as np
from jaxtyping import Integer

from pipeline.data.tokenizers.interface import END_OF_TEXT, Tokenizer
from pipeline.errors import DataError

_BYTES = [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]  # texts of the ids of bytes
_TEXT8 = " " + string.ascii_lowercase
_TEXT8_IDS = np.full(256, 255, np.uint8)  # by byte; 255: not in the alphabet
_TEXT8_IDS[np.frombuffer(_TEXT8.encode(), np.uint8)] = np.arange(len(_TEXT8))


class ByteTokenizer(Tokenizer):
    """The tokenizer whose ids are UTF-8 bytes, 0..255, and EOT = 256."""

    kind = name = "bytes"
    vocab_size, eot = 257, 256
    hash = hashlib.sha256(b"utf-8 bytes, eot 256").hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "n"]:
        """See `Tokenizer.encode`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "n"]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(_BYTES[int(i)] for i in ids).decode("utf-8", "replace")


class Text8Tokenizer(Tokenizer):
    """The 27 characters of text8: the space is 0, a to z are 1..26, and EOT = 27."""

    kind = name = "text8"
    vocab_size, eot = len(_TEXT8) + 1, len(_TEXT8)
    hash = hashlib.sha256(b"text8: space, a to z, eot 27").hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "n"]:
        """See `Tokenizer.encode`; a character outside the alphabet is an error."""
        ids = _TEXT8_IDS[np.frombuffer(text.encode("utf-8"), np.uint8)]
        if (ids == 255).any():
            place, character = next((i, c) for i, c in enumerate(text) if c not in _TEXT8)
            raise DataError(
                f"character {character!r} at {place}; expected a to z and spaces, as tokenizer 'text8' needs "
                "(data.text_filter: text8 turns any text into these)"
            )
        return ids

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "n"]) -> str:
        """See `Tokenizer.decode`."""
        return "".join(_TEXT8[int(i)] if i < self.eot else END_OF_TEXT for i in ids)
