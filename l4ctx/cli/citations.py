"""Shows the sources of an answer, behind it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from l4ctx.cli.console import columns
from l4ctx.cli.exits import write
from l4ctx.cli.wrapping import cells, wrapped
from l4ctx.formatting import as_one_line, without_controls

if TYPE_CHECKING:
    from l4ctx.prompt.citations import Citations

MOST_LINES = 6
"""Of a place that are shown."""


def show_citations(citations: Citations) -> None:
    """Writes them to standard output. Raises OutputError."""
    lines = citation_lines(citations)
    if sys.stdout.isatty():
        width = columns(sys.stdout)
        lines = [part for line in lines for part in _fitting(line, width)]
    write("".join(f"{line}\n" for line in lines))


def _fitting(line: str, width: int) -> list[str]:
    """A line that is too wide, broken at words; each part begins as far from the margin as the line does."""
    indent = len(line) - len(line.lstrip())
    return [line] if cells(line) <= width or indent > width // 2 else wrapped(line, width, indent)


def citation_lines(citations: Citations) -> list[str]:
    """First what the answer quotes, then where the model looked."""
    lines = list[str]()
    if citations.quoted:
        lines += ["", "Quoted:"]
    for quotation in citations.quoted:
        where = "NOT FOUND in the documents"
        if quotation.places:
            more = len(quotation.places) - 1
            where = f"{quotation.places[0]}" + (f" (and in {more} more)" if more else "")
        lines.append(f'  "{as_one_line(quotation.text)}": {where}')
    lines += ["", "Attended:"] if citations.attended else ["", f"Attended: {citations.why_none}."]
    for number, (one, text) in enumerate(zip(citations.attended, citations.texts, strict=True), 1):
        lines.append(f"[{number}] {one.place} ({one.share:.0%})")
        found = without_controls(text).split("\n")
        lines += [f"    {line}" for line in found[:MOST_LINES]]
        if len(found) > MOST_LINES:
            lines.append("    …")
    return lines
