"""Loading a tokenizer by name, from a file, from a folder or from the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.data.tokenizers import ranks
from pipeline.data.tokenizers.characters import ByteTokenizer, Text8Tokenizer
from pipeline.data.tokenizers.fast import (
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    FastTokenizer,
    files_in,
    files_on_hub,
    read_fast,
)
from pipeline.data.tokenizers.interface import INFO_FILE, Tokenizer
from pipeline.data.tokenizers.pairs import PairTokenizer
from pipeline.data.tokenizers.ranks import RANK_FILE, BPETokenizer, load_encoding, read_ranks
from pipeline.errors import ConfigError, DataError, did_you_mean, kind_and_line

if TYPE_CHECKING:
    from pipeline.models.vq import ImageTokenizer

IMAGES_AT_ONCE = 16  # decoded together
_CHARACTERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "text8": Text8Tokenizer}
_NAMES = (*_CHARACTERS, *ranks.ENCODINGS)
_KINDS = (*_CHARACTERS, BPETokenizer.kind, FastTokenizer.kind)


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer of text.

    Args:
        spec: "bytes", "text8", an encoding of tiktoken such as "gpt2", "hf:OWNER/NAME" of the Hugging Face hub, the
            path or URL of a `.tiktoken` rank file or a `tokenizer.json`, or a folder that `save` wrote or that has a
            `tokenizer.json` or a `vocab.txt`.

    Raises:
        ConfigError: there is no such tokenizer, it has no end of text, or it cannot be downloaded.
        DataError: a file of it is damaged.
    """
    if spec in _CHARACTERS:
        return _CHARACTERS[spec]()
    if spec in ranks.ENCODINGS:
        return load_encoding(spec)
    if spec.startswith("bpe:"):
        raise ConfigError(
            f"data.tokenizer: {spec!r} is trained on the training documents of a data set; to use one elsewhere, "
            "name the folder of a model, or the folder `tokenizer` in that of the data"
        )
    if spec.startswith("hf:"):
        folder = storage.resolve(spec.removeprefix("hf:"))
        return read_fast(spec, files_in(folder) if Path(folder).is_dir() else files_on_hub(spec))
    if spec.lower().endswith(".tiktoken"):
        return BPETokenizer(Path(spec).stem, read_ranks(spec))
    if spec.lower().endswith(".json"):
        return _load_file(spec)
    path = storage.join(spec, INFO_FILE)
    if info := storage.read_json(path, parse=lambda info: {**info, "kind": str(info["kind"])}):
        return _load_saved(spec, info)
    files = files_in(spec)
    if files.keys() & {TOKENIZER_FILE, VOCABULARY_FILE}:
        return read_fast(Path(spec).name, files)
    raise ConfigError(
        f"data.tokenizer: {spec!r} is unknown; expected one of {', '.join(map(repr, _NAMES))}, 'bpe:N', "
        f"'hf:OWNER/NAME', a .tiktoken rank file, a {TOKENIZER_FILE}, or a folder with {TOKENIZER_FILE}, "
        f"{VOCABULARY_FILE} or {INFO_FILE}{did_you_mean(spec, _NAMES)}"
    )


def _load_file(spec: str) -> Tokenizer:
    """Load a `tokenizer.json` of any name, with the side files beside it."""
    folder, _, name = spec.rpartition("/")
    if not storage.exists(spec):
        near = did_you_mean(name, storage.listing(folder or "."))
        raise ConfigError(f"data.tokenizer: file {spec!r} does not exist{near}")
    files = files_in(folder or ".") | {TOKENIZER_FILE: storage.read_bytes(spec)}
    return read_fast(Path(folder).name if name == TOKENIZER_FILE and folder else Path(spec).stem, files)


def _load_saved(spec: str, info: dict[str, Any]) -> Tokenizer:
    """Load what `Tokenizer.save` wrote into a folder."""
    path, kind = storage.join(spec, INFO_FILE), info["kind"]
    if kind not in _KINDS:
        raise DataError(f"{path}: kind {kind!r}; expected {' or '.join(_KINDS)}{did_you_mean(kind, _KINDS)}")
    tokenizer: Tokenizer
    try:
        name, expected = str(info["name"]), str(info["hash"])
        if kind in _CHARACTERS:
            tokenizer = _CHARACTERS[kind]()
        elif kind == BPETokenizer.kind:
            found, given = read_ranks(storage.join(spec, RANK_FILE)), ("pattern", "eot")
            more = {key: info[key] for key in given if key in info}  # which earlier versions did not write
            size = int(info["vocabulary"]) if more else None
            tokenizer = BPETokenizer(name, found, **more, vocab_size=size)
        else:
            definition = storage.read_json(storage.join(spec, TOKENIZER_FILE))
            tokenizer = FastTokenizer(name, definition, info)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # of the library, or a field that is missing
        raise DataError(
            f"{path}: damaged, or {TOKENIZER_FILE} beside it is: {kind_and_line(error)}"
        ) from None
    if tokenizer.hash != expected:
        raise DataError(
            f"{path}: hash {expected!r} is not that of the tokenizer; expected {tokenizer.hash!r}"
        )
    return tokenizer


def saved_tokenizer(folder: Path) -> "Tokenizer | ImageTokenizer | PairTokenizer | None":
    """Load the tokenizer that was saved in a model's folder, of text, of images or of both.

    Args:
        folder: local folder of the model.

    Returns:
        The tokenizer, or None if there is none.
    """
    from pipeline.models import vq  # takes seconds, and the preparation of text does without

    text = load_tokenizer(str(folder)) if (folder / INFO_FILE).is_file() else None
    if not (folder / vq.INFO_FILE).is_file():
        return text
    image = vq.load_image_tokenizer(str(folder), None, IMAGES_AT_ONCE, device="cpu")
    return image if text is None else PairTokenizer(text, image)
