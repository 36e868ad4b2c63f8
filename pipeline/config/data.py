"""The data section of a config: text, images, or images with captions."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from pipeline.config.location import Location
from pipeline.config.section import Section
from pipeline.errors import did_you_mean

HELD_OUT = 100_000  # documents, where the config says nothing
_LEAST_BPE = 257  # every byte, and the end of text


class DataConfig(Section):
    """What text and images have in common: where data comes from and how training reads it.

    Attributes:
        subset: Name of the subset, for Hugging Face datasets that have several.
        split: Split of a Hugging Face dataset.
        revision: Revision of a Hugging Face dataset; null takes the newest, which the manifest then records.
        on_error: What follows from an item that cannot be read: `fatal` ends the job, `skip` counts and names it.
        path: Folder of the prepared shards and their manifest; null names it after what determines its contents.
        shard_rows: Rows of one shard file.
        streams: Number of canonical streams in which rows are read; must divide `train.batch`, and is at least the
            number of workers. A worker keeps `shuffle_window` rows in memory for each stream that it serves.
        shuffle_window: Rows that a stream shuffles together.
    """

    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    on_error: Literal["fatal", "skip"] = "fatal"
    path: Location | None = None
    shard_rows: PositiveInt = 8192
    streams: PositiveInt = 8
    shuffle_window: PositiveInt = 4096

    @property
    def padded(self) -> bool:
        """Whether every document is a row of its own, with padding behind it."""
        return False

    @property
    def answers(self) -> bool:
        """Whether a document is a prompt and its answer."""
        return False

    @property
    def ragged(self) -> bool:
        """Whether the number of given tokens or of padding differs between rows."""
        return self.padded


TemplateName = Literal["plain", "chat", "instruction"]
TextFilter = Literal["ptb", "wikitext", "lm1b", "lambada", "ag_news", "arxiv", "pubmed", "text8"]


class MixedSource(Section):
    """One source of a mixture.

    Attributes:
        source: As `data.source`.
        weight: Share of the rows of training, relative to the weights of the others.
    """

    source: Location
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class TextDataConfig(DataConfig):
    """Which text is read, and how it is tokenised.

    Attributes:
        kind: Selects text; may be left out.
        source: `pydoc`, `pydoc_questions`, `exercises` or `markov` (embedded), `hf:OWNER/NAME`, or a file, folder or
            glob of .txt, .jsonl (also .gz, .zst) or .parquet.
        mix: Sources in place of `source`, with the share of each; all other keys hold for every source.
        text_field: Column of .jsonl, .parquet and Hugging Face data that holds the document.
        prompt_field: Column that holds a prompt, beside `answer_field`: the model learns to answer.
        answer_field: Column that holds the answer to a prompt.
        messages_field: Column that holds a chat in place of these two: a list of messages with `role` and `content`,
            of which the last is the answer.
        template: How prompts and messages become text: `plain` adds nothing, `chat` and `instruction` say who speaks.
        answer_block: An answer goes on with end of text up to a multiple of so many tokens; sampling fills one block
            after the other.
        text_filter: What every document goes through before it is tokenised, such as the detokeniser of a corpus;
            null leaves documents as they are.
        tokenizer: `bytes`, `text8`, an encoding of tiktoken such as `gpt2`, `bpe:N` (byte-level BPE of N entries,
            trained on the training documents), `hf:OWNER/NAME`, a tokenizer.json or .tiktoken file, or a folder.
        length: Tokens of a row, L.
        wrap: `bos_eos` makes a row of EOT, L - 2 tokens and EOT; `none` packs L tokens; `sentence` makes a row of
            every document: BOS, at most L - 2 tokens, EOT, and padding up to L.
        end_of_text: Puts an end of text behind every document of a packed stream.
        validation_documents: Number of documents at the end of the source that are held out for validation; `all`
            prepares data for evaluation only; null holds out 100,000, or `validation_split` where that is set.
        validation_split: Split that is held out, while `split` is trained on; of files, those with the name of the
            split in theirs.
    """

    kind: Literal["text"] = "text"
    source: Location = "pydoc"
    mix: tuple[MixedSource, ...] | None = None
    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str | None = None
    messages_field: str | None = None
    template: TemplateName = "plain"
    answer_block: PositiveInt = 16
    text_filter: TextFilter | None = None
    tokenizer: str = "bytes"
    length: Annotated[int, Field(ge=2)] = 1024
    wrap: Literal["none", "bos_eos", "sentence"] = "none"
    end_of_text: bool = True
    validation_documents: PositiveInt | Literal["all"] | None = HELD_OUT
    validation_split: str | None = None

    @field_validator("validation_documents", mode="before")
    @classmethod
    def _check_validation_documents(cls, value: Any) -> Any:
        if value in (None, "all") or (isinstance(value, int) and value > 0):
            return value
        near = did_you_mean(value, ["all"])
        raise ValueError(f"{value!r}; expected a number of at least 1, or all{near}")

    @model_validator(mode="after")
    def _check_length(self) -> "TextDataConfig":
        if self.wrap != "none" and self.length < 3:
            raise ValueError(f"length {self.length} leaves no token between BOS and EOS; expected at least 3")
        if self.padded and not self.end_of_text:
            raise ValueError("end_of_text False with wrap 'sentence', whose rows end with it; expected true")
        return self

    @model_validator(mode="after")
    def _check_answers(self) -> "TextDataConfig":
        if (self.prompt_field is None) != (self.answer_field is None):
            missing, other = ("prompt_field", "answer_field")[:: 1 if self.prompt_field is None else -1]
            raise ValueError(
                f"{missing} null with {other} {getattr(self, other)!r}; expected both or neither"
            )
        if self.messages_field is not None and self.answer_field is not None:
            raise ValueError(
                f"messages_field {self.messages_field!r} and answer_field {self.answer_field!r} both say where "
                "answers are; expected one of them"
            )
        if not self.answers:
            if self.template != "plain":
                raise ValueError(
                    f"template {self.template!r} without prompts; expected messages_field, or prompt_field and "
                    "answer_field"
                )
            return self
        if self.wrap != "sentence":
            raise ValueError(
                f"wrap {self.wrap!r} with prompts and answers, each pair a row; expected sentence"
            )
        if self.answer_block > (most := self.length - 2):
            raise ValueError(
                f"answer_block {self.answer_block} for rows of {self.length} tokens; expected at most {most}"
            )
        return self

    @model_validator(mode="after")
    def _check_splits(self) -> "TextDataConfig":
        if self.validation_split is None:
            return self
        if self.validation_documents not in (None, HELD_OUT):
            raise ValueError(
                f"validation_split {self.validation_split!r} and validation_documents {self.validation_documents!r} "
                "both say what is held out; expected one of them, and null for the other"
            )
        if self.validation_split == self.split:
            raise ValueError(f"validation_split {self.split!r} is split as well; expected another split")
        return self

    @model_validator(mode="after")
    def _check_tokenizer(self) -> "TextDataConfig":
        if not self.tokenizer.startswith("bpe:"):
            return self
        check_bpe("tokenizer", self.tokenizer)
        if self.validation_documents == "all":
            raise ValueError(
                f"tokenizer {self.tokenizer!r} is trained on training documents, and validation_documents 'all' "
                "leaves none; expected the folder of a model, which holds its tokenizer"
            )
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> "TextDataConfig":
        if self.mix is None:
            return self
        sources = [part.source for part in self.mix]
        if twice := [source for source in sources if sources.count(source) > 1]:
            raise ValueError(
                f"mix: source {twice[0]!r} twice; expected every source once, with its whole weight"
            )
        if not sources:
            raise ValueError("mix: []; expected at least one source, or null")
        if self.fitted is not None:
            raise ValueError(
                f"tokenizer {self.tokenizer!r} is trained on one source, and a mix has several; expected the folder "
                "of a model, which holds its tokenizer, or another tokenizer"
            )
        if self.validation_documents == "all":
            raise ValueError("mix with validation_documents 'all', which leaves nothing to train on")
        return self

    @property
    def parts(self) -> list["TextDataConfig"]:
        """The section of every source of a mixture alone."""
        return [
            self.model_copy(update={"source": part.source, "mix": None, "path": None})
            for part in self.mix or ()
        ]

    @property
    def padded(self) -> bool:
        """Whether every document is a row of its own, with padding behind it."""
        return self.wrap == "sentence"

    @property
    def answers(self) -> bool:
        """Whether a document is a prompt and its answer."""
        return self.answer_field is not None or self.messages_field is not None

    @property
    def fields(self) -> dict[str, str]:
        """The columns that are read, by key of the config."""
        keys = ("messages_field", "prompt_field", "answer_field")
        set_ = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return set_ or {"text_field": self.text_field}

    @property
    def fitted(self) -> int | None:
        """N of a tokenizer bpe:N, which is trained on the data; None for others."""
        return bpe_size(self.tokenizer)

    @property
    def held_out(self) -> int | Literal["all"] | None:
        """Number of documents at the end that are held out; None where `validation_split` names them."""
        if self.validation_split is not None:
            return None
        return HELD_OUT if self.validation_documents is None else self.validation_documents

    @property
    def predicted(self) -> int:
        """L', the largest number of tokens of a row that are predicted."""
        return self.length - (self.wrap != "none")


class PictureDataConfig(DataConfig):
    """What images with classes and images with captions have in common.

    Attributes:
        image_field: Column of .parquet and Hugging Face data that holds the image.
        size: Side of an image in pixels, after the centre crop.
        factor: Side in pixels of the square that one token stands for.
        tokenizer: `patch` (k-means on the data itself), or the file or folder of a VQ tokenizer.
        codes: Entries of the codebook of tokenizer `patch`.
        fit_images: Largest number of images on which the codebook of tokenizer `patch` is fitted.
        validation_images: Number of images held out for validation, evenly spread over the source.
        encode_batch: Images of one call of the tokenizer; part of what determines the codes.
        encode_threads: CPU threads of one call of the tokenizer; part of what determines the codes.
        encoders: Number of processes that encode at the same time; the codes do not depend on it.
    """

    image_field: str = "image"
    size: PositiveInt = 8
    factor: PositiveInt = 2
    tokenizer: str = "patch"
    codes: Annotated[int, Field(ge=2)] = 128
    fit_images: PositiveInt = 10_000
    validation_images: PositiveInt = 50_000
    encode_batch: PositiveInt = 32
    encode_threads: PositiveInt = 1
    encoders: PositiveInt = 1

    @model_validator(mode="after")
    def _check_size(self) -> "PictureDataConfig":
        if self.size % self.factor:
            near = max(1, round(self.size / self.factor)) * self.factor
            raise ValueError(
                f"size {self.size} is no multiple of factor {self.factor}; nearest that is: {near}"
            )
        return self

    @property
    def grid(self) -> int:
        """The number of codes of an image."""
        return (self.size // self.factor) ** 2


class ImageDataConfig(PictureDataConfig):
    """Which images are read, and how they become a grid of codes behind a BOS token.

    Attributes:
        kind: Selects images.
        source: `digits` (embedded), `hf:OWNER/NAME`, a folder with one folder of images per class, a folder or glob
            of .tar (WebDataset) or .parquet, or a folder of *-ubyte files (idx).
        label_field: Column of .parquet and Hugging Face data that holds the class.
        classes: Number of classes; labels are 0 to classes - 1.
        flip: Adds a mirrored row for every training image.
    """

    described_by: ClassVar = "label_field"
    kind: Literal["image"]
    source: Location = "digits"
    label_field: str = "label"
    classes: PositiveInt = 10
    flip: bool = False

    @property
    def predicted(self) -> int:
        """L', the number of codes of an image."""
        return self.grid

    @property
    def length(self) -> int:
        """L, the tokens of a row: BOS and the codes of an image."""
        return 1 + self.predicted


class PairDataConfig(PictureDataConfig):
    """Which images with captions are read; a row is a caption and the codes of its image.

    Attributes:
        kind: Selects images with captions.
        source: `digits` (embedded, with descriptions of each), `hf:OWNER/NAME`, a folder of images with a file of
            captions, or a folder or glob of .tar (WebDataset) or .parquet.
        captions: File of captions in a folder of images: JSON lines with the fields `file` and `caption_field`.
        caption_field: Column of .parquet and Hugging Face data, or field of JSON, that holds the caption.
        text_tokenizer: Tokenizer of the captions, as `tokenizer` is for text; `bpe:N` is trained on them.
        caption_length: Tokens of a caption in a row; shorter ones go on with end of text, longer ones are cut.
    """

    described_by: ClassVar = "caption_field"
    kind: Literal["pair"]
    source: Location = "digits"
    captions: str = "captions.jsonl"
    caption_field: str = "caption"
    text_tokenizer: str = "bytes"
    caption_length: PositiveInt = 64

    @model_validator(mode="after")
    def _check_text_tokenizer(self) -> "PairDataConfig":
        if self.text_tokenizer.startswith("bpe:"):
            check_bpe("text_tokenizer", self.text_tokenizer)
        return self

    @property
    def ragged(self) -> bool:
        """Whether the number of given tokens or of padding differs between rows."""
        return True

    @property
    def fitted(self) -> int | None:
        """N of a text tokenizer bpe:N, which is trained on the captions; None for others."""
        return bpe_size(self.text_tokenizer)

    @property
    def predicted(self) -> int:
        """L', the tokens of a row, each of which can be predicted."""
        return self.caption_length + self.grid

    @property
    def length(self) -> int:
        """L, the tokens of a row: those of the caption and the codes of the image."""
        return self.predicted


Pictures = ImageDataConfig | PairDataConfig


def bpe_size(tokenizer: str) -> int | None:
    """Return N of a tokenizer bpe:N, which is trained on the data; None for others.

    Args:
        tokenizer: as a config names it.
    """
    return int(tokenizer.removeprefix("bpe:")) if tokenizer.startswith("bpe:") else None


def check_bpe(key: str, tokenizer: str) -> None:
    """Refuse a tokenizer bpe:N without a number that is large enough.

    Args:
        key: of the tokenizer.
        tokenizer: which begins with "bpe:".

    Raises:
        ValueError: there is no such number.
    """
    if not re.fullmatch(r"bpe:[0-9]{1,7}", tokenizer) or (bpe_size(tokenizer) or 0) < _LEAST_BPE:
        raise ValueError(f"{key} {tokenizer!r}; expected bpe:N with an N of at least {_LEAST_BPE}")


def _kind_of(value: Any) -> str:
    """Return the kind of a data section, which is text where it does not say."""
    return str(value.get("kind", "text") if isinstance(value, dict) else getattr(value, "kind", value))


AnyDataConfig = Annotated[
    Annotated[TextDataConfig, Tag("text")]
    | Annotated[ImageDataConfig, Tag("image")]
    | Annotated[PairDataConfig, Tag("pair")],
    Discriminator(_kind_of),
]
