"""Questions and answers made of Python's help topics: what a section is about, and what a method does."""

import functools
import re
from collections.abc import Iterator

_UNDERLINE = re.compile(r"(\*+|=+|-+|~+)$")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9\"”)*]{2}[.:])\s+(?=[A-Z\"“*])")
# A name, with its arguments and what kind of thing it is.
_DEFINED = re.compile(r"(?:[a-z]+ )?[\w.]+(?:\(.*\))?$")
_ANSWER = 240  # characters of an answer, unless its first sentence is longer


@functools.cache
def documents() -> list[dict[str, str]]:
    """Return the questions in the order of the topics, with the fields `prompt` and `answer`.

    Those of the topics that `data.source: pydoc` holds out at its end are the last ones.
    """
    from pydoc_data.topics import topics  # here, since it is half a megabyte that few jobs read

    pairs = dict[str, str]()
    for key in sorted(topics):
        for prompt, answer in _pairs(topics[key]):
            pairs.setdefault(prompt, answer)  # some sections stand in several topics
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs.items()]


def _pairs(topic: str) -> Iterator[tuple[str, str]]:
    """Yield the questions and answers of a topic: its headings, and what it defines, with the text that follows."""
    blocks = [block for block in re.split(r"\n(?:[ \t]*\n)+", topic.strip("\n")) if block.strip()]
    for number, block in enumerate(blocks[:-1]):
        lines, below = block.split("\n"), blocks[number + 1 :]
        text, indent = below[0], 3
        if heading := len(lines) == 2 and len(lines[0]) == len(lines[1]) and _UNDERLINE.match(lines[1]):
            text, indent = below[1] if below[0].startswith(" ") and len(below) > 1 else below[0], 0
        elif block.startswith(" ") or not all(map(_DEFINED.match, lines)):
            continue
        if answer := _answer(text, indent):
            yield f"Explain: {lines[0]}\n" if heading else f"What does {lines[0]} do?\n", answer


def _answer(block: str, indent: int) -> str:
    """Return the first sentences of a paragraph; empty where the block is none."""
    lines = block.split("\n")
    if any(len(line) - len(line.lstrip()) != indent for line in lines):
        return ""
    sentences = _SENTENCE_END.split(" ".join(line.strip() for line in lines))
    answer = sentences[0]
    for sentence in sentences[1:]:
        if len(answer) + 1 + len(sentence) > _ANSWER:
            break
        answer += f" {sentence}"
    return answer if answer.endswith((".", ":")) else ""
