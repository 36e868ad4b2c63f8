"""Byte-pair encoding by the ranks of tiktoken: its encodings by name, and `.tiktoken` files."""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from jaxtyping import Integer

from pipeline import storage
from pipeline.data.tokenizers.interface import END_OF_TEXT, Tokenizer
from pipeline.errors import ConfigError, DataError, did_you_mean, kind_and_line

# GPT-2's split into words, which ranks alone do not determine (same pieces as the original pattern, faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
RANK_FILE = "ranks.tiktoken"
ENCODINGS = tuple(tiktoken.list_encoding_names())  # known by name
_ADDRESS = "https://openaipublic.blob.core.windows.net/"
_FILES = {  # at the address, where the name of the encoding does not say it
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "p50k_edit": ("encodings/p50k_base.tiktoken",),
    "o200k_harmony": ("encodings/o200k_base.tiktoken",),
}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by ranks.

    Args:
        name: for people.
        ranks: bytes of a token -> its id.
        pattern: regular expression of the words that are encoded one by one.
        eot: id of the end of text; None: the id after the last rank.
        vocab_size: V; None: as many as ranks and `eot` need.
    """

    kind = "bpe"

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        pattern: str = PATTERN,
        eot: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.name, self.pattern = name, pattern
        after = max(ranks.values()) + 1
        self.eot = after if eot is None else eot
        self.vocab_size = vocab_size or max(after, self.eot + 1)
        self._lines = b"".join(
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        ends = b"" if self.eot + 1 == self.vocab_size == after + 1 else b"%d %d" % (self.eot, self.vocab_size)
        self.hash = hashlib.sha256(pattern.encode() + b"\n" + self._lines + ends).hexdigest()
        # Ids may be left out, or mean something in conversations; a model may still draw them, so they need a text.
        known = {*ranks.values(), self.eot}
        unused = {f"<|unused_{i}|>": i for i in range(self.vocab_size) if i not in known}
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot, **unused}
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

    def _details(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "eot": self.eot}


def load_encoding(name: str) -> BPETokenizer:
    """Load an encoding of tiktoken, which downloads it on first use.

    Args:
        name: one of `ENCODINGS`.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors) or a damaged file
        addresses = [_ADDRESS + file for file in _FILES.get(name, (f"encodings/{name}.tiktoken",))]
        files = " and ".join(f"{at} as {hashlib.sha1(at.encode()).hexdigest()}" for at in addresses)
        raise ConfigError(
            f"data.tokenizer: {name!r} could not be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR"
            f" to a folder that has it (download {files}), or name a .tiktoken rank file"
        ) from error
    ranks = {}
    special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    for i in set(range(encoding.n_vocab)) - special:
        try:
            ranks[encoding.decode_single_token_bytes(i)] = i
        except KeyError:  # an id that is left out
            continue
    return BPETokenizer(name, ranks, encoding._pat_str, encoding.eot_token, encoding.n_vocab)


def read_ranks(path: str) -> dict[bytes, int]:
    """Read a rank file: a line `base64(token) rank` for each token.

    Args:
        path: path or URL of the file.

    Raises:
        ConfigError: there is no such file.
        DataError: it is damaged.
    """
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
