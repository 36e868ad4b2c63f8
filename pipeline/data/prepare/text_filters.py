"""Text filters: the detokenisers of published corpora, and the alphabet of text8.

Some corpora were published with spaces around punctuation and with marks of their own. Models of ordinary text are
evaluated on them after the published rules have undone that, as MDLM and SEDD do; the results depend on the rules, so
they are followed where they leave something as it is, too. A rule is a regular expression and its replacement, and
the rules of a corpus apply in order.

Source: Sahoo et al. 2024, arXiv 2406.07524, and Lou et al. 2023, arXiv 2310.16834, whose rules for WikiText and PTB
are those of the GPT-2 evaluations. AG News is evaluated there as it is (no filter); its filter here undoes the
escapes of web pages.
"""

import html
import re
from collections.abc import Callable

from pipeline.config.data import TextFilter

Rules = tuple[tuple[str, str], ...]

_WIKITEXT: Rules = (
    (r"s ' ", "s' "),
    (r" @([-,.])@ ", r"\1"),  # inside words and numbers
    (r" ([:;.!?,]) ", r"\1 "),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),  # headings
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    ("(?<= )N(?= )", "1"),
    (" 's", "'s"),
)
_PTB: Rules = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    ("(?<= )N(?= )", "1"),  # a number
    (r"([$#]) 1", r"\g<1>1"),
    ("<unk>", "?"),
)
_LM1B: Rules = (
    ("(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r"( \w+) \.( |$)", r"\1.\2"),
    (r" ([?!])( |$)", r"\1\2"),
    (" ([,:;]) ", r"\1 "),
    (" / ", "/"),
    ('" ([^"]+) "', r'"\1"'),
    ("' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    ("([$£]) ", r"\1"),
)
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def text_filter(name: TextFilter | None) -> Callable[[str], str]:
    """Return the function that filters a document.

    Args:
        name: `data.text_filter`; None leaves documents as they are.
    """
    return str if name is None else FILTERS[name]


def _apply(text: str, *groups: Rules) -> str:
    """Apply rules in order."""
    for pattern, replacement in (rule for rules in groups for rule in rules):
        text = re.sub(pattern, replacement, text)
    return text


def _wikitext(text: str) -> str:
    """Detokenise WikiText."""
    return _apply(text, _WIKITEXT)


def _ptb(text: str) -> str:
    """Detokenise the Penn Treebank."""
    return _apply(text, _PTB)


def _lm1b(text: str) -> str:
    """Detokenise the One Billion Word Benchmark."""
    return _apply(text, _LM1B)


def _lambada(text: str) -> str:
    """Turn the quotes of LAMBADA into those of ASCII, and begin with a line end as its passages do."""
    return "\n" + re.sub("[“”]", '"', text).strip()


def _ag_news(text: str) -> str:
    """Undo the escapes of web pages in AG News: entities, which have lost their `&` in places, and backslashes."""
    text = re.sub(r" ?(?<!&)#(\d{2,4});", r"&#\1;", text)
    text = re.sub(r"(?<![&\w])(quot|amp|lt|gt);", r"&\1;", text)
    text = re.sub(r"\\+", " ", html.unescape(html.unescape(text)))
    return re.sub(" {2,}", " ", text).strip()


def _papers(text: str) -> str:
    """Detokenise arXiv and PubMed: the rules of WikiText, then those of LM1B."""
    return _apply(text, _WIKITEXT, _LM1B)


def _text8(text: str) -> str:
    """Turn a text into lower-case letters and single spaces, with digits spelt out, as text8 was made."""
    text = re.sub("[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", text)


FILTERS: dict[TextFilter, Callable[[str], str]] = {
    "ptb": _ptb,
    "wikitext": _wikitext,
    "lm1b": _lm1b,
    "lambada": _lambada,
    "ag_news": _ag_news,
    "arxiv": _papers,
    "pubmed": _papers,
    "text8": _text8,
}
