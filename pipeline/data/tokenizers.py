"""Text to token ids and back: plain bytes, GPT-2's BPE, or the ranks of any `.tiktoken` file."""

import base64
import binascii
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from jaxtyping import Integer

from pipeline import arguments, storage
from pipeline.errors import ConfigError, DataError, did_you_mean, kind_and_line

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer

# GPT-2's split into words, which ranks alone do not determine (same pieces as the original pattern, faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
INFO_FILE = "tokenizer_info.json"  # not tokenizer.json, which other libraries would take for theirs
RANK_FILE = "ranks.tiktoken"
IMAGES_AT_ONCE = 16  # decoded together
_BYTES = [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]  # texts of the ids of bytes


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        kind: "bytes" or "bpe", as saved folders have it.
        name: for people; what determines the ids is `hash`.
        vocab_size: V; ids are 0..V-1, `eot` among them.
        eot: id of the end-of-text token, which `encode` never returns.
        bos: id of the token that begins a text; None where the tokenizer has none of its own.
        pad: id of the token that fills rows up; None where the tokenizer has none.
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
            Its ids, without EOT.

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
            Their text, in which broken UTF-8 is U+FFFD and EOT is `<|endoftext|>`.
        """

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs, offline and on another machine.

        Args:
            folder: made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        info = {"kind": self.kind, "name": self.name, "vocabulary": self.vocab_size, "hash": self.hash}
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


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


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by ranks, on GPT-2's words; EOT is the id after the last rank.

    Args:
        name: for people.
        ranks: bytes of a token -> its id.
    """

    kind = "bpe"

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self.eot = max(ranks.values()) + 1
        self.vocab_size = self.eot + 1
        self._lines = b"".join(
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        self.hash = hashlib.sha256(PATTERN.encode() + b"\n" + self._lines).hexdigest()
        # Some rank files leave ids out; a model may still draw them, so they need a text.
        unused = {f"<|unused_{i}|>": i for i in sorted(set(range(self.eot)) - set(ranks.values()))}
        self._encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot, **unused}
        )

    def encode(self, text: str) -> Integer[np.ndarray, "n"]:
        """See `Tokenizer.encode`."""
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except Exception as error:  # its regular expression has limits, such as on many spaces in a row
            what = f"{len(text)} characters cannot be tokenised"
            raise DataError(f"{what}: {kind_and_line(error)}") from None

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "n"]) -> str:
        """See `Tokenizer.decode`."""
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        super().save(folder)
        (folder / RANK_FILE).write_bytes(self._lines)


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer of text.

    Args:
        spec: "bytes", "gpt2", the path or URL of a `.tiktoken` rank file, or a folder that `save` wrote.

    Raises:
        ConfigError: there is no such tokenizer, or GPT-2's cannot be downloaded.
        DataError: a file of it is damaged.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "gpt2":
        return BPETokenizer("gpt2", _gpt2_ranks())
    if spec.lower().endswith(".tiktoken"):
        return BPETokenizer(Path(spec).stem, _read_ranks(spec))
    path = storage.join(spec, INFO_FILE)
    if info := storage.read_json(
        path, parse=lambda info: tuple(str(info[key]) for key in ("kind", "name", "hash"))
    ):
        return _load_folder(spec, *info)
    raise ConfigError(
        f"data.tokenizer: {spec!r} is unknown; expected 'bytes', 'gpt2', a .tiktoken rank file "
        f"or a folder with {INFO_FILE}{did_you_mean(spec, ['bytes', 'gpt2'])}"
    )


def _load_folder(spec: str, kind: str, name: str, expected: str) -> Tokenizer:
    """Load what `Tokenizer.save` wrote into a folder."""
    path, kinds = storage.join(spec, INFO_FILE), (ByteTokenizer.kind, BPETokenizer.kind)
    if kind not in kinds:
        raise DataError(f"{path}: kind {kind!r}; expected {' or '.join(kinds)}{did_you_mean(kind, kinds)}")
    ranks = storage.join(spec, RANK_FILE)
    tokenizer = ByteTokenizer() if kind == ByteTokenizer.kind else BPETokenizer(name, _read_ranks(ranks))
    if tokenizer.hash != expected:
        raise DataError(
            f"{path}: hash {expected!r} is not that of the tokenizer; expected {tokenizer.hash!r}"
        )
    return tokenizer


def saved_tokenizer(folder: Path) -> "Tokenizer | ImageTokenizer | None":
    """Load the tokenizer that was saved in a model's folder, of text or of images.

    Args:
        folder: local folder of the model.

    Returns:
        The tokenizer, or None if there is none.
    """
    from pipeline.models import vq  # takes seconds, and the preparation of text does without

    if (folder / vq.INFO_FILE).is_file():
        return vq.load_image_tokenizer(str(folder), None, IMAGES_AT_ONCE, device="cpu")
    return load_tokenizer(str(folder)) if (folder / INFO_FILE).is_file() else None


def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's ranks, downloaded by tiktoken on first use."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors) or a damaged file
        raise ConfigError(
            f"data.tokenizer: 'gpt2' could not be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR"
            " to a folder that has it, or name a .tiktoken rank file"
        ) from error
    return {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}


def _read_ranks(path: str) -> dict[bytes, int]:
    """A rank file: a line `base64(token) rank` for each token."""
    if not storage.exists(path):
        near = did_you_mean(Path(path).name, storage.listing(path.rpartition("/")[0] or "."))
        raise ConfigError(f"data.tokenizer: rank file {path!r} does not exist{near}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(storage.read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}: line {number} is {line[:40]!r}; expected base64(token) and a rank"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        fault = f"has no rank for byte {missing[0]}" if missing else "has a rank twice, or below 0"
        raise DataError(f"{path}: {fault}; not a whole rank file")
    return ranks
