"""Tables: numbers are aligned, nothing breaks a Markdown row, CSV keeps full precision."""

import math

import pandas as pd
import pytest

from pipeline.reports.tables import aligned, is_number, markdown, short, table_of, to_csv

TABLE = pd.DataFrame({"model": ["a|b", "c"], "value": ["1,234", "-0.5"], "note": ["", "x"], "none": ["", ""]})


def test_aligned_numbers() -> None:
    assert aligned(TABLE).splitlines() == [
        "  model  value  note  none",
        "  a|b    1,234",
        "  c       -0.5  x",
    ]


def test_markdown_escapes_and_aligns() -> None:
    assert markdown(TABLE).splitlines() == [
        "| model | value | note | none |",
        "| --- | ---: | --- | --- |",
        "| a\\|b | 1,234 |  |  |",
        "| c | -0.5 | x |  |",
    ]


def test_csv_keeps_values() -> None:
    rows = [
        {"name": "a,b", "count": 3, "value": 0.1 + 0.2},
        {"name": None, "count": None, "value": math.nan},
        {"name": "c", "count": 12345678901234567, "value": 1e-300},
    ]
    assert to_csv(table_of(rows)).splitlines() == [
        "name,count,value",
        '"a,b",3,0.30000000000000004',
        ",,",
        "c,12345678901234567,1e-300",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.2346"),
        (12.345, "12.35"),
        (-123.456, "-123.46"),
        (12345.6, "12,346"),
        (1e304, "1e+304"),
        (math.inf, "inf"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text
    assert is_number(short(value))
