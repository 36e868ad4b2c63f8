"""Text as bad as it comes, and its preparation in this process, in any number of blocks."""

import random
from functools import partial
from pathlib import Path

from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import TOKENIZER, Manifest
from pipeline.data.prepare import text, workflow
from pipeline.data.prepare.text_sources import open_source
from pipeline.data.shards import publish_shard
from pipeline.data.tokenizers import load_tokenizer

_RANGES = [  # of code points: many scripts, combining marks, private use, emoji
    (0x20, 0x7F), (0x20, 0x7F), (0x61, 0x7B), (0x61, 0x7B), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530),
    (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2070), (0x20A0, 0x2400),
    (0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0xE000, 0xE010), (0xFE00, 0xFE10), (0xFF00, 0xFFF0),
    (0x1D400, 0x1D500), (0x1F300, 0x1F700), (0x20000, 0x20020), (0xE0100, 0xE0110),
]  # fmt: skip
_ODD = [
    " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u200d", "\ufeff", "\x00", "\x1b", "\x7f",
    "the ", "The ", " in", "ing ", " 12,345.67 ", "don't", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "##ing",
    "<|endoftext|>", "</s>", "<unk>", "_____", "....", "e\u0301", "ﬁ", "İ", "ß", "👩‍👩‍👧",
]  # fmt: skip
WORDS = ["the", "a", "cat", "dog", "sat", "on", "in", "mat", "and", "of", "to", "with", "is", "ran", "home"]


def messy_lines(count: int, seed: int = 0) -> list[str]:
    """Return lines of characters of many Unicode ranges, of odd pieces, and of words; some are empty."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(7)):
            low, high = draw.choice(_RANGES)
            parts.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 9))))
            parts.append(draw.choice(_ODD))
            parts.append(" " + " ".join(draw.choices(WORDS, k=3)))
        lines.append("".join(parts))
    return lines


def word_piece_vocabulary(size: int = 200) -> list[str]:
    """Return a WordPiece vocabulary: special tokens, words, letters and signs, then pieces inside words."""
    letters = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "é", "я", "語", *WORDS[2:]]
    inside = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    entries += [*inside, *(f"##{a}{b}" for a in "aeinorstlu" for b in "aeinorst")]
    return list(dict.fromkeys(entries))[:size]


def prepare_here(data: TextDataConfig, path: Path) -> Manifest:
    """Prepare text unit by unit and shard by shard in this process, as Ray's tasks would do it."""
    work, source = str(path / "work"), open_source(data)
    local = text.place_tokenizer(data, source, work)
    units = [text.tokenise_unit(unit, local, work) for unit in enumerate(source.units)]
    make, splits = text.row_maker(units, local, work), {}
    for name, (split, shards) in text.plan_splits(units, local, work).items():
        files = [publish_shard(shard.name, str(path), work, make=partial(make, shard)) for shard in shards]
        splits[name] = split.model_copy(update={"files": tuple(files)})
    tokenizer = load_tokenizer(local.tokenizer)
    workflow.save_tokenizer(tokenizer, str(path / TOKENIZER))
    return text.describe(data, source, units, splits, tokenizer)
