"""Recall as a picture: for each task a map of lengths and depths, and how sure the figures are."""

from __future__ import annotations

from l4ctx.evaluation.picture import PALE, Box, Picture, Words, mixed, readable_on
from l4ctx.evaluation.recall import Cell, Recall
from l4ctx.formatting import short_count

COLOURS = ("#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#67a9cf", "#2166ac")
"""From nothing found to everything: told apart by people who see red and green alike."""

LEFT, TOP, CELL, ROW, WIDEST = 72.0, 62.0, 52.0, 22.0, 60.0
BELOW = 52.0
"""Height of what stands under a map."""


def colour_of(share: float) -> str:
    return mixed(share, COLOURS)


def depth_label(depth: int, depths: int) -> str:
    """Such as '10-20 %', of the text before it."""
    return f"{100 * depth / depths:.0f}-{100 * (depth + 1) / depths:.0f} %"


def percent(cell: Cell) -> str:
    """Rounded, but 100 only for all and 0 only for none; nothing without trials."""
    if not cell.asked:
        return ""
    return str(min(99, max(1, round(100 * cell.share))) if 0 < cell.right < cell.asked else round(100 * cell.share))


def interval(cell: Cell) -> str:
    """Such as '88-100 %'."""
    low, high = cell.interval
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def heat_map(recall: Recall, name: str) -> Picture:
    """One map under another, for a model of this name."""
    options = recall.options
    height = TOP + options.depths * ROW + BELOW
    width = max(LEFT + len(options.lengths) * max(CELL, WIDEST) + 16, 420.0)
    picture = Picture(width, len(options.tasks) * height, f"{name}: recall by length and depth")
    for number, task in enumerate(options.tasks):
        _map(picture, recall, task, f"{name}: {task}", number * height)
    return picture


def _map(picture: Picture, recall: Recall, task: str, title: str, y: float) -> None:
    options, whole = recall.options, recall.cell(task)
    top = y + TOP
    picture.shapes += [
        Words(12, y + 22, title, 14),
        Words(
            12, y + 38, f"% found, by tokens and depth; {whole.right} of {whole.asked} ({interval(whole)})", 11, PALE
        ),
    ]
    for row in range(options.depths):
        picture.shapes.append(
            Words(LEFT - 8, top + row * ROW + ROW / 2 + 4, depth_label(row, options.depths), 11, PALE, "end")
        )
    for column, length in enumerate(options.lengths):
        x = LEFT + column * WIDEST
        middle = x + WIDEST / 2
        picture.shapes.append(Words(middle, top - 7, short_count(length), 11, PALE, "middle"))
        for row in range(options.depths):
            cell = recall.cell(task, length, row)
            if not cell.asked:
                continue
            colour, at = colour_of(cell.share), top + row * ROW
            told = f"{short_count(length)}, {depth_label(row, options.depths)}: {cell.right} of {cell.asked}"
            picture.shapes += [
                Box(x, at, WIDEST - 1, ROW - 1, colour, f"{told} ({interval(cell)})"),
                Words(middle, at + ROW / 2 + 4, percent(cell), 12, readable_on(colour), "middle"),
            ]
        total, under = recall.cell(task, length), top + options.depths * ROW
        picture.shapes += [
            Words(middle, under + 14, f"{total.right}/{total.asked}", 11, PALE, "middle"),
            Words(middle, under + 28, interval(total), 10, PALE, "middle"),
        ]
    picture.shapes.append(Words(LEFT - 8, top + options.depths * ROW + 14, "all", 11, PALE, "end"))
    picture.shapes.append(Words(LEFT - 8, top + options.depths * ROW + 28, "95 %", 10, PALE, "end"))
