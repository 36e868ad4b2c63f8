"""Tokenizers of the Hugging Face `tokenizers` library: a `tokenizer.json`, a `vocab.txt` of BERT, or trained here."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipeline import storage
from pipeline.data.tokenizers.interface import END_OF_TEXT, Tokenizer
from pipeline.errors import ConfigError, DataError, did_you_mean, kind_and_line

log = logging.getLogger(__name__)

TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocab.txt"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # name the special tokens

# Keys of the side files, then texts by convention, the first that is there; `tokenizer.json` itself names no roles.
_ROLES = {
    "eot": (
        ("eos_token", "sep_token"),
        (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]", "<sep>"),
    ),
    "bos": (
        ("bos_token", "cls_token"),
        ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "[CLS]", "<cls>"),
    ),
    "pad": (("pad_token",), ("<|pad|>", "<|padding|>", "<pad>", "[PAD]")),
}
_NOT_IDS = ("version", "truncation", "padding", "post_processor", "decoder")  # keys that no id depends on
_MIN_FREQUENCY = 2  # of a pair that is merged


class FastTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library. It neither cuts nor pads, and adds no special tokens.

    Args:
        name: for people.
        definition: the content of its `tokenizer.json`, in which all tokens with a role are special.
        special: ids by role: `eot`, `bos` and `pad`, of which the last two may be None.

    Raises:
        Exception: the library refuses the definition.
    """

    kind = "fast"

    def __init__(self, name: str, definition: Mapping[str, Any], special: Mapping[str, int | None]) -> None:
        self.name = name
        self._special = {role: special[role] for role in _ROLES}
        assert self._special["eot"] is not None
        self.eot, self.bos, self.pad = self._special["eot"], self._special["bos"], self._special["pad"]
        self._definition = {**definition, "truncation": None, "padding": None}
        if isinstance(model := definition.get("model"), dict) and model.get("dropout"):
            self._definition["model"] = {**model, "dropout": None}  # which would draw ids at random
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._definition))
        self._tokenizer.encode_special_tokens = True  # as plain text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        determines = {key: value for key, value in self._definition.items() if key not in _NOT_IDS}
        canonical = json.dumps([_canonical(determines), self._special], sort_keys=True)
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "n"]:
        """See `Tokenizer.encode`."""
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # such as a vocabulary without the token for unknown words
            raise DataError(f"{len(text)} characters cannot be tokenised: {kind_and_line(error)}") from None
        ids = np.array(encoding.ids, np.int64)
        for role, i in self._special.items():
            if i is not None and (ids == i).any():  # of word-level vocabularies, which have no smaller pieces
                token = self._tokenizer.id_to_token(i)
                raise DataError(
                    f"the text has the word {token!r}, which tokenizer {self.name!r} uses as {role}"
                )
        return ids

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "n"]) -> str:
        """See `Tokenizer.decode`."""
        parts: list[list[int]] = [[]]
        for i in map(int, ids):
            if i == self.eot:
                parts.append([])
            elif i not in (self.bos, self.pad):
                parts[-1].append(i)
        return END_OF_TEXT.join(self._tokenizer.decode(part, skip_special_tokens=False) for part in parts)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        super().save(folder)
        text = json.dumps(self._definition, ensure_ascii=False, indent=1)
        (folder / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")

    def _details(self) -> dict[str, Any]:
        return self._special


def read_fast(name: str, files: Mapping[str, bytes]) -> FastTokenizer:
    """Make a tokenizer from the files of a Hugging Face model.

    The end of text, BOS and padding are the tokens that the side files name (`eos_token` before `sep_token`,
    `bos_token` before `cls_token`, `pad_token`), else those of the usual names, such as `<|endoftext|>`, `</s>` and
    `[SEP]`. One that is the end of text too counts as none.

    Args:
        name: for people and messages.
        files: contents by name: `tokenizer.json`, or else `vocab.txt` (WordPiece), and side files if there are any.

    Raises:
        ConfigError: it has no end of text, or there is no file of a tokenizer.
        DataError: a file is damaged.
    """
    if not files.keys() & {TOKENIZER_FILE, VOCABULARY_FILE}:
        what = f"has neither {TOKENIZER_FILE} nor {VOCABULARY_FILE}"
        raise ConfigError(
            f"data.tokenizer: {name!r} {what}; expected a tokenizer of the Hugging Face library"
        )
    side: dict[str, Any] = {}
    for file in SIDE_FILES:
        if file in files:
            side = {**_json(name, file, files[file]), **side}
    try:
        if TOKENIZER_FILE in files:
            definition = _json(name, TOKENIZER_FILE, files[TOKENIZER_FILE])
        else:
            # Not `splitlines`, for which some entries of such files are line ends.
            words = (
                files[VOCABULARY_FILE].decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
            )
            definition = json.loads(_word_piece({word: i for i, word in enumerate(words)}, side).to_str())
        library = tokenizers.Tokenizer.from_str(json.dumps(definition))
        special = _special(name, library, side)
        tokens = {i: str(library.id_to_token(i)) for i in special.values() if i is not None}
        return FastTokenizer(name, _with_special(definition, tokens), special)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the library has errors of its own, of no common class
        raise DataError(
            f"data.tokenizer: {name!r} is damaged, or not a tokenizer of the Hugging Face library: "
            f"{kind_and_line(error)}"
        ) from None


def train_bpe(size: int, texts: Iterable[str]) -> FastTokenizer:
    """Train a byte-level BPE on texts; the result depends on nothing but the texts, not even on their order.

    Args:
        size: number of ids: the bytes, their merges, and the end of text, which is the last. Where the texts have too
            few pairs that occur again, the ids before the last are not used.
        texts: any number of them, read once.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    if (found := tokenizer.get_vocab_size() + 1) < size:
        log.warning("data.tokenizer: bpe:%d has only %d entries, since the text is short", size, found)
    definition = json.loads(tokenizer.to_str())
    definition["model"]["vocab"][END_OF_TEXT] = size - 1
    special = {"eot": size - 1, "bos": None, "pad": None}
    return FastTokenizer(f"bpe:{size}", _with_special(definition, {size - 1: END_OF_TEXT}), special)


def _special(name: str, library: tokenizers.Tokenizer, side: Mapping[str, Any]) -> dict[str, int | None]:
    """Find the ids of the special tokens by role."""
    found: dict[str, int | None] = {}
    for role, (keys, texts) in _ROLES.items():
        named = [side[key] for key in keys if side.get(key)]
        texts = (*(str(each["content"]) if isinstance(each, dict) else str(each) for each in named), *texts)
        found[role] = next((i for text in texts if (i := library.token_to_id(text)) is not None), None)
    if found["eot"] is None:
        added = [token.content for token in library.get_added_tokens_decoder().values()]
        usual = ", ".join(_ROLES["eot"][1])
        raise ConfigError(
            f"data.tokenizer: {name!r} has no end-of-text token, which separates documents; expected one of {usual}, "
            f"or eos_token or sep_token in a {SIDE_FILES[0]} beside it; its special tokens are "
            f"{', '.join(added) or 'none'}{did_you_mean(END_OF_TEXT, added)}"
        )
    return {role: None if role != "eot" and i == found["eot"] else i for role, i in found.items()}


def _with_special(definition: Mapping[str, Any], special: Mapping[int, str]) -> dict[str, Any]:
    """Return a definition in which the tokens with a role, texts by id, are added tokens and special."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = {token["id"]: dict(token) for token in definition.get("added_tokens") or []}
    for i, text in special.items():
        tokens[i] = {"id": i, "content": text, **plain, **tokens.get(i, {}), "special": True}
    return {**definition, "added_tokens": [tokens[i] for i in sorted(tokens)]}


def _word_piece(pieces: dict[str, int], side: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make the tokenizer of BERT that belongs to a vocabulary, as its side files say."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(side.get("do_lower_case", True)),
        strip_accents=side.get("strip_accents"),
        handle_chinese_chars=bool(side.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _canonical(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a definition with its merges in the form of newer versions, as pairs."""
    model = dict(definition.get("model") or {})
    if merges := model.get("merges"):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {**definition, "model": model}


def _json(name: str, file: str, content: bytes) -> dict[str, Any]:
    """Parse a file that holds a JSON object."""
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} of {name!r} is damaged: {kind_and_line(error)}") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"data.tokenizer: {file} of {name!r} holds a {type(tree).__name__}; expected an object"
        )
    return tree


def files_in(folder: str) -> dict[str, bytes]:
    """Read the files of a tokenizer in a folder.

    Args:
        folder: path or URL.

    Returns:
        Contents by name of those that are there.
    """
    names = (TOKENIZER_FILE, VOCABULARY_FILE, *SIDE_FILES)
    there = set(storage.listing(folder))
    return {name: storage.read_bytes(storage.join(folder, name)) for name in names if name in there}


def files_on_hub(spec: str) -> dict[str, bytes]:
    """Download the files of a tokenizer from the Hugging Face hub, or find them in its cache.

    Args:
        spec: "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION".

    Returns:
        Contents by name.

    Raises:
        ConfigError: they cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download  # slow to import, and other tokenizers do without
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = spec.removeprefix("hf:").partition("@")
    files: dict[str, bytes] = {}
    missing: Exception | None = None
    for name in (TOKENIZER_FILE, VOCABULARY_FILE, *SIDE_FILES):
        if name == VOCABULARY_FILE and TOKENIZER_FILE in files:
            continue
        try:
            files[name] = Path(hf_hub_download(repository, name, revision=revision or None)).read_bytes()
        except LocalEntryNotFoundError as error:  # no network, and not in the cache
            if files.keys() & {TOKENIZER_FILE, VOCABULARY_FILE}:
                continue
            if name == TOKENIZER_FILE:
                missing = error
                continue
            raise _not_downloaded(spec, repository, missing or error) from error
        except EntryNotFoundError:  # the repository has no such file
            continue
        except Exception as error:  # errors of several libraries, which have no base class in common
            raise _not_downloaded(spec, repository, error) from error
    return files


def _not_downloaded(spec: str, repository: str, error: Exception) -> ConfigError:
    """Return the error that says what to download, and where to put it."""
    return ConfigError(
        f"data.tokenizer: {spec!r} could not be downloaded ({type(error).__name__}); on a machine with a network, "
        f"download {TOKENIZER_FILE} and {SIDE_FILES[0]} from https://huggingface.co/{repository}/tree/main into a "
        "folder, and set data.tokenizer to that folder"
    )
