"""The interface of all tokenizers of text."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from pipeline import arguments

END_OF_TEXT = "<|endoftext|>"
INFO_FILE = "tokenizer_info.json"  # what the files of other libraries do not say


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        kind: "bytes", "text8", "bpe" (ranks of tiktoken) or "fast" (Hugging Face), as saved folders have it.
        name: for people; what determines the ids is `hash`.
        vocab_size: V; ids are 0..V-1, `eot` among them.
        eot: id of the end-of-text token, which `encode` never returns.
        bos: id of the token that begins a text; None where the tokenizer has none of its own.
        pad: id of the token that fills rows up; None where the tokenizer has none of its own.
        hash: SHA-256 over everything that determines the ids.
    """

    kind: str
    name: str
    vocab_size: int
    eot: int
    bos: int | None = None
    pad: int | None = None
    hash: str

    @abstractmethod
    def encode(self, text: str) -> Integer[np.ndarray, "n"]:
        """Encode a text; what looks like a special token is plain text.

        Args:
            text: of any length.

        Returns:
            Its ids, without BOS and EOT.

        Raises:
            DataError: the tokenizer fails at this text.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "n"]]:
        """Encode texts, see `encode`.

        Args:
            texts: any number of them.

        Returns:
            The ids of every text.

        Raises:
            ConfigError: one is no text, or UTF-8 cannot write it.
            DataError: the tokenizer fails at one.
        """
        return [self.encode(arguments.text("texts", text)) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "n"]) -> str:
        """Decode ids.

        Args:
            ids: 0..V-1.

        Returns:
            Their text, in which broken UTF-8 is U+FFFD, EOT is `<|endoftext|>`, and BOS and padding are nothing.
        """

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs, offline and on another machine.

        Args:
            folder: made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        info = {"kind": self.kind, "name": self.name, "vocabulary": self.vocab_size, "hash": self.hash}
        (folder / INFO_FILE).write_text(json.dumps(info | self._details(), indent=2) + "\n", encoding="utf-8")

    def _details(self) -> dict[str, Any]:
        """Return what the information file says of this kind of tokenizer alone."""
        return {}
