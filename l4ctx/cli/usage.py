"""What the parser of arguments refuses, in the style of every other error: one line, exit code 2."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from l4ctx.cli.exits import fail, leave
from l4ctx.errors import INPUT

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""click's UsageError, be it click's own or that of the copy which later versions of typer bring along."""


def refuse_arguments(error: Exception) -> NoReturn:
    """Ends the command; where no arguments were given at all, its help is the answer."""
    if type(error).__name__ == "NoArgsIsHelpError":
        with suppress(OSError):  # of a stderr that is full
            error.show()  # type: ignore[attr-defined]
        leave(INPUT)
    message = re.sub(r"^Invalid value for '([^']*)'(?: / '[^']*')*: ", r"\1: ", error.format_message())  # type: ignore[attr-defined]
    message = re.sub(r" \(Possible options?: (.*)\)$", r"; did you mean \1?", " ".join(message.split()))
    message = re.sub(r"^(--?[\w-]+: )Input ", r"\1it ", message).removesuffix(".")  # as pydantic says it
    message = message.replace(": Value error, ", ": ", 1)
    message = re.sub(r"(?<= is not one of ).*", lambda choices: choices.group().replace("'", ""), message)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "l4ctx"
    fail(f"{message[:1].lower()}{message[1:]} ({command} --help lists what there is)", INPUT, json=wants_json(sys.argv))


def wants_json(arguments: list[str]) -> bool:
    """Whether --json is among the arguments of a line that cannot be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options
