"""The sheets of an XLSX workbook as text, by openpyxl: one line a row, with the values that were cached of formulas."""

from __future__ import annotations

import datetime
import io
import sys
import warnings
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from l4ctx.confinement.work import Refusal
from l4ctx.formatting import as_attribute, counted

MOST_TEXT = 2**27  # characters
MOST_CELLS = 64_000_000


def load_library() -> None:
    """Imports openpyxl, and what it imports late. Raises ImportError."""
    sys.modules.setdefault("numpy", None)  # type: ignore[arg-type]  # openpyxl would import it, and needs no more
    import openpyxl

    workbook = openpyxl.Workbook()
    workbook.active.append([1, "a", datetime.date(2000, 1, 1)])
    kept = io.BytesIO()
    workbook.save(kept)
    sheets_text(kept.getvalue())


def sheets_text(raw: bytes) -> tuple[str, list[str]]:
    """The text of all sheets, and what is not in it. Each is wrapped in `<sheet name="…">` and `</sheet>`.

    Rows without a value are left out, and cells behind a row's last value. Raises Refusal.
    """
    import openpyxl

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            workbook = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True, keep_links=False)
            parts, bound, hidden = list[str](), _Bound(), 0
            for sheet in workbook.worksheets:
                hidden += sheet.sheet_state != "visible"
                sheet.reset_dimensions()  # what a file says of them may be wrong
                parts.append(f'<sheet name="{as_attribute(sheet.title)}">\n')
                parts += _lines(sheet, bound)
                parts.append("</sheet>\n")
    except Refusal:
        raise
    except (MemoryError, RecursionError):
        raise Refusal("it needs too much memory") from None
    except (zipfile.BadZipFile, Exception) as error:  # openpyxl raises whatever a broken file causes
        raise Refusal(f"it is broken: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
    return "".join(parts), [f"{counted(hidden, 'hidden sheet')}, read like the others"] if hidden else []


class _Bound:
    """What may still be read: a string may be referred to often, and a cell may stand far from all others."""

    def __init__(self) -> None:
        self._characters, self._cells = MOST_TEXT, MOST_CELLS

    def take_row(self, cells: int) -> None:
        self._cells -= cells
        if self._cells < 0:
            raise Refusal(f"its rows are too wide: more than {MOST_CELLS:,} cells, empty ones included")

    def take(self, text: str) -> str:
        self._characters -= len(text) + 3
        if self._characters < 0:
            raise Refusal("it has more than 128 MiB of text")
        return text


def _lines(sheet: Any, bound: _Bound) -> Iterator[str]:
    for row in sheet.iter_rows(values_only=True):
        bound.take_row(len(row))
        last = next((at for at in range(len(row), 0, -1) if row[at - 1] is not None), 0)
        texts = ["" if value is None else bound.take(_text(value)) for value in row[:last]]
        while texts and not texts[-1]:
            texts.pop()
        if texts:
            yield f"| {' | '.join(texts)} |\n"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return _cleaned(str(value))


@lru_cache(maxsize=64)  # of a string that many cells refer to
def _cleaned(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
