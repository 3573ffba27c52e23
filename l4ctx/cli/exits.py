"""Writing to stdout, and ending a command: an error that the user can cause is one line on stderr and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from l4ctx.cli.log_file import keep
from l4ctx.errors import (
    CHECKPOINT,
    CLOSED,
    CONTEXT,
    INPUT,
    INTERRUPTED,
    MEMORY,
    MODEL,
    OUTPUT,
    TOO_LONG,
    OutputError,
    UsageError,
    exit_code_of,
    one_line,
)
from l4ctx.formatting import as_one_line

EXIT_CODES = """\
Exit codes: 0 an answer, 1 the answer could not be written, 2 bad arguments or input, 3 the checkpoint cannot be
used, 4 the prompt is too long for the model, 5 it does not fit: memory, disk or a limit of the system, 6 the model
failed, 7 the saved context cannot be used, 130 interrupted, 141 the output was closed.
"""


KINDS = {
    OUTPUT: "output",
    INPUT: "input",
    CHECKPOINT: "checkpoint",
    TOO_LONG: "too_long",
    MEMORY: "memory",
    MODEL: "model",
    CONTEXT: "context",
    INTERRUPTED: "interrupted",
}
"""The error type that --json reports for each exit code."""

MOST_CHARACTERS = 2000
"""Of an error's line: messages repeat what files say, and those can say anything."""


@dataclass
class Interruption:
    """What to report on Ctrl-C: when it happened and what is kept. Commands update it as they proceed.

    `owners` are folders with the exit code of an error of the system that names a file in them.
    """

    kept: Callable[[], str] = lambda: "nothing is kept"
    when: Callable[[], str] = lambda: ""  # such as " after 3 tokens of the answer"
    owners: dict[Path, int] = field(default_factory=dict)


@contextmanager
def errors_as_exit_codes(
    *, json: bool = False, checkpoint: Path | None = None, context: Path | None = None
) -> Iterator[Interruption]:
    """Turns errors that the user or the system can cause into one line on stderr and an exit code.

    Others are bugs, and keep their traceback. With `json`, an object on stdout reports the same. An error of the system
    about a file in `checkpoint` or `context` has their exit codes.
    """
    owned = ((checkpoint, CHECKPOINT), (context, CONTEXT))
    interruption = Interruption(owners={folder: code for folder, code in owned if folder is not None})
    try:
        yield interruption
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end in a traceback
        fail(f"interrupted{interruption.when()}; {interruption.kept()}", INTERRUPTED, json=json)
    except BrokenPipeError:
        leave(CLOSED)
    except BaseException as error:  # raised again unless the user can cause it; a library's panic is no Exception
        code = exit_code_of(error, interruption.owners)
        if code is None:
            raise
        fail(one_line(error), code, json=json)


def fail(message: str, code: int, *, json: bool) -> NoReturn:
    """Exits with `code` after one line on stderr and, with `json`, an object on stdout."""
    line = tell(message)
    if json and sys.stdout is not None:
        with suppress(OSError, OutputError):  # if stdout is closed or full, the exit code still reports the error
            write_json(error_report(line, code))
    leave(code)


def error_report(message: str, code: int) -> dict[str, Any]:
    """What --json reports of an error."""
    return {"error": {"code": code, "type": KINDS[code], "message": message}}


def tell(message: str) -> str:
    """Writes one line to stderr, and returns the message as written: without the middle of what is too long."""
    line = as_one_line(message)
    if len(line) > MOST_CHARACTERS:
        line = f"{line[: MOST_CHARACTERS // 2]} [...] {line[-MOST_CHARACTERS // 2 :]}"
    keep(line)
    with suppress(OSError):
        sys.stderr.write(f"l4ctx: {line}\n")
        sys.stderr.flush()
    return line


def leave(code: int) -> NoReturn:
    """Exits without the interpreter's own error message about a closed stdout."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError):  # there may be no descriptor left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def write(text: str, what: str = "the answer") -> None:
    """Writes to stdout and flushes; characters that its encoding lacks are escaped.

    Raises BrokenPipeError, and OutputError, whose message says that `what` cannot be written.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{what} cannot be written: {error.strerror}") from None


def check_stdout(what: str) -> None:
    """Raises UsageError if standard output is closed. `what` completes the message: "to", "the answer to"."""
    if sys.stdout is None:
        raise UsageError(f"standard output is closed: there is nowhere to write {what}")


def write_json(content: dict[str, Any]) -> None:
    """Writes an object as one line of ASCII: intact in every locale, and safe for a terminal."""
    write(json.dumps(content) + "\n")
