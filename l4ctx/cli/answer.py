"""Shows an answer while it is generated: on a terminal broken at words, elsewhere as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, write
from l4ctx.cli.wrapping import WordWrap
from l4ctx.errors import OutputError
from l4ctx.formatting import counted, without_controls

if TYPE_CHECKING:
    from l4ctx.run.session import Session


def show_answer(session: Session, note: Callable[[str], None], interruption: Interruption, *, json: bool) -> None:
    """Generates the answer; writes it to standard output, unless `json` is to show it whole.

    Raises OutputError and what `Session.decode` raises; the line that was begun is ended before.
    """
    interruption.when = lambda: _after_tokens(session)
    interruption.kept = lambda: _kept(session)
    shown = _Answer()
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


class _Answer:
    """Standard output, and whether its last line has been begun."""

    def __init__(self) -> None:
        self._wrap = WordWrap(_terminal_width) if sys.stdout is not None and sys.stdout.isatty() else None
        self._is_line_begun = False
        self._is_ended = False  # by a newline of the answer itself

    def write(self, text: str) -> None:
        if text:
            self._is_ended = text.endswith("\n")
        self._write(self._wrap.push(text) if self._wrap else text)

    def finish(self) -> None:
        """Ends the last line, unless the answer did."""
        rest = self._wrap.finish() if self._wrap else ""
        self._write(rest if self._is_ended else f"{rest}\n")

    def end_line(self) -> None:
        """After what was given out so far, if that is within a line."""
        rest = self._wrap.finish() if self._wrap else ""
        if rest or self._is_line_begun:
            self._write(f"{rest}\n")

    def _write(self, text: str) -> None:
        if text:
            write(text)
            self._is_line_begun = not text.endswith("\n")


def _terminal_width() -> int:
    from l4ctx.cli.console import columns

    return columns(sys.stdout)
