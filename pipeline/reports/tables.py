"""Tables as aligned text, Markdown and CSV, and the format of numbers in them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

_NUMBER = re.compile(r"[-+]?([\d,.]+(e[-+]\d+)?%?|inf)|nan")
_LARGE = 1e9  # numbers from here on are written with an exponent


def table_of(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Make a table of rows that map column names to values; values keep their types, also beside None.

    Args:
        rows: values by column name.
    """
    return pd.DataFrame(list(rows), dtype=object)


def short(value: float) -> str:
    """Format a number with four decimals below 10, two below 1,000, none below 1e9 and an exponent above."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= _LARGE:
        return f"{value:.3g}"
    decimals = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}"


def two_decimals(value: float) -> str:
    """Format a number with two decimals, or with an exponent from 1e9 on."""
    return f"{value:.2f}" if abs(value) < _LARGE else f"{value:.3g}"


def is_number(cell: str) -> bool:
    """Tell whether a cell holds a number."""
    return _NUMBER.fullmatch(cell) is not None


def aligned(table: pd.DataFrame) -> str:
    """Lay a table of texts out for the terminal, indented by two spaces; numbers are right-aligned.

    Args:
        table: of texts.
    """
    columns = []
    for name, numeric, cells in _columns(table):
        width = max(map(len, [name, *cells]))
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in [name, *cells]])
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in zip(*columns, strict=True))


def markdown(table: pd.DataFrame) -> str:
    """Write a table of texts in Markdown; numbers are right-aligned.

    Args:
        table: of texts.
    """
    columns = [[name, "---:" if numeric else "---", *cells] for name, numeric, cells in _columns(table)]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in zip(*columns, strict=True))
    return "\n".join(f"| {line} |" for line in lines)


def to_csv(table: pd.DataFrame) -> str:
    """Write a table as CSV in full precision; None and NaN become empty cells.

    Args:
        table: of values.
    """
    return table.to_csv(index=False, lineterminator="\n")


def _columns(table: pd.DataFrame) -> Iterable[tuple[str, bool, Sequence[str]]]:
    """List name, whether all cells are numbers or empty, and cells of every column."""
    for name, cells in zip(table.columns, table.T.values.tolist(), strict=True):
        yield name, any(cells) and all(not cell or is_number(cell) for cell in cells), cells
