"""Styles within text as single control characters, so that it can be wrapped before it becomes escape sequences.

An answer cannot contain these characters: `l4ctx.formatting.without_controls` is applied to it first.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from l4ctx.cli.wrapping import MARKS


class _Codes(NamedTuple):
    mark: str  # switches the style on; the next character switches it off
    on: str  # parameter of the escape sequence
    off: str


class Style(Enum):
    BOLD = _Codes("\x0e", "1", "22")
    ITALIC = _Codes("\x10", "3", "23")
    UNDERLINE = _Codes("\x12", "4", "24")
    STRUCK = _Codes("\x14", "9", "29")
    CODE = _Codes("\x16", "36", "39")
    """A colour: the only one."""

    def around(self, text: str) -> str:
        """`text` in this style, line by line."""
        return "\n".join(f"{self.start}{line}{self.stop}" if line else "" for line in text.split("\n"))

    @property
    def start(self) -> str:
        return self.value.mark

    @property
    def stop(self) -> str:
        return chr(ord(self.value.mark) + 1)


_STARTS = {style.start: style for style in Style}
_STOPS = {style.stop: style for style in Style}


def balanced(lines: list[str]) -> list[str]:
    """Lines of one text, each with the marks that begin and end on it what is styled across lines."""
    closed, open_styles = list[str](), list[Style]()
    for line in lines:
        before = "".join(style.start for style in open_styles)
        for mark in MARKS.findall(line):
            if (style := _STARTS.get(mark)) is not None:
                open_styles.append(style)
            else:
                open_styles.remove(_STOPS[mark])
        closed.append(f"{before}{line}{''.join(style.stop for style in reversed(open_styles))}")
    return closed


class Painter:
    """Turns marks into escape sequences. What `paint` returns leaves the terminal without any style."""

    def __init__(self, *, has_colours: bool) -> None:
        self._codes = {style: style.value for style in Style}
        if not has_colours:
            self._codes[Style.CODE] = Style.BOLD.value
        self._depths = dict.fromkeys(Style, 0)

    def paint(self, text: str) -> str:
        """`text` continues the text painted before: with the styles that were not switched off there."""
        if not text:
            return ""
        painted = self._active() + MARKS.sub(lambda found: self._switched(found.group()), text)
        return painted + "".join(f"\x1b[{self._codes[style].off}m" for style, depth in self._depths.items() if depth)

    def _switched(self, mark: str) -> str:
        if (style := _STARTS.get(mark)) is not None:
            self._depths[style] += 1
            return f"\x1b[{self._codes[style].on}m" if self._depths[style] == 1 else ""
        style = _STOPS[mark]
        self._depths[style] -= 1
        return "" if self._depths[style] else f"\x1b[{self._codes[style].off}m{self._active()}"

    def _active(self) -> str:
        return "".join(f"\x1b[{self._codes[style].on}m" for style, depth in self._depths.items() if depth)
