"""The manifest of prepared data: what a folder of shards holds, and whether it fits a config."""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.config.data import PairDataConfig, PictureDataConfig, TemplateName, TextDataConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import Tokenizer, load_tokenizer
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.models.model_folder import DataFacts

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # folder beside the shards
_BESIDE = "../"


class _Frozen(BaseModel):
    """A part of the manifest, which refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SpecialIds(_Frozen):
    """Token ids with a meaning of their own.

    Attributes:
        eot: end of text; None for images.
        bos: the id at the start of every row; None where rows have none.
        pad: the id behind the tokens of a row; None where rows have no padding.
    """

    eot: int | None
    bos: int | None
    pad: int | None = None

    @classmethod
    def of_text(cls, data: TextDataConfig, tokenizer: Tokenizer) -> Self:
        """Return the ids in rows of text; the end of text stands for those that a tokenizer lacks.

        Args:
            data: the data section of the config.
            tokenizer: that makes the ids.
        """
        eot, bos, pad = tokenizer.eot, tokenizer.bos, tokenizer.pad
        if data.wrap == "none":
            return cls(eot=eot, bos=None)
        if data.wrap == "bos_eos":
            return cls(eot=eot, bos=eot)
        return cls(eot=eot, bos=eot if bos is None else bos, pad=eot if pad is None else pad)


class TokenizerInfo(_Frozen):
    """The tokenizer that made the ids.

    Attributes:
        name: for people.
        hash: SHA-256 of everything that determines the ids.
    """

    name: str
    hash: str


class SourceInfo(_Frozen):
    """The source of the documents or images.

    Attributes:
        name: `data.source`.
        revision: commit of a dataset of the Hugging Face hub.
        fingerprint: SHA-256 of the names and sizes of what was read; the same for a copy elsewhere.
    """

    name: str
    revision: str | None
    fingerprint: str


class ShardFile(_Frozen):
    """One Parquet file.

    Attributes:
        name: in the folder of the shards; "../FOLDER/NAME" in a folder beside it.
        rows: number of rows.
        sha256: of the file's bytes.
        row_lengths: number of rows of every length from 0 on; None where rows have no padding.
    """

    name: str
    rows: int
    sha256: str
    row_lengths: tuple[int, ...] | None = None


class Split(_Frozen):
    """One split of the data.

    Attributes:
        files: the shards in order.
        documents: number of documents with any text, or of images.
        tokens: number of tokens; of text with the EOT of every document, of images with the BOS of every row, of
            padded rows with both and without the padding.
        tokens_dropped: how many of the tokens of text are left out, since they do not fill a last row.
        bytes: UTF-8 bytes of the documents; None for images, and for data of earlier versions.
    """

    files: tuple[ShardFile, ...]
    documents: int
    tokens: int
    tokens_dropped: int
    bytes: int | None = None

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Number of rows of every length from 0 on; empty where rows have no padding."""
        counts = (file.row_lengths or () for file in self.files)
        return tuple(map(sum, zip_longest(*counts, fillvalue=0)))


class MixedPart(_Frozen):
    """A source of a mixture.

    Attributes:
        name: `source` of the part.
        weight: share of the rows of training, relative to the other parts.
        shards: number of its training shards, which follow those of the parts before it.
    """

    name: str
    weight: float
    shards: int


class Skipped(_Frozen):
    """Documents or rests of files that could not be read (`data.on_error: skip`).

    Attributes:
        count: how many.
        names: descriptions of the first ones.
    """

    count: int
    names: tuple[str, ...]


class Manifest(_Frozen):
    """What a folder of shards holds. It is written last, so a folder that has a manifest is complete.

    Attributes:
        length: L, tokens of a row.
        vocabulary: V, number of ids without any mask.
        special: ids with a meaning of their own.
        wrap: `data.wrap`; "none" for images.
        tokenizer: what made the ids.
        source: what was read.
        content: by key of the config, every setting that determined what the shards hold.
        content_key: SHA-256 of `content`.
        splits: "train" and "validation"; "validation" alone in data for evaluation only.
        documents: number of documents with any text, or of images.
        documents_empty: number of documents without text, which are left out.
        tokens: number of tokens of all splits.
        skipped: what could not be read.
        classes: C of labelled images, whose rows have a label in 0..C-1.
        class_names: by label, where the source has them.
        grid: side of the grid of codes behind the BOS or the caption; None for text.
        rows_cut: number of rows whose answer is cut.
        rows_full: number of documents that are left out because their prompt fills the row.
        answer_block: answers go on with end of text up to a multiple of so many tokens; None: rows are no prompts and
            answers.
        template: `data.template` of the prompts.
        mix: the sources of a mixture, whose shards lie in folders of their own; None: there is one source.
        caption: tokens of the caption at the start of every row, behind which its image begins; None: rows are no
            such pairs.
        text_ids: number of ids of text in such rows, behind which those of images begin.
    """

    length: int
    vocabulary: int
    special: SpecialIds
    wrap: str
    tokenizer: TokenizerInfo
    source: SourceInfo
    content: dict[str, Any]
    content_key: str
    splits: dict[str, Split]
    documents: int
    documents_empty: int
    tokens: int
    skipped: Skipped
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    grid: int | None = None
    rows_cut: int = 0
    rows_full: int = 0
    answer_block: int | None = None
    template: TemplateName = "plain"
    mix: tuple[MixedPart, ...] | None = None
    caption: int | None = None
    text_ids: int | None = None

    @classmethod
    def read(cls, path: str) -> "Manifest":
        """Read the manifest of a folder.

        Args:
            path: the folder.

        Raises:
            DataError: there is no manifest, or it is damaged.
        """
        file = storage.join(path, MANIFEST)
        if not storage.exists(file):
            raise DataError(f"{path}: no {MANIFEST}; `python -m jobs.prepare CONFIG` prepares the data")
        try:
            return cls.model_validate_json(storage.read_bytes(file))
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
                "remove the folder and prepare it again"
            ) from None

    @property
    def identity(self) -> dict[str, str]:
        """What tells these rows from those that the same config made of other files: hashes by name."""
        return {"tokenizer": self.tokenizer.hash, "source": self.source.fingerprint}

    def shard_path(self, path: str, file: ShardFile) -> str:
        """Return the path of a shard.

        Args:
            path: folder of the manifest.
            file: the shard.
        """
        if file.name.startswith(_BESIDE):
            return storage.join(path.rpartition("/")[0], file.name.removeprefix(_BESIDE))
        return storage.join(path, file.name)

    def publish(self, path: str) -> None:
        """Write the manifest, which completes the folder of the shards.

        Args:
            path: the folder.
        """
        storage.publish_text(storage.join(path, MANIFEST), self.model_dump_json(indent=2) + "\n")

    @property
    def ids(self) -> int:
        """The number of ids that rows may hold: the vocabulary, and the mask and BOS of images behind it."""
        return max(self.vocabulary, 1 + (self.special.bos or 0))

    @property
    def padded(self) -> bool:
        """Whether rows may hold padding behind their tokens."""
        return self.special.pad is not None

    @property
    def facts(self) -> DataFacts:
        """What a model must know about the data."""
        return DataFacts(
            self.vocabulary,
            self.length,
            self.special.bos,
            self.special.eot,
            pad=self.special.pad,
            row_lengths=self.split("train").row_lengths if self.padded else None,
            class_names=self.class_names,
            answer_block=self.answer_block,
            template=None if self.answer_block is None else self.template,
            caption=self.caption,
            text_ids=self.text_ids,
        )

    def split(self, name: str) -> Split:
        """Return a split.

        Args:
            name: "train" or "validation".

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"no split {name!r} in the data; known: {known}{did_you_mean(name, self.splits)}")
        return self.splits[name]

    def bits_per_byte(self, nats: float, scored_bos: bool = False) -> float | None:
        """Convert the likelihood of validation rows into a unit that does not depend on the tokenizer.

        Args:
            nats: per predicted token.
            scored_bos: whether the BOS of a row is one of them.

        Returns:
            Bits per UTF-8 byte of the documents; None where the number of bytes is not known.
        """
        split = self.split("validation")
        if not split.bytes:
            return None
        # The end-of-text token at the end of a wrapped row is predicted, and stands for no text.
        added = (self.length - 1 + scored_bos) / (self.length - 2) if self.wrap == "bos_eos" else 1.0
        return nats * added * split.tokens / split.bytes / math.log(2)

    def rows(self, split: str) -> int:
        """Return the number of rows of a split.

        Args:
            split: name of the split.
        """
        return sum(file.rows for file in self.split(split).files)

    def beside(self, path: str) -> dict[str, Split]:
        """Return the splits, with the shards named as from a folder beside this one.

        Args:
            path: folder of the manifest.
        """
        folder = path.rpartition("/")[2]
        return {
            name: split.model_copy(
                update={
                    "files": tuple(
                        file.model_copy(update={"name": f"{_BESIDE}{folder}/{file.name}"})
                        for file in split.files
                    )
                }
            )
            for name, split in self.splits.items()
        }

    def rows_per_shard(self, split: str) -> list[int]:
        """Return the number of rows of every shard of a split, in order.

        Args:
            split: name of the split.
        """
        return [file.rows for file in self.split(split).files]


def hash_content(content: dict[str, Any]) -> str:
    """Return the SHA-256 of settings that determine what shards hold, in hexadecimal.

    Args:
        content: the settings by key of the config.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=4)
def tokenizer_key(spec: str) -> str:
    """Return what identifies an image tokenizer among the settings, computed once per process.

    Args:
        spec: "patch", a file or a folder.

    Returns:
        "patch", or the SHA-256 of the file or of all files of the folder.

    Raises:
        ConfigError: nothing is there.
    """
    if spec == "patch":
        return spec
    folder, _, name = spec.rstrip("/").rpartition("/")
    if not storage.exists(spec):
        near = did_you_mean(name, [*storage.listing(folder or "."), "patch"])
        expected = f"expected 'patch', a file or a folder{near}"
        raise ConfigError(f"data.tokenizer: {spec!r} does not exist; {expected}")
    names = storage.listing(spec)
    if names in ([], [name]):  # how a store lists a file
        return storage.sha256(spec)
    lines = (f"{name} {storage.sha256(storage.join(spec, name))}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_fits(manifest: Manifest, config: RunConfig) -> None:
    """Refuse data that training with a config could not use.

    Args:
        manifest: of the data.
        config: of the run.

    Raises:
        DataError: names every field that differs, with the value of the data and that of the config; or the data
            has no training rows.
    """
    data = config.data
    if "train" not in manifest.splits:
        raise DataError(
            "data.validation_documents: the data holds every document out, for evaluation only; "
            "expected data with a number of documents, or a data.validation_split"
        )
    pairs = _text_pairs(manifest, data) if data.kind == "text" else _image_pairs(manifest, data)
    if data.kind == "pair":
        pairs |= _caption_pairs(manifest, data)
    lines = differences({"data.length": (manifest.length, data.length), **pairs}, "config")
    rows, batch = manifest.rows("train"), config.train.batch
    if rows < batch:
        lines.append(f"  train.batch: {batch} rows, but the data has {rows}; expected at most {rows}")
    if lines:
        raise DataError("\n".join(["the data does not fit the config:", *lines]))


def differences(pairs: Mapping[str, tuple[object, object]], reader: str) -> list[str]:
    """Describe how data differs from what is to read it.

    Args:
        pairs: by key, the value of the data and the value that is expected.
        reader: what expects it: "config" or "model".

    Returns:
        An indented line for every key whose two values differ.
    """
    return [
        f"  {key}: the data has {has!r}, the {reader} {wants!r}"
        for key, (has, wants) in pairs.items()
        if has != wants
    ]


def _text_pairs(manifest: Manifest, data: TextDataConfig) -> dict[str, tuple[object, object]]:
    """Return what the data has and what the config expects, by key."""
    pairs: dict[str, tuple[object, object]] = {"data.wrap": (manifest.wrap, data.wrap)}
    if data.fitted is not None:  # on the data itself
        return {**pairs, "data.tokenizer": (manifest.content.get("tokenizer"), data.tokenizer)}
    has, expected = manifest.tokenizer, load_tokenizer(data.tokenizer)
    pairs |= {
        "data.tokenizer (vocabulary)": (manifest.vocabulary, expected.vocab_size),
        "data.tokenizer (end of text)": (manifest.special.eot, expected.eot),
    }
    if has.hash != expected.hash:  # the same ids under another name are accepted
        hashes = (f"{has.name} {has.hash[:12]}", f"{expected.name} {expected.hash[:12]}")
        pairs["data.tokenizer (hash)"] = hashes
    return pairs


def _image_pairs(manifest: Manifest, data: PictureDataConfig) -> dict[str, tuple[object, object]]:
    """Return what the data has and what the config expects, by key; "patch" is fitted on the data itself."""
    pairs: dict[str, tuple[object, object]] = {
        "data.classes": (manifest.classes, getattr(data, "classes", None)),
        "data.size / data.factor": (manifest.grid, data.size // data.factor),
        "data.tokenizer": (manifest.content.get("tokenizer"), tokenizer_key(data.tokenizer)),
    }
    if data.tokenizer == "patch":
        pairs["data.codes"] = (manifest.vocabulary - (manifest.text_ids or 0), data.codes)
    return pairs


def _caption_pairs(manifest: Manifest, data: PairDataConfig) -> dict[str, tuple[object, object]]:
    """Return what the data has of captions and what the config expects, by key."""
    text = data.text_tokenizer if data.fitted is not None else load_tokenizer(data.text_tokenizer).hash
    return {
        "data.caption_length": (manifest.caption, data.caption_length),
        "data.text_tokenizer": (manifest.content.get("text_tokenizer"), text),
    }
