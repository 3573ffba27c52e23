"""--log-file: what a run tells on stderr, also in a file, each line with its time."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from l4ctx.errors import UsageError
from l4ctx.formatting import as_one_line, printable
from l4ctx.machine.private import open_private

_LOGGER = logging.getLogger("l4ctx")
_LOGGER.propagate = False
_LOGGER.setLevel(logging.INFO)


Option = Annotated[
    str | None,
    typer.Option("--log-file", metavar="FILE", help="Append what is told on stderr to this file, too."),
]


def with_log_file(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with the option --log-file."""

    @functools.wraps(command)
    def logged(*arguments: Any, log_file: str | None = None, **named: Any) -> None:
        if log_file is not None:
            open_log(log_file, command.__name__)
        try:
            command(*arguments, **named)
        finally:
            close_log()

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("log_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Option)
    parameters = [*signature.parameters.values(), option]
    logged.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    logged.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return logged


def keep(text: str) -> None:
    """Writes a line to the file, if there is one."""
    if _open_files():
        _LOGGER.info("%s", as_one_line(text))


def open_log(name: str, command: str) -> None:
    """Appends to that file from now on, which only its owner can read if it is new. Raises UsageError."""
    close_log()
    if not name:
        raise UsageError("--log-file: the name of the file is empty (is a shell variable unset?)")
    try:
        descriptor = open_private(Path(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        handler = _Unfailing(os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UsageError(f"--log-file {printable(name)}: cannot be written: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    _LOGGER.addHandler(handler)
    keep(f"{command} begins")


def close_log() -> None:
    for handler in _open_files():
        _LOGGER.removeHandler(handler)
        handler.close()


def _open_files() -> list[_Unfailing]:
    """Others may have put handlers of their own there."""
    return [handler for handler in _LOGGER.handlers if isinstance(handler, _Unfailing)]


class _Unfailing(logging.StreamHandler[Any]):
    """Losing a line must not cost the answer."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        super().close()
        with suppress(OSError):
            self.stream.close()
