"""The detokenisers on typical lines of their corpora."""

import pytest

from pipeline.config.data import TextDataConfig, TextFilter
from pipeline.data.prepare.text_filters import FILTERS, text_filter

LINES: dict[TextFilter, list[tuple[str, str]]] = {
    "wikitext": [
        (" = Valkyria Chronicles III = ", " = Valkyria Chronicles III = "),
        (" = = Gameplay = = ", " == Gameplay == "),
        (" = = = Weapons = = = ", " === Weapons === "),
        (
            "a turn @-@ based game sold 1 @,@ 234 copies at 2 @.@ 5 .",
            "a turn-based game sold 1,234 copies at 2.5 .",
        ),
        ("It ended , and so on ; that was it . Then : more ! Why ? Well", None),
        (
            'the game ( Japanese : 3 ) , called " the third " , is',
            'the game (Japanese: 3), called "the third", is',
        ),
        ("the team 's work [ 1 ] { a } at 20 ° C", "the team's work [1] {a} at 20°C"),
        ("line one \n line two", "line one\nline two"),
    ],
    "ptb": [
        ("mr. vinken is chairman of elsevier n.v. the dutch group 's owner", None),
        ("it does n't say that the workers ' union 's plan", "it doesn't say that the workers' union's plan"),
        ("pierre <unk> N years old", "pierre ? 1 years old"),
        ("from N N N to N N days", "from 1 1 1 to 1 1 days"),
        ("a loss of $ N million or # N a share", "a loss of $1 million or #1 a share"),
        ("a 1\\/2 share", "a 1/2 share"),
        ("one \n two", "one\ntwo"),
    ],
    "lm1b": [
        ("The U.S. Centers , he said , are closed .", "The U.S. Centers, he said, are closed."),
        ("He said : \" It 's over , is n't it ? \" and left !", None),
        ("See http : / / example.com and https : / / a.b", "See http://example.com and https://a.b"),
        ("They 've paid $ 5 and £ 6 ( about 7 ) [ sic ]", "They've paid $5 and £6 (about 7) [sic]"),
        ("and / or ; this : that", "and/or; this: that"),
        ("Is it over ?", "Is it over?"),
        ("Word . Another word .", "Word . Another word."),
        ("one word . Another word .", "one word. Another word."),
    ],
    "lambada": [
        ("“ yes , ” he said . \n", '\n" yes , " he said .'),
        ("  plain text  ", "\nplain text"),
    ],
    "ag_news": [
        ("Reuters - Short-sellers, Wall Street's\\band, are seeing green.", None),
        ("AP - Oracle #39;s bid &lt;b&gt;rose&lt;/b&gt; to \\$21", "AP - Oracle's bid <b>rose</b> to $21"),
        ("the quot;first quot; of AT&amp;T &#36;5", 'the "first " of AT&T $5'),
        ("no escapes here", "no escapes here"),
    ],
    "arxiv": [
        (
            "we show that @xmath0 , where x ( see fig . 1 ) is",
            "we show that @xmath0, where x (see fig. 1) is",
        ),
        ("the model 's error of 2 @.@ 5 is small .", "the model's error of 2.5 is small."),
    ],
    "pubmed": [("patients ( n = 5 ) were well ; none died .", "patients (n = 5) were well; none died.")],
    "text8": [("In 1905, A. Einstein's\npaper!", "in one nine zero five a einstein s paper ")],
}
ELSEWHERE = {
    "It ended , and so on ; that was it . Then : more ! Why ? Well": "It ended, and so on; that was it. Then: more! "
    "Why? Well",
    "mr. vinken is chairman of elsevier n.v. the dutch group 's owner": "mr. vinken is chairman of elsevier n.v. the "
    "dutch group's owner",
    "He said : \" It 's over , is n't it ? \" and left !": "He said: \"It's over, is n't it?\" and left!",
    "Reuters - Short-sellers, Wall Street's\\band, are seeing green.": "Reuters - Short-sellers, Wall Street's band, "
    "are seeing green.",
}


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [(name, line, expected or ELSEWHERE[line]) for name, pairs in LINES.items() for line, expected in pairs],
)
def test_typical_lines(name: TextFilter, line: str, expected: str) -> None:
    assert text_filter(TextDataConfig(text_filter=name).text_filter)(line) == expected


def test_every_filter_is_tested_and_keeps_what_has_no_marks() -> None:
    assert LINES.keys() == FILTERS.keys()
    plain = "Ordinary text, with its own commas; nothing to undo.\nAnd a second line"
    for name in FILTERS.keys() - {"lambada", "text8"}:
        assert text_filter(name)(plain) == plain
    assert text_filter(None)(plain) == plain
