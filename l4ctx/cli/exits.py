"""How a command ends: every error that a user can cause is one line on stderr and an exit code.

Part of the command line, as is writing to stdout. Heavy modules are imported where they are needed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

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

EXIT_CODES = """\
Exit codes: 0 an answer, 1 the answer could not be written, 2 bad arguments or input, 3 the checkpoint cannot be
used, 4 the prompt is too long for the model, 5 it does not fit into memory or on the disk, 6 the model failed,
7 the saved context cannot be used, 130 interrupted, 141 the output was closed.
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
"""What --json calls an error of each code."""


@dataclass
class Interruption:
    """What to say when Ctrl-C comes: what is kept, as far as it is known by then."""

    kept: Callable[[], str] = lambda: "nothing is kept"
    when: Callable[[], str] = lambda: ""  # such as " after 3 tokens of the answer"


@contextmanager
def errors_as_exit_codes(*, json: bool = False) -> Iterator[Interruption]:
    """What a user can cause becomes one line on stderr and an exit code; anything else keeps its traceback.

    With `json` an object on stdout says the same.
    """
    interruption = Interruption()
    try:
        yield interruption
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback
        fail(f"interrupted{interruption.when()}; {interruption.kept()}", INTERRUPTED, json=json)
    except BrokenPipeError:
        leave(CLOSED)
    except Exception as error:  # to look at; what is not a user's doing goes on as it was
        code = exit_code_of(error)
        if code is None:
            raise
        fail(one_line(error), code, json=json)


def fail(message: str, code: int, *, json: bool) -> NoReturn:
    """Ends with one line on stderr, and with `json` an object on stdout."""
    line = tell(message)
    if json and sys.stdout is not None:
        with suppress(OSError, OutputError):  # closed or full: the exit code says it, too
            write_json({"error": {"code": code, "type": KINDS[code], "message": line}})
    leave(code)


def tell(message: str) -> str:
    """One line on stderr, which is returned as it was written."""
    from l4ctx.formatting import as_one_line

    line = as_one_line(message)
    with suppress(OSError):
        sys.stderr.write(f"l4ctx: {line}\n")
        sys.stderr.flush()
    return line


def leave(code: int) -> NoReturn:
    """Exits without the interpreter's own complaint about a closed stdout."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def write(text: str, what: str = "the answer") -> None:
    """To stdout at once; what the stream's encoding lacks is escaped. Raises BrokenPipeError, and OutputError which
    names `what` cannot be written."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{what} cannot be written: {error.strerror}") from None


def check_stdout(what: str) -> None:
    """Raises UsageError where standard output is closed. `what` ends the sentence: "to", "the answer to"."""
    if sys.stdout is None:
        raise UsageError(f"standard output is closed: there is nowhere to write {what}")


def write_json(content: dict[str, Any]) -> None:
    """One object on a line, in ASCII: whole in every locale, harmless on a terminal."""
    import json

    write(json.dumps(content) + "\n")
