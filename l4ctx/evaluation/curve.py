"""Perplexity by position as a picture: a line with its interval of 95 %, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterator

from l4ctx.evaluation.picture import INK, PALE, RULE, Area, Line, Picture, Words
from l4ctx.evaluation.positions import ByPosition, Sums, with_enough_tokens
from l4ctx.formatting import short_count

WIDTH, HEIGHT = 640.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 44.0, 48.0
LINE_COLOUR, BAND_COLOUR = "#2166ac", "#d1e5f0"


def perplexity_curve(by_position: ByPosition, title: str) -> Picture:
    """Of the ranges that have enough tokens."""
    drawn = with_enough_tokens(by_position.filled())
    middles = [start + sums.tokens / 2 for start, sums in drawn]
    low, high = _limits([sums for _, sums in drawn])
    first, last = math.log2(drawn[0][0]), math.log2(drawn[-1][0] + drawn[-1][1].tokens)

    def x(position: float) -> float:
        share = (math.log2(position) - first) / max(last - first, 1e-9)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(nats: float) -> float:
        return TOP + (high - nats) / (high - low) * (HEIGHT - TOP - BOTTOM)

    picture = Picture(WIDTH, HEIGHT, title, [Words(LEFT, 22, title, 14)])
    picture.shapes.append(Words(LEFT, 37, "perplexity, with its interval of 95 %", 11, PALE))
    for value in _ticks(low, high):
        at = y(math.log(value))
        picture.shapes += [
            Line([(LEFT, at), (WIDTH - RIGHT, at)], RULE),
            Words(LEFT - 6, at + 4, f"{value:g}", 11, PALE, "end"),
        ]
    starts = [start for start, _ in drawn]
    every = -(-len(starts) // 10)
    for start in starts[::every]:
        picture.shapes += [
            Line([(x(start), HEIGHT - BOTTOM), (x(start), HEIGHT - BOTTOM + 4)], PALE),
            Words(x(start), HEIGHT - BOTTOM + 18, short_count(start), 11, PALE, "middle"),
        ]
    picture.shapes.append(
        Words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "position (tokens before)", 11, PALE, "middle")
    )
    upper = [(x(at), y(min(high, sums.mean + sums.error))) for at, (_, sums) in zip(middles, drawn, strict=True)]
    lower = [(x(at), y(max(low, sums.mean - sums.error))) for at, (_, sums) in zip(middles, drawn, strict=True)]
    line = [(x(at), y(sums.mean)) for at, (_, sums) in zip(middles, drawn, strict=True)]
    if len(line) > 1:
        picture.shapes += [Area([*upper, *reversed(lower)], BAND_COLOUR), Line(line, LINE_COLOUR, 2)]
    for at, value in line:
        picture.shapes.append(
            Area([(at - 3, at_y) for at_y in (value - 3, value + 3)] + _right(at, value), LINE_COLOUR)
        )
    picture.shapes.append(Line([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], INK))
    return picture


def _right(x: float, y: float) -> list[tuple[float, float]]:
    return [(x + 3, y + 3), (x + 3, y - 3)]


def _limits(sums: list[Sums]) -> tuple[float, float]:
    """In nats: of what is drawn, with a margin."""
    low = min(one.mean - min(one.error, 0.5) for one in sums)
    high = max(one.mean + min(one.error, 0.5) for one in sums)
    margin = max(0.05, 0.05 * (high - low))
    return max(0.0, low - margin), high + margin


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round perplexities between two limits in nats, at most about ten of them."""
    decades = (high - low) / math.log(10)
    steps: tuple[float, ...] = (1.0,) if decades > 5 else (1.0, 3.0) if decades > 2 else (1.0, 2.0, 5.0)
    if decades < 0.5:
        steps = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    for power in range(int(low / math.log(10)) - 1, int(high / math.log(10)) + 2):
        for step in steps:
            value = step * 10.0**power
            if low <= math.log(value) <= high:
                yield value
