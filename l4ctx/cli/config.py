"""The `config` command: where usual options are set, what they are, and where each comes from."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, write, write_json
from l4ctx.cli.settings import KINDS, defaults_of, read_settings, variable
from l4ctx.formatting import printable
from l4ctx.machine.places import config_file


def config(
    context: typer.Context,
    what: Annotated[
        Literal["show", "path"],
        typer.Argument(metavar="show|path", help="The options that can be set, or the file's name alone."),
    ] = "show",
    json: options.Json = False,
) -> None:
    """Show which options are set by default, and where each comes from.

    The file is TOML: one line for each option, such as kv-dtype = "int8", and a table [models] with short names for
    --model. An option on the command line comes first, then the environment (L4CTX_KV_DTYPE), then the file.
    """
    with errors_as_exit_codes(json=json):
        check_stdout("to")
        if what == "path":
            write_json({"file": str(config_file())}) if json else write(f"{printable(str(config_file()))}\n")
            return
        settings = read_settings()
        shown = _values(context)
        if json:
            write_json({"file": str(settings.file), "options": shown, "models": dict(settings.models)})
            return
        lines = [f"# {printable(str(settings.file))}{'' if settings.file.exists() else ' (not there)'}"]
        width = max(map(len, shown))
        for option, entry in shown.items():
            value = "" if entry["value"] is None else printable(str(entry["value"]))
            lines.append(f"{option:{width}}  {entry['source']:11}  {value}".rstrip())
        lines += [f"models.{printable(name)} = {printable(place)}" for name, place in settings.models.items()]
        write("".join(f"{line}\n" for line in lines))


def _values(context: typer.Context) -> dict[str, dict[str, Any]]:
    """Of each option: its value without one on the command line, and whether that comes from the environment, the file
    or nowhere. Raises UsageError for values that are refused.
    """
    settings = read_settings()
    group: Any = context.find_root().command
    defaults_of(settings, group.commands, context)
    found: dict[str, dict[str, Any]] = {}
    for option in KINDS:
        if given := os.environ.get(variable(option)):
            found[option] = {"value": given, "source": "environment"}
        elif option in settings.options:
            found[option] = {"value": settings.options[option], "source": "file"}
        else:
            found[option] = {"value": _default(group, option), "source": "default"}
    return found


def _default(group: Any, option: str) -> Any:
    """What the commands have without any setting."""
    parameters = (parameter for command in group.commands.values() for parameter in command.params)
    return next((parameter.default for parameter in parameters if f"--{option}" in parameter.opts), None)
