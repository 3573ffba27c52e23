"""Calls into a library that hold up Ctrl-C and print: made by a thread that may be left behind, with stderr closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
_Outcome = SimpleQueue[tuple[Any, BaseException | None]]


class Aside:
    """Makes calls in one thread, and waits for them so that Ctrl-C comes through; the call is then left behind.

    Only for what releases the interpreter's lock.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], _Outcome]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, call: Callable[[], Result]) -> Result:
        """Raises what the call raises, and RuntimeError where no thread can be started."""
        if self._thread is None or not self._thread.is_alive():
            self._calls = SimpleQueue()
            thread = threading.Thread(target=_make, args=(self._calls,), name="aside", daemon=True)
            thread.start()
            self._thread = thread
        outcome: _Outcome = SimpleQueue()
        self._calls.put((call, outcome))
        try:
            result, error = outcome.get()
        except BaseException:
            self._thread = None  # it may be busy for hours
            raise
        if error is not None:
            raise error
        return result


def _make(calls: SimpleQueue[tuple[Callable[[], Any], _Outcome]]) -> None:
    while True:
        call, outcome = calls.get()
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))
        del call, outcome  # and what they hold


@contextmanager
def quiet() -> Iterator[None]:
    """Closes standard error meanwhile, also to code that is not Python's: a panic in Rust prints its stack.

    What other threads write there is lost.
    """
    saved = None
    with suppress(OSError):  # it is closed already, or no file can be opened
        saved = os.dup(2)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)
    try:
        yield
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)
