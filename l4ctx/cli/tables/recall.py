"""Recall as a person reads it in a terminal: a coloured map for each task, in 40 columns and more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.evaluation.heat_map import colour_of, depth_label, interval, percent
from l4ctx.evaluation.picture import readable_on
from l4ctx.formatting import short_count

if TYPE_CHECKING:
    from rich.text import Text

    from l4ctx.evaluation.recall import Recall

LABEL, CELL = 10, 5
"""Columns of a row's name, and of each length."""


def recall_text(recall: Recall, columns: int) -> Text:
    """Figures are written into the colours, so that they are read without them, too."""
    from rich.text import Text

    shown = Text()
    for task in recall.options.tasks:
        _append_map(shown, recall, task, columns)
    cut = recall.cut()
    if cut.asked:
        shown.append(f"cut by a chunk boundary:\n  {cut.right} of {cut.asked} found\n")
    return shown


def _append_map(shown: Text, recall: Recall, task: str, columns: int) -> None:
    from rich.style import Style

    options, whole = recall.options, recall.cell(task)
    shown.append(f"{task}: {whole.right} of {whole.asked} found ({interval(whole)})\n\n", Style(bold=True))
    at_a_time = max(1, (columns - LABEL) // CELL)
    for first in range(0, len(options.lengths), at_a_time):
        lengths = options.lengths[first : first + at_a_time]
        shown.append(" " * LABEL + "".join(f"{short_count(length):>{CELL - 1}} " for length in lengths) + "\n")
        for depth in range(options.depths):
            shown.append(f"{depth_label(depth, options.depths):>{LABEL - 1}} ")
            for length in lengths:
                cell = recall.cell(task, length, depth)
                background = colour_of(cell.share)
                style = Style(color=readable_on(background), bgcolor=background) if cell.asked else Style()
                shown.append(f"{percent(cell):>{CELL - 1}} ", style)
            shown.append("\n")
        shown.append("\n")
    for length in options.lengths:
        total = recall.cell(task, length)
        shown.append(f"{short_count(length):>{LABEL - 1}} {total.right} of {total.asked}, {interval(total)}\n")
    shown.append("\n")
