"""Shows an answer while it is generated: on a terminal as Markdown, broken at words, elsewhere as it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, write
from l4ctx.cli.wrapping import WordWrap
from l4ctx.errors import OutputError
from l4ctx.formatting import counted, without_controls

if TYPE_CHECKING:
    from l4ctx.cli.markdown.stream import MarkdownStream
    from l4ctx.run.session import Session


def show_answer(
    session: Session, note: Callable[[str], None], interruption: Interruption, *, json: bool, plain: bool = False
) -> None:
    """Generates the answer; writes it to standard output, unless `json` is to show it whole.

    `plain`: without rendering Markdown on a terminal.

    Raises OutputError and what `Session.decode` raises; the line that was begun is ended before.
    """
    interruption.when = lambda: _after_tokens(session)
    interruption.kept = lambda: _kept(session)
    shown = AnswerStream(is_plain=plain)
    try:
        for piece in session.decode():
            if not json:
                shown.write(without_controls(piece))
        if not json:
            shown.finish()
    except (KeyboardInterrupt, Exception):
        with suppress(OSError, OutputError):  # of a stream that has failed already
            shown.end_line()
        raise
    answer = session.answer
    if answer.loop is not None:
        period = "token" if answer.loop.period == 1 else f"{answer.loop.period} tokens"
        note(
            f"the answer repeats itself (the same {period}, {answer.loop.times} times in a row) and was ended there; "
            "--no-loop-guard lets it go on"
        )
    elif answer.stop_reason == "length":
        note(f"the answer was cut at {session.sized.inputs.max_new_tokens} tokens; --max-new-tokens allows more")
    elif not answer.text.strip():
        note("the model ended its answer at once")


def _after_tokens(session: Session) -> str:
    tokens = session.answer.tokens
    return f" after {counted(tokens, 'token')} of the answer" if tokens else ""


def _kept(session: Session) -> str:
    """Of what was read for the answer."""
    context, paths = session.request.context, session.request.sources.paths
    if not session.answer.tokens or context.folder is None or (context.answer_from is not None and paths):
        return session.monitor.kept()
    return f"the context {context.folder} holds what was read"


class AnswerStream:
    """An answer on standard output, and whether its last line has been begun.

    On a terminal words stay whole, and Markdown is rendered unless `is_plain`; elsewhere every character is written.
    """

    def __init__(self, *, is_plain: bool = False) -> None:
        self._layout = _layout(is_plain=is_plain)
        self._is_begun = self._is_line_begun = False

    def write(self, text: str) -> None:
        """Writes what can be shown now of the answer's next piece, which holds no control characters."""
        self._write(self._layout.push(text) if self._layout else text)

    def finish(self) -> None:
        """Ends the last line, unless the answer did."""
        self._write(self._layout.finish() if self._layout else "")
        if self._is_line_begun or not self._is_begun:
            self._write("\n")

    def end_line(self) -> None:
        """After what was given out so far, if that is within a line."""
        self._write(self._layout.finish() if self._layout else "")
        if self._is_line_begun:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            write(text)
            self._is_begun, self._is_line_begun = True, not text.endswith("\n")


def _layout(*, is_plain: bool) -> WordWrap | MarkdownStream | None:
    """What arranges an answer for the terminal; None where standard output is none."""
    from l4ctx.cli.console import is_screen

    if sys.stdout is None or not sys.stdout.isatty():
        return None
    if is_plain or not is_screen(sys.stdout):
        return WordWrap(_terminal_width)
    from l4ctx.cli.markdown.stream import MarkdownStream

    is_ascii = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return MarkdownStream(_terminal_width, has_colours=not os.environ.get("NO_COLOR"), is_ascii=is_ascii)


def _terminal_width() -> int:
    from l4ctx.cli.console import columns

    return columns(sys.stdout)
