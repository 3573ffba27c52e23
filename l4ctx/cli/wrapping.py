"""Text broken at words by the cells that it takes on a terminal: whole texts, and answers as they come in pieces.

Words are never cut. Writes nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TAB_CELLS = 8
_LIST_ITEM = re.compile(r"(?:[-*+•]|\d{1,3}[.)])")
_STAYS_BEHIND = frozenset("、。，．：；？！）］｝」』】〉》〕’”々ー…")  # never begins a line


def cells(text: str) -> int:
    """Columns that it takes: 2 for a wide character, 0 for one that combines."""
    from rich.cells import cell_len

    return len(text) if text.isascii() else cell_len(text)


class WordWrap:
    """Breaks a text that comes in pieces; holds back the present word and the blanks before it, no more.

    Left as they are, for the terminal to break: lines inside ``` fences, code indented by four blanks or a tab, rows of
    tables, and words wider than a line. Wide characters may be broken between. An item of a list is continued below its
    text. `width` is asked at the start of every line, for a terminal may be resized.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._ask_width = width
        self._is_fenced = self._is_in_list = False
        self._start_line()

    def _start_line(self) -> None:
        self._width = max(1, self._ask_width())
        self._column = 0  # after what was given out
        self._indent = 0  # of lines that continue this one
        self._start = ""  # of the line, as far as it decides how it is broken
        self._blanks = self._word = ""  # held back
        self._has_words = self._is_passing = False  # passing: in a word that fits on no line

    @property
    def is_at_line_start(self) -> bool:
        """Of what was given out."""
        return self._column == 0

    def push(self, text: str) -> str:
        """What can be written now."""
        return "".join(map(self._push, text))

    def finish(self) -> str:
        """What was held back."""
        shown = self._give_word() + self._blanks
        self._column, self._blanks = self._blank_stop(), ""
        return shown

    def _push(self, character: str) -> str:
        if character == "\n":
            shown = self.finish() + "\n"
            self._is_fenced ^= self._start.lstrip().startswith("```")
            self._start_line()
            return shown
        if len(self._start) < 16:
            self._start += character
        if character in " \t":
            shown = self._give_word()
            self._blanks += character
            self._is_passing = False
            return shown
        if self._is_preformatted:
            shown = self.finish() + character
            self._column += cells(character)
            return shown
        if self._is_passing:
            self._column = (self._column + cells(character) - 1) % self._width + 1  # as the terminal breaks it
            return character
        shown = self._give_word() if self._may_break_before(character) else ""
        self._word += character
        if cells(self._word) > self._width - self._indent:
            shown += self._give_word()
            self._is_passing = True
        return shown

    @property
    def _is_preformatted(self) -> bool:
        is_code = self._start.startswith(("    ", "\t")) and not self._is_in_list
        return self._is_fenced or is_code or self._start.lstrip().startswith(("|", "```"))

    def _may_break_before(self, character: str) -> bool:
        """Inside of a run without blanks."""
        if not self._word or character in _STAYS_BEHIND or cells(character) == 0:
            return False
        return 2 in (cells(character), cells(self._word[-1]))

    def _give_word(self) -> str:
        if not self._word:
            return ""
        width, shown = cells(self._word), self._blanks
        if self._column and self._blank_stop() + width > self._width:
            shown, self._column = f"\n{' ' * self._indent}", self._indent
        else:
            self._column = self._blank_stop()
        if not self._has_words:
            is_item = _LIST_ITEM.fullmatch(self._word) is not None
            self._is_in_list = is_item or (self._is_in_list and self._column > 0)
            self._indent = min(self._column + (width + 1) * is_item, self._width // 2)
        shown += self._word
        self._column += width
        self._blanks, self._word, self._has_words = "", "", True
        return shown

    def _blank_stop(self) -> int:
        """The column after the blanks that are held back."""
        column = self._column
        for blank in self._blanks:
            column += TAB_CELLS - column % TAB_CELLS if blank == "\t" else 1
        return column


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of at most `width` columns, unless a word alone takes more, each after `indent` blanks."""
    lines: list[str] = []
    for word in text.split():
        if lines and cells(lines[-1]) + 1 + cells(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word)
    return lines
