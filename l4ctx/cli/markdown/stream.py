"""Renders Markdown line by line while it is generated, without ever going back to what a terminal shows already.

So nothing flickers, and a terminal may be resized at any time. Held back are the present word, spans until they are
closed, and tables until their last row.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from l4ctx.cli.markdown.inline import InlineText, styled
from l4ctx.cli.markdown.styles import Painter, Style
from l4ctx.cli.markdown.table import drawn, is_rule
from l4ctx.cli.wrapping import WordWrap

RULE_COLUMNS = 20
LONGEST_START = 2000
"""Characters of a line after which it is taken for a paragraph."""

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[^`]*")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+")
_ITEM = re.compile(r"([ \t]*)[-*+]([ \t]+)")
_LISTED = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]")
_QUOTE = re.compile(r" {0,3}> ?")
_RULE = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})")
_UNDECIDED = re.compile(
    r"[ \t]*(?:\|.*|`{0,2}|`{3,}[^`]*|~{0,2}|~{3,}.*|#{0,6}[ \t]*|>|\+?[ \t]*|\d{0,9}[.)]?[ \t]*|[-*_ \t]*)"
)
"""The start of a line that may still become one of the above, a table's row among them."""


class MarkdownStream:
    """Takes pieces of an answer, and returns what can be shown of it: words wrapped to `width`, which is called for
    every word, with escape sequences for styles.
    """

    def __init__(self, width: Callable[[], int], *, has_colours: bool = True, is_ascii: bool = False) -> None:
        """`is_ascii`: the terminal can show no other characters of ours."""
        self._width = width
        self._bullet, self._bar, self._dash = "*>-" if is_ascii else "•│─"
        self._wrap, self._painter = WordWrap(width), Painter(has_colours=has_colours)
        self._inline = InlineText()
        self._start: str | None = ""  # of a line, until it is known what kind it is; None: known
        self._heading: Style | None = None
        self._table: list[str] = []
        self._fence = ""  # what closes it
        self._is_code = self._is_in_list = False

    def push(self, text: str) -> str:
        """Returns the text that can be written now."""
        lines = text.split("\n")
        shown = "".join(self._more(line) + self._end_line() for line in lines[:-1])
        return self._painter.paint(shown + self._more(lines[-1]))

    def finish(self) -> str:
        """Returns the text that was held back; after a table it ends with a line end."""
        shown = ""
        if self._start:
            special = self._special(self._start)
            shown = self._begin(self._start) if special is None else special
        if self._table:
            shown += self._end_table()
        return self._painter.paint(shown + self._end_words() + self._wrap.finish())

    # One line

    def _more(self, text: str) -> str:
        """Of the present line."""
        if self._start is None:
            return Style.CODE.around(text) if self._is_code else self._words(text)
        self._start += text
        if len(self._start) < LONGEST_START and _UNDECIDED.fullmatch(self._start):
            return ""
        return self._begin(self._start)

    def _end_line(self) -> str:
        """What was held back of the line, and its end."""
        line, shown = self._start, ""
        if line is not None:
            special = self._special(line)
            self._start = ""
            if special is not None:
                return special
            shown = self._begin(line)
        self._start = ""
        return shown + ("\n" if self._is_code else self._end_words() + self._wrap.push("\n"))

    def _words(self, text: str) -> str:
        return self._wrap.push(self._inline.push(text))

    def _end_words(self) -> str:
        shown = self._wrap.push(self._inline.finish())
        if self._heading is not None:
            shown += self._wrap.push(self._heading.stop)
            self._heading = None
        return shown

    def _begin(self, line: str) -> str:
        """The beginning of code, a heading, a list's item, a quotation or a paragraph."""
        self._start = None
        shown = self._end_table() if self._table else ""
        is_listed = _LISTED.match(line) is not None
        self._is_in_list = is_listed or (self._is_in_list and line[:1] in (" ", "\t", ""))
        self._is_code = bool(self._fence) or (line.startswith(("    ", "\t")) and not self._is_in_list)
        if self._is_code:
            return shown + Style.CODE.around(line)
        prefix = ""
        if (start := _HEADING.match(line)) is not None:
            self._heading = Style.UNDERLINE if len(start[1]) == 1 else Style.BOLD
            prefix = self._heading.start
        elif (start := _ITEM.match(line)) is not None:
            prefix = f"{start[1]}{self._bullet}{start[2]}"
        elif (start := _QUOTE.match(line)) is not None:
            prefix = f"{self._bar} "
        return shown + self._wrap.push(prefix) + self._words(line[start.end() :] if start else line)

    def _special(self, line: str) -> str | None:
        """What is shown instead of a whole line, if it is a table's row, the bounds of code, a rule or blank."""
        if self._fence:
            if not line.strip().startswith(self._fence) or line.strip().strip(self._fence[0]):
                return None
            self._fence = ""
            return ""
        if line.lstrip().startswith("|"):
            self._table.append(line)
            return self._end_table() if len(self._table) == 2 and not is_rule(line) else ""
        shown = self._end_table() if self._table else ""
        if (fence := _FENCE.fullmatch(line)) is not None:
            self._fence = fence[1]
            return shown
        if _RULE.fullmatch(line):
            return f"{shown}{self._dash * max(1, min(RULE_COLUMNS, self._width()))}\n"
        return None if line.strip() else f"{shown}\n"

    def _end_table(self) -> str:
        lines, self._table = self._table, []
        if len(lines) > 1 and is_rule(lines[1]):
            return drawn(lines, max(1, self._width()), self._dash)
        return "".join(f"{styled(line)}\n" for line in lines)
