"""The `inspect` command."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, leave, write, write_json
from l4ctx.errors import UsageError


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|CONTEXT",
            help="Checkpoint (folder or GGUF file), or a saved context.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, not only headers and lengths.")] = False,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint or a saved context holds, and what is damaged in it. Changes nothing.

    l4ctx inspect CONTEXT --verify

    Ends with exit code 3 for a damaged checkpoint, and with 7 for a damaged context.
    """
    with errors_as_exit_codes(json=json) as interruption:
        interruption.kept = lambda: "nothing was changed"
        _inspect(path, verify=verify, json=json)


def _inspect(path: str | None, *, verify: bool, json: bool) -> NoReturn:
    if path is None:
        raise UsageError("nothing to inspect: l4ctx inspect MODEL|CONTEXT")
    check_stdout("to")
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import columns, stderr_console
    from l4ctx.cli.tables.inspection import listing
    from l4ctx.inspection.folder import exit_code, inspect_folder

    activity = Activity(stderr_console(), is_shown=verify)
    activity.tell("reading every byte")
    with activity:
        report = inspect_folder(path and str(options.meant_model(path)), verify=verify)
    if json:
        write_json(report)
    else:
        write(listing(report, columns(sys.stdout) if sys.stdout.isatty() else None))
    leave(exit_code(report))
