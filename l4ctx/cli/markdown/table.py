"""Tables of Markdown: beside one another where the columns fit, else each cell below the one before it."""

from __future__ import annotations

import re

from l4ctx.cli.markdown.inline import styled
from l4ctx.cli.markdown.styles import Style, balanced
from l4ctx.cli.wrapping import cells, wrapped

GAP = 2
_RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")
_BAR = re.compile(r"(?<!\\)\|")


def is_rule(line: str) -> bool:
    """Whether it is the line of dashes below the names of the columns."""
    return "|" in line and _RULE.fullmatch(line.strip()) is not None


def drawn(lines: list[str], width: int, dash: str) -> str:
    """The lines of a table, of which the second is its rule, in at most `width` columns where words allow that."""
    rows = [_cells_of(line) for line in (lines[0], *lines[2:])]
    count = len(rows[0])
    rows = [[*row, *[""] * count][:count] for row in rows]
    rights = [rule.endswith(":") and not rule.startswith(":") for rule in _cells_of(lines[1])]
    rights = [*rights, *[False] * count][:count]
    widths = _widths(rows, width - GAP * (count - 1))
    if widths is None:
        return _stacked(rows, width)
    names = [Style.BOLD.around(name) if name else "" for name in rows[0]]
    shown = [*_lines([names], widths, rights), dash * (sum(widths) + GAP * (count - 1))]
    return "".join(f"{line.rstrip()}\n" for line in [*shown, *_lines(rows[1:], widths, rights)])


def _cells_of(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [styled(cell.strip().replace("\\|", "|")) for cell in _BAR.split(inner)]


def _widths(rows: list[list[str]], room: int) -> list[int] | None:
    """Columns of each; None where the longest words do not fit beside one another."""
    columns = list(zip(*rows, strict=True))
    wanted = [max(1, *map(cells, column)) for column in columns]
    least = [max(1, *(cells(word) for cell in column for word in cell.split() or [""])) for column in columns]
    if sum(wanted) <= room:
        return wanted
    if sum(least) > room:
        return None
    widths, rest = least, room - sum(least)
    while rest:  # to the column that lacks most of what it wants
        number = max(range(len(widths)), key=lambda n: wanted[n] - widths[n])
        widths[number] += 1
        rest -= 1
    return widths


def _lines(rows: list[list[str]], widths: list[int], rights: list[bool]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        broken = [balanced(wrapped(cell, width)) or [""] for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, broken))):
            parts = [column[number] if number < len(column) else "" for column in broken]
            padded = [
                " " * (width - cells(part)) + part if is_right else part + " " * (width - cells(part))
                for part, width, is_right in zip(parts, widths, rights, strict=True)
            ]
            lines.append((" " * GAP).join(padded))
    return lines


def _stacked(rows: list[list[str]], width: int) -> str:
    """Each row as lines of a column's name and the cell."""
    names, blocks = rows[0], list[str]()
    for row in rows[1:]:
        pairs = [f"{Style.BOLD.around(name)} {cell}" if name else cell for name, cell in zip(names, row, strict=True)]
        blocks.append("".join(f"{line}\n" for pair in pairs for line in wrapped(pair, width)))
    return "\n".join(blocks) or "".join(f"{line}\n" for line in wrapped(" ".join(names), width))
