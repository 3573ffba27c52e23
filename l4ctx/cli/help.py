"""Formats --help: as wide as the terminal, never truncated, and written to stdout like an answer.

Works with click itself and with the copy of it that later versions of typer bundle.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

from l4ctx.cli.exits import errors_as_exit_codes, write
from l4ctx.cli.settings import KINDS, variable

MARGIN = 2
PIPED_WIDTH = 80 - MARGIN
WIDEST = 120
TWO_COLUMNS_FROM = 64
"""On narrower terminals, an option's description goes below it."""

_Context: Any = TyperGroup.context_class
_Formatter: Any = _Context.formatter_class


class HelpFormatter(_Formatter):  # type: ignore[misc]
    """click's formatter, with a layout for narrow terminals."""

    def __init__(self, **options: Any) -> None:
        columns = shutil.get_terminal_size((PIPED_WIDTH + MARGIN, 24)).columns
        super().__init__(**{**options, "width": max(20, min(columns, WIDEST) - MARGIN)})

    def write_text(self, text: str) -> None:
        """Writes paragraphs; on narrow terminals without breaking options at their hyphens."""
        from l4ctx.cli.wrapping import wrapped

        if self.width >= TWO_COLUMNS_FROM:
            super().write_text(text)
            return
        paragraphs = [wrapped(paragraph, self.width, self.current_indent) for paragraph in text.split("\n\n")]
        self.write("\n\n".join(map("\n".join, paragraphs)) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], *options: Any, **named: Any) -> None:
        """Writes rows of a name and its description."""
        from l4ctx.cli.wrapping import wrapped

        rows = [(re.sub(r"^([^-\s]\S*) <.*>$", r"\1", name), meaning) for name, meaning in rows]  # types of arguments
        if self.width >= TWO_COLUMNS_FROM:
            super().write_dl(rows, *options, **named)
            return
        for name, meaning in rows:
            choices = [part for word in name.split() for part in re.findall(r"[^|]*\||[^|]+", word)]
            fits = len(name) + self.current_indent <= self.width
            lines = [" " * self.current_indent + name] if fits else _joined(choices, self.width, self.current_indent)
            self.write("".join(f"{line}\n" for line in lines))
            for paragraph in meaning.split("\n\n"):
                lines = wrapped(paragraph, self.width, self.current_indent + 4)
                self.write("".join(f"{line}\n" for line in lines))


def _joined(parts: Sequence[str], width: int, indent: int) -> list[str]:
    """Lines of choices such as a|b|c, broken after a bar, or of words, broken at spaces."""
    lines = [""]
    for part in parts:
        start = " " * (indent if lines == [""] else indent + 2)
        joint = "" if lines[-1].endswith("|") or not lines[-1] else " "
        if lines[-1] and len(lines[-1]) + len(joint) + len(part) <= width:
            lines[-1] += joint + part
        else:
            lines = [*lines, start + part] if lines != [""] else [start + part]
    return lines


class HelpContext(_Context):  # type: ignore[misc]
    formatter_class = HelpFormatter


class _Help:
    """What commands and groups share."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence untruncated, since the formatter wraps it."""
        return super().get_short_help_str(2**31)  # type: ignore[misc]

    def get_help_option(self, ctx: Any) -> Any:
        """The option, with a callback that handles a closed or full standard output."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option


def _show_help(ctx: Any, parameter: Any, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        show(ctx.get_help(), "the help")
        ctx.exit()


def show(text: str, what: str) -> None:
    """Writes text other than an answer; ends the command if standard output is full or its reader is gone."""
    if sys.stdout is None:  # closed by the caller, who does not want it
        return
    with errors_as_exit_codes():
        write(f"{text}\n", what)


class Command(_Help, TyperCommand):
    """Its usual options can also be set in the environment."""

    context_class = HelpContext

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for parameter in self.params:
            option = next((name[2:] for name in parameter.opts if name[2:] in KINDS), None)
            if option is not None and parameter.envvar is None and isinstance(parameter, TyperOption):
                parameter.envvar, parameter.show_envvar = variable(option), False


class Group(_Help, TyperGroup):
    context_class = HelpContext
