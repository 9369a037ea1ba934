"""CSV that is safe to open in a spreadsheet, and cells of Markdown tables: the one home of all tables that are written.

Spreadsheets run a cell that starts with "=", "+", "-" or "@" as a formula, and names of files, objects and cases come
from outside. Such a cell gets an apostrophe in front, as OWASP advises against CSV injection; numbers stay as they are.
`plain_cell` takes it off again, so what we write is read back as it was.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

_FORMULA = re.compile(r"'*(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")  # the last four: the same, full width
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+|inf|nan)(e[+-]?\d+)?\s*%?", re.IGNORECASE | re.ASCII)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows, the heading first, as CSV with "\\n" between them. Text that would run as a formula is defused."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        writer = csv.writer(line, lineterminator="\r\n")  # quotes both, so no "\r" is bare
        writer.writerow([_cell(value) for value in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def plain_cell(text: str) -> str:
    """The text that `csv_text` wrote as this cell; cells of other programs stay as they are."""
    return text[1:] if text.startswith("'") and _runs(text[1:]) else text


def markdown_cell(text: str) -> str:
    """Text from outside in one line of Markdown: no new cell, no markup."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;").replace("[", "\\[")


def _cell(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if _runs(text) else text


def _runs(text: str) -> bool:
    return _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None
