"""Word wrapping by terminal cells: of whole texts, and of answers as they are streamed. Words are never split."""

from __future__ import annotations

import re
from collections.abc import Callable

TAB_CELLS = 8
MARKS = re.compile("[\x0e-\x17]")
"""Characters that stand for changes of style, and take no room; see `l4ctx.cli.markdown.styles`."""

_LIST_ITEM = re.compile(r"(?:[-*+•>│]|\d{1,3}[.)])")
_STAYS_BEHIND = frozenset("、。，．：；？！）］｝」』】〉》〕’”々ー…")  # never at the start of a line


def cells(text: str) -> int:
    """Width in terminal columns: 2 for a wide character, 0 for a combining one and for marks of styles."""
    from rich.cells import cell_len

    text = MARKS.sub("", text)
    return len(text) if text.isascii() else cell_len(text)


class WordWrap:
    """Wraps streamed text; holds back only the current word and the blanks before it.

    Left for the terminal to wrap: lines inside ``` fences, code indented by four blanks or a tab, table rows, and words
    wider than a line. Lines may break between wide characters. List items get a hanging indent. `width` is called for
    every word, since the terminal may be resized.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._ask_width = width
        self._is_fenced = self._is_in_list = False
        self._start_line()

    def _start_line(self) -> None:
        self._width = max(1, self._ask_width())
        self._column = 0  # after the text returned so far
        self._indent = 0  # of continuation lines
        self._start = ""  # the line's first characters, which decide how it is wrapped
        self._blanks = self._word = ""  # held back
        self._has_words = self._is_passing = False  # passing: inside a word wider than a line

    @property
    def is_at_line_start(self) -> bool:
        """Whether the text returned so far ends at the start of a line."""
        return self._column == 0

    def push(self, text: str) -> str:
        """Returns the text that can be written now."""
        return "".join(map(self._push, text))

    def finish(self) -> str:
        """Returns the text that was held back."""
        shown = self._give_word() + self._blanks
        self._column, self._blanks = self._blank_stop(), ""
        return shown

    def _push(self, character: str) -> str:
        if character == "\n":
            shown = self.finish() + "\n"
            self._is_fenced ^= self._start.lstrip().startswith("```")
            self._start_line()
            return shown
        if MARKS.match(character):
            self._word += "" if self._is_passing else character
            return character if self._is_passing else ""
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
            self._column = (self._column + cells(character) - 1) % self._width + 1  # as the terminal wraps it
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
        """Whether a run without blanks may be broken here: between wide characters."""
        if not self._word or character in _STAYS_BEHIND or cells(character) == 0:
            return False
        return 2 in (cells(character), cells(self._word[-1]))

    def _give_word(self) -> str:
        if not self._word:
            return ""
        width, shown = cells(self._word), self._blanks
        self._width = max(1, self._ask_width())
        if self._column and self._blank_stop() + width > self._width:
            shown, self._column = f"\n{' ' * self._indent}", self._indent
        else:
            self._column = self._blank_stop()
        if not self._has_words:
            is_item = _LIST_ITEM.fullmatch(MARKS.sub("", self._word)) is not None
            self._is_in_list = is_item or (self._is_in_list and self._column > 0)
            self._indent = min(self._column + (width + 1) * is_item, self._width // 2)
        shown += self._word
        self._column += width
        self._blanks, self._word, self._has_words = "", "", True
        return shown

    def _blank_stop(self) -> int:
        """The column after the held-back blanks."""
        column = self._column
        for blank in self._blanks:
            column += TAB_CELLS - column % TAB_CELLS if blank == "\t" else 1
        return column


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Wraps `text` into lines of at most `width` columns, except for longer words, each indented by `indent`."""
    lines: list[str] = []
    for word in text.split():
        if lines and cells(lines[-1]) + 1 + cells(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word)
    return lines
