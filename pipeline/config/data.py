"""The data section of a config: text or images."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from pipeline.config.location import Location
from pipeline.config.section import Section


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
            number of workers.
        shuffle_window: Rows that a stream shuffles together.
    """

    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    on_error: Literal["fatal", "skip"] = "fatal"
    path: Location | None = None
    shard_rows: PositiveInt = 8192
    streams: Annotated[int, Field(ge=1, le=64)] = 8
    shuffle_window: PositiveInt = 4096


class TextDataConfig(DataConfig):
    """Which text is read, and how it is tokenised.

    Attributes:
        kind: Selects text; may be left out.
        source: `pydoc` (embedded), `markov` (embedded, of known entropy), `hf:OWNER/NAME`, or a file, folder or glob
            of .txt, .jsonl (also .gz, .zst) or .parquet.
        text_field: Column of .jsonl, .parquet and Hugging Face data that holds the document.
        tokenizer: `bytes`, `gpt2`, or the path of a .tiktoken rank file.
        length: Tokens of a row, L.
        wrap: `bos_eos` makes a row of EOT, L - 2 tokens and EOT; `none` packs L tokens; `sentence` makes a row of
            every document: BOS, at most L - 2 tokens, EOT, and padding up to L.
        validation_documents: Number of documents at the end of the source that are held out for validation.
    """

    kind: Literal["text"] = "text"
    source: Location = "pydoc"
    text_field: str = "text"
    tokenizer: str = "bytes"
    length: Annotated[int, Field(ge=2)] = 1024
    wrap: Literal["none", "bos_eos", "sentence"] = "none"
    validation_documents: PositiveInt = 100_000

    @model_validator(mode="after")
    def _check_length(self) -> "TextDataConfig":
        if self.wrap != "none" and self.length < 3:
            raise ValueError(f"length {self.length} leaves no token between BOS and EOS; expected at least 3")
        return self

    @property
    def predicted(self) -> int:
        """L', the largest number of tokens of a row that are predicted."""
        return self.length - (self.wrap != "none")


class ImageDataConfig(DataConfig):
    """Which images are read, and how they become a grid of codes behind a BOS token.

    Attributes:
        kind: Selects images.
        source: `digits` (embedded), `hf:OWNER/NAME`, a folder with one folder of images per class, a folder or glob
            of .tar (WebDataset) or .parquet, or a folder of *-ubyte files (idx).
        image_field: Column of .parquet and Hugging Face data that holds the image.
        label_field: Column of .parquet and Hugging Face data that holds the class.
        classes: Number of classes; labels are 0 to classes - 1.
        size: Side of an image in pixels, after the centre crop.
        factor: Side in pixels of the square that one token stands for.
        tokenizer: `patch` (k-means on the data itself), or the file or folder of a VQ tokenizer.
        codes: Entries of the codebook of tokenizer `patch`.
        fit_images: Largest number of images on which the codebook of tokenizer `patch` is fitted.
        flip: Adds a mirrored row for every training image.
        validation_images: Number of images held out for validation, evenly spread over the source.
        encode_batch: Images of one call of the tokenizer; part of what determines the codes.
        encode_threads: CPU threads of one call of the tokenizer; part of what determines the codes.
        encoders: Number of processes that encode at the same time; the codes do not depend on it.
    """

    kind: Literal["image"]
    source: Location = "digits"
    image_field: str = "image"
    label_field: str = "label"
    classes: PositiveInt = 10
    size: PositiveInt = 8
    factor: PositiveInt = 2
    tokenizer: str = "patch"
    codes: Annotated[int, Field(ge=2)] = 128
    fit_images: PositiveInt = 10_000
    flip: bool = False
    validation_images: PositiveInt = 50_000
    encode_batch: PositiveInt = 32
    encode_threads: PositiveInt = 1
    encoders: PositiveInt = 1

    @model_validator(mode="after")
    def _check_size(self) -> "ImageDataConfig":
        if self.size % self.factor:
            near = max(1, round(self.size / self.factor)) * self.factor
            raise ValueError(
                f"size {self.size} is no multiple of factor {self.factor}; nearest that is: {near}"
            )
        return self

    @property
    def predicted(self) -> int:
        """L', the number of codes of an image."""
        return (self.size // self.factor) ** 2

    @property
    def length(self) -> int:
        """L, the tokens of a row: BOS and the codes of an image."""
        return 1 + self.predicted


def _kind_of(value: Any) -> str:
    """Return the kind of a data section, which is text where it does not say."""
    return str(value.get("kind", "text") if isinstance(value, dict) else getattr(value, "kind", value))


AnyDataConfig = Annotated[
    Annotated[TextDataConfig, Tag("text")] | Annotated[ImageDataConfig, Tag("image")],
    Discriminator(_kind_of),
]
