"""The terminal: what the standard streams can display, how wide they are, and text that fits them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from l4ctx.cli.log_file import keep
from l4ctx.formatting import without_controls

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_COLUMNS = 160
NARROW_COLUMNS = 80


class _Unfailing:
    """A text stream that ignores failed writes: losing a note must not cost the answer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_screen(stream: TextIO | None) -> bool:
    """Whether it is a terminal that can move its cursor. Environment variables that force colour do not count."""
    return (
        stream is not None
        and stream.isatty()
        and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
        and os.environ.get("TTY_COMPATIBLE") != "0"
    )


def columns(stream: TextIO) -> int:
    """The width of the stream's terminal, or COLUMNS if set; 80 if unknown."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def stderr_console() -> Console:
    """A console on stderr that keeps working if stderr is closed or full, and animates only on a terminal."""
    from rich.console import Console

    is_animated = is_screen(sys.stderr) and os.environ.get("TTY_INTERACTIVE") != "0"
    return Console(file=cast(TextIO, _Unfailing(sys.stderr)), force_interactive=is_animated)


def notes(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """Returns a function that prints a note on one line, wrapped at words on a narrow terminal; or not if `quiet`."""
    from l4ctx.cli.wrapping import wrapped

    def note(text: str) -> None:
        keep(text)
        line = without_controls(f"l4ctx: {text}")
        if console.is_interactive and console.width < NARROW_COLUMNS:
            line = "\n".join(wrapped(line, console.width))
        if not quiet:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return note


def rendered(content: RenderableType) -> str:
    """Renders for stdout: at the terminal's width and styled if it is one, else plain at PIPED_COLUMNS."""
    from rich.console import Console

    shown = io.StringIO()
    width = columns(sys.stdout) if sys.stdout.isatty() else PIPED_COLUMNS
    Console(file=shown, width=width, force_terminal=is_screen(sys.stdout)).print(content)
    return "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def shortened(text: str, width: int) -> str:
    """Shortens `text` to at most `width` columns by replacing its middle with an ellipsis."""
    from l4ctx.cli.wrapping import cells

    if cells(text) <= width:
        return text
    head, tail = 0, len(text)
    while True:
        is_at_end = len(text) - tail <= head
        more = (head, tail - 1) if is_at_end else (head + 1, tail)
        if cells(text[: more[0]]) + cells(text[more[1] :]) + 1 > width:
            return f"{text[:head]}…{text[tail:]}"
        head, tail = more
