"""The data section of a config: text or images."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from pipeline.config.section import Section


class DataConfig(Section):
    """What text and images have in common: where data comes from and how training reads it."""

    subset: str | None = None  # of a Hugging Face dataset that has several
    split: str = "train"  # of a Hugging Face dataset
    revision: str | None = (
        None  # of a Hugging Face dataset; None: the newest, which the manifest then records
    )
    on_error: Literal["fatal", "skip"] = "fatal"  # what cannot be read ends the job, or is counted and named
    path: str | None = None  # folder of shards + manifest; None: named by what determines its contents
    shard_rows: PositiveInt = 8192
    streams: Annotated[int, Field(ge=1, le=64)] = 8  # C canonical streams; divides train.batch
    shuffle_window: PositiveInt = 4096  # rows that a stream shuffles together


class TextDataConfig(DataConfig):
    """Which text is read, and how it is tokenised."""

    kind: Literal["text"] = "text"
    # "pydoc" (embedded), "markov" (of known entropy); a file, folder or glob of .txt, .jsonl[.gz|.zst], .parquet;
    # or "hf:NAME"
    source: str = "pydoc"
    text_field: str = "text"  # the column of .jsonl, .parquet and Hugging Face data that holds the document
    tokenizer: str = "bytes"  # "bytes", "gpt2", or the path of a .tiktoken rank file
    length: Annotated[int, Field(ge=2)] = 1024  # L, tokens of a row
    wrap: Literal["none", "bos_eos"] = "none"  # bos_eos: a row is EOT + (L - 2) tokens + EOT
    validation_documents: PositiveInt = 100_000  # the last documents are held out

    @model_validator(mode="after")
    def _fits(self) -> "TextDataConfig":
        if self.wrap == "bos_eos" and self.length < 3:
            raise ValueError(f"length {self.length} leaves no token between BOS and EOS; expected at least 3")
        return self

    @property
    def predicted(self) -> int:
        """L', tokens of a row that are predicted."""
        return self.length - (self.wrap == "bos_eos")


class ImageDataConfig(DataConfig):
    """Which images are read, and how they become a grid of codes behind a BOS."""

    kind: Literal["image"]
    # "digits" (embedded); a folder with a folder of images for each class; a folder or glob of .tar (WebDataset)
    # or .parquet; a folder of *-ubyte files (idx); "hf:NAME"
    source: str = "digits"
    image_field: str = "image"  # the column of .parquet and Hugging Face data that holds the image
    label_field: str = "label"  # and the one that holds its class
    classes: PositiveInt = 10  # C, labels are 0..C-1
    size: PositiveInt = 8  # side of an image after the crop of its longer side, pixels
    factor: PositiveInt = 2  # side of the square that one token stands for, pixels
    tokenizer: str = "patch"  # "patch" (k-means on the data itself), or a VQ tokenizer's file or folder
    codes: Annotated[int, Field(ge=2)] = 128  # patch: entries of its codebook
    fit_images: PositiveInt = 10_000  # patch: images that the codebook is fitted on, at most
    flip: bool = False  # a second row for every training image, mirrored left to right
    validation_images: PositiveInt = 50_000  # held out, evenly spread over the images
    encode_batch: PositiveInt = 32  # images of one call of the tokenizer; fixed, so that codes are
    encode_threads: PositiveInt = 1  # CPU threads of one such call, fixed for the same reason
    encoders: PositiveInt = 1  # processes that encode at the same time; what they write does not depend on it

    @model_validator(mode="after")
    def _tiles(self) -> "ImageDataConfig":
        if self.size % self.factor:
            below = self.size - self.size % self.factor
            near = below if below and self.size - below <= self.factor / 2 else below + self.factor
            raise ValueError(
                f"size {self.size} is no multiple of factor {self.factor}; nearest that is: {near}"
            )
        return self

    @property
    def predicted(self) -> int:
        """L', codes of an image."""
        return (self.size // self.factor) ** 2

    @property
    def length(self) -> int:
        """L: BOS and the codes of an image, row by row."""
        return 1 + self.predicted


def _data_kind(value: Any) -> str:
    """Data is text unless it says otherwise."""
    return str(value.get("kind", "text") if isinstance(value, dict) else getattr(value, "kind", value))


AnyDataConfig = Annotated[
    Annotated[TextDataConfig, Tag("text")] | Annotated[ImageDataConfig, Tag("image")],
    Discriminator(_data_kind),
]
