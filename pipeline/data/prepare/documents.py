"""Documents as tokens: those of plain text, and prompts with their answers, each of which is a row."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Integer

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import SpecialIds
from pipeline.data.prepare import workflow
from pipeline.data.prepare.text_filters import text_filter
from pipeline.data.prepare.text_sources import Document
from pipeline.data.shards import Rows
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.batch import Roles
from pipeline.sampling.row_ends import with_end


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
        ids: its tokens; none of a document without text.
        bytes: number of UTF-8 bytes of its text.
        given: number of tokens at the start that are given.
        cut: its answer does not fit in the row with an end of text, and is cut.
        full: its prompt leaves no room for an answer.
    """

    ids: Integer[np.ndarray, "n"]
    bytes: int
    given: int = 0
    cut: bool = False
    full: bool = False


def encoder(data: TextDataConfig, tokenizer: Tokenizer) -> Callable[[Document], Encoded]:
    """Return the function that turns a document into tokens.

    A text gets an end of text. A prompt and its answer become a row: BOS, the prompt, the answer, and end of text up
    to a multiple of `data.answer_block` tokens behind the prompt, or to the end of the row.

    Args:
        data: the data section of the config.
        tokenizer: of the data.
    """
    clean, special, length = text_filter(data.text_filter), SpecialIds.of_text(data, tokenizer), data.length

    def encode(document: Document) -> Encoded:
        if isinstance(document, str):
            text = clean(document)
            ids = tokenizer.encode(text)
            ends = [tokenizer.eot] * (data.end_of_text and len(ids) > 0)
            return Encoded(np.append(ids, ends).astype(np.int64), len(text.encode()))
        prompt, answer = map(clean, document)
        size = len(prompt.encode()) + len(answer.encode())
        asked, answered = ([*map(int, tokenizer.encode(text))] for text in (prompt, answer))
        given, room = 1 + len(asked), length - 1 - len(asked)
        if not answered or room < 1:
            return Encoded(np.empty(0, np.int64), size, full=bool(answered))
        targets = with_end(answered, tokenizer.eot, data.answer_block, room)
        return Encoded(np.array([special.bos, *asked, *targets]), size, given, cut=len(answered) >= room)

    return encode


def answer_rows(
    shard: workflow.Shard,
    work: str,
    length: int,
    pad: int | None,
    sizes: Mapping[int, tuple[int, int]],
    dtype: np.dtype,
) -> Rows:
    """Read the rows of a shard, which are prompts with their answers, and fill them up with padding.

    Args:
        shard: to write.
        work: folder of the intermediate files.
        length: L.
        pad: id of padding.
        sizes: number of tokens and of documents of every unit.
        dtype: of the tokens.
    """
    contents, given = [], []
    for unit, start, stop in shard.pieces.tolist():
        tokens, documents = sizes[unit]
        with storage.open_read(workflow.unit_path(work, unit, "bin")) as file:
            ends = read_ends(file, tokens, dtype, documents=(start, stop))
            file.seek(tokens * dtype.itemsize + (2 * documents + start) * 8)
            given.append(np.frombuffer(file.read((stop - start) * 8), "<i8"))
            file.seek(ends[0] * dtype.itemsize)
            ids = np.frombuffer(file.read((ends[-1] - ends[0]) * dtype.itemsize), dtype)
        contents += [ids[begin - ends[0] : end - ends[0]] for begin, end in pairwise(ends)]
    rows = np.full((len(contents), length), pad, dtype)
    for row, content in zip(rows, contents, strict=True):
        row[: len(content)] = content
    return Rows(rows, roles=Roles(np.concatenate(given), np.array([len(content) for content in contents])))


def read_ends(file: IO[bytes], tokens: int, dtype: np.dtype, documents: tuple[int, int]) -> list[int]:
    """Read where documents of a unit lie.

    Args:
        file: of the unit.
        tokens: number of tokens of the unit.
        dtype: of the tokens.
        documents: number of the first document, and of the one behind the last.

    Returns:
        Where the first document begins, in tokens, and where each of them ends.
    """
    start, stop = documents
    first = max(start - 1, 0)
    file.seek(tokens * dtype.itemsize + first * 8)
    ends = np.frombuffer(file.read((stop - first) * 8), "<i8").tolist()
    return ends if start else [0, *ends]
