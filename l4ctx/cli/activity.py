"""Shows on stderr what the program is doing: a live line on a terminal, elsewhere a plain line from time to time.

Both are drawn by their own thread, so that they keep updating while a single step takes minutes.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from l4ctx.cli.console import NARROW_COLUMNS
from l4ctx.cli.log_file import keep
from l4ctx.formatting import human_clock, without_controls
from l4ctx.machine.limits import startable_threads

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console, RenderableType
    from rich.live import Live


PLAIN_LINE_SECONDS = 30.0
"""Interval between progress lines where there is no terminal."""

LIVE_SECONDS = 0.25


class View(Protocol):
    """Something to show; called from the drawing thread."""

    @property
    def share(self) -> float | None:
        """The completed share, from 0 to 1; None if unknown."""

    def line(self, width: int | None, now: float) -> str:
        """The status at `now` (time.monotonic()), in at most `width` columns."""


class Activity:
    """A context manager, reusable, that shows the current view while it is entered, if a thread can be started."""

    def __init__(self, console: Console, *, is_shown: bool = True) -> None:
        self._console, self._is_shown = console, is_shown
        self._view: View = Doing("preparing")
        self._live: Live | None = None
        self._spinner: RenderableType | None = None  # one for all frames, since it animates by its own clock
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._last_line = 0.0

    def tell(self, what: str) -> None:
        """Sets what is being done from now on, such as 'loading weights'."""
        if isinstance(self._view, Doing) and self._view.kind == what.partition(":")[0]:
            self._view.what = what
        else:
            keep(what)
            self.show(Doing(what))

    def show(self, view: View) -> None:
        self._view = view

    def __enter__(self) -> Activity:
        self._last_line = time.monotonic()
        if not self._is_shown or startable_threads(2) < 2:
            return self
        if self._console.is_interactive:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._drawn, console=self._console, transient=True, refresh_per_second=1 / LIVE_SECONDS
            )
            self._live.start(refresh=True)  # a line that rich draws beside the first note would not be erased
        else:
            self._ended.clear()
            self._thread = threading.Thread(target=self._print_lines, name="l4ctx-activity", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        live, thread = self._live, self._thread
        self._live = self._thread = None
        if live is not None:
            live.stop()
        if thread is not None:
            self._ended.set()
            thread.join()
        self._view = Doing("preparing")  # the next time begins with something else

    def _print_lines(self) -> None:
        while not self._ended.wait(max(0.05, self._last_line + PLAIN_LINE_SECONDS - time.monotonic())):
            self.beat()

    def beat(self) -> None:
        """Prints a plain line if one is due."""
        now = time.monotonic()
        if self._thread is None or now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._last_line = now
        keep(self._view.line(None, now))
        line = without_controls(f"l4ctx: {self._view.line(None, now)}")
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _drawn(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        width, share = self._console.width, self._view.share
        parts: list[RenderableType] = []
        if width >= NARROW_COLUMNS and share is not None:
            bar = 24 if width >= 160 else 10
            parts = [Text("reading"), ProgressBar(total=1.0, completed=share, width=bar)]
            width -= len("reading ") + bar + 1
        elif width >= NARROW_COLUMNS:
            self._spinner = self._spinner or Spinner("line")
            parts = [self._spinner]
            width -= 2
        line = without_controls(self._view.line(width - 1, time.monotonic())).replace("\n", " ")
        drawn = Table.grid(padding=(0, 1))
        for _ in (*parts, line):
            drawn.add_column(no_wrap=True)
        drawn.add_row(*parts, Text(line, overflow="crop"))
        return drawn


class Doing:
    """Work of unknown duration: what is being done, and for how long so far."""

    share = None

    def __init__(self, what: str) -> None:
        self.what, self._began = what, time.monotonic()

    @property
    def kind(self) -> str:
        """The part of the text that stays the same while its numbers change."""
        return self.what.partition(":")[0]

    def line(self, width: int | None, now: float) -> str:
        seconds = now - self._began
        return f"{self.what}, {human_clock(seconds)} so far" if seconds >= 1 else self.what
