"""Tables for people that fit any width: where columns do not, each label stands above what belongs to it.

Knows no report: those say what is in a table. Labels wrap at words, figures are never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from l4ctx.cli.wrapping import cells, wrapped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

NARROWEST_TEXT = 40
"""Columns that labels beside figures, and texts beside labels, have at least, if they are as long as that."""
GAP = 2
INDENT = 2


class FigureTable:
    """Rows of a label and figures, right-aligned below the names of the columns; printed with rich."""

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self._title, self._columns = title, columns
        self._rows: list[tuple[str, tuple[str, ...]]] = []

    def add_row(self, label: str, *figures: str) -> None:
        """One figure for each column, "" for none; trailing ones may be left out."""
        self._rows.append((label, figures))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self._least_width() <= options.max_width:
            yield self._table()
        else:
            yield from _stacked(self._title, self._stacked_rows(), options.max_width)

    def _least_width(self) -> int:
        labels = max((cells(label) for label, _ in self._rows), default=0)
        figures = [
            [name, *(row[number] for _, row in self._rows if number < len(row))]
            for number, name in enumerate(self._columns)
        ]
        return min(labels, NARROWEST_TEXT) + sum(GAP + max(map(cells, column)) for column in figures)

    def _table(self) -> Table:
        from rich.text import Text

        table = _plain_table(self._title)
        table.add_column("", overflow="fold")
        for name in self._columns:
            table.add_column(name, justify="right", no_wrap=True)
        for label, figures in self._rows:
            table.add_row(*map(Text, (label, *figures)))
        return table

    def _stacked_rows(self) -> Iterator[tuple[str, list[str]]]:
        for label, figures in self._rows:
            yield label, [f"{name} {figure}" for name, figure in zip(self._columns, figures, strict=False) if figure]


class TextTable:
    """Rows of a label and a text; the label is "" where the text continues the row above."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rows: list[tuple[str, str]] = []

    def add_row(self, label: str, text: str) -> None:
        self._rows.append((label, text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        labels = max((cells(label) for label, _ in self._rows), default=0)
        if labels + GAP + NARROWEST_TEXT > options.max_width:
            yield from _stacked(
                self._title, [(label, text.split(" ")) for label, text in self._rows], options.max_width, separator=""
            )
            return
        table = _plain_table(self._title, show_header=False)
        table.add_column("", overflow="fold", no_wrap=True)
        table.add_column("", overflow="fold")
        for label, text in self._rows:
            table.add_row(Text(label), Text(text))
        yield table


def _plain_table(title: str, *, show_header: bool = True) -> Table:
    from rich.table import Table

    return Table(
        box=None, pad_edge=False, title=title or None, title_justify="left", title_style="bold", show_header=show_header
    )


def _stacked(
    title: str, rows: Iterable[tuple[str, list[str]]], width: int, separator: str = ","
) -> Iterator[RenderableType]:
    """The title, then each label with its parts below, none of which is broken if a line can hold it."""
    from rich.text import Text

    if title:
        yield _line(Text(title, style="bold"))
    for label, parts in rows:
        indent = len(label) - len(label.lstrip())
        for line in wrapped(label, width, indent):
            yield _line(Text(line))
        for line in packed([part + separator for part in parts[:-1]] + parts[-1:], width, indent + INDENT):
            yield _line(Text(line))


def _line(text: Text) -> Text:
    """One that is short enough; only a word wider than the terminal goes on in the next line."""
    text.overflow = "fold"
    return text


def packed(parts: Sequence[str], width: int, indent: int) -> list[str]:
    """Parts beside one another as far as they fit; one that no line can hold is broken at its words."""
    lines: list[str] = []
    for part in parts:
        if lines and cells(lines[-1]) + 1 + cells(part) <= width:
            lines[-1] += f" {part}"
        else:
            lines += wrapped(part, width, indent)
    return lines
