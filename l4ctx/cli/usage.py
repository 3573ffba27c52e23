"""Reports the argument parser's errors in the style of all other errors: one line, exit code 2."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from l4ctx.cli.exits import fail, leave
from l4ctx.errors import INPUT

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""UsageError from click, or from the copy of click that later versions of typer bundle."""


def refuse_arguments(error: Exception) -> NoReturn:
    """Ends the command with one line, or with its help if there were no arguments at all."""
    if type(error).__name__ == "NoArgsIsHelpError":
        with suppress(OSError):  # stderr may be full
            error.show()  # type: ignore[attr-defined]
        leave(INPUT)
    message = plain_message(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "l4ctx"
    if not message[:2].isupper():  # the name of an argument
        message = f"{message[:1].lower()}{message[1:]}"
    fail(f"{message} ({command} --help lists what there is)", INPUT, json=wants_json(sys.argv))


def plain_message(text: str) -> str:
    """What the parser of arguments says, in the style of all other errors."""
    message = re.sub(
        r"^Invalid value for '([^']*)'(?: / '[^']*')*(?: \(env var: '[^']*'\))?: ",
        r"\1: ",
        text,
    )
    message = re.sub(r" \(Possible options?: (.*)\)$", r"; did you mean \1?", " ".join(message.split()))
    message = re.sub(r"^(--?[\w-]+: )Input ", r"\1it ", message).removesuffix(".")  # as pydantic says it
    message = message.replace(": Value error, ", ": ", 1)
    return re.sub(r"(?<= is not one of ).*", lambda choices: choices.group().replace("'", ""), message)


def wants_json(arguments: list[str]) -> bool:
    """Whether --json is among arguments that could not be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options
