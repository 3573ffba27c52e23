"""The command line's entry point, which registers the commands; each has its own module.

Answers go to stdout, everything else to stderr. Heavy modules are imported where they are needed, so that help and
argument errors are fast.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from l4ctx.cli.ask import ask
from l4ctx.cli.bench import bench
from l4ctx.cli.chat import chat
from l4ctx.cli.completion import keep_descriptions
from l4ctx.cli.config import config
from l4ctx.cli.exits import EXIT_CODES, errors_as_exit_codes, fail, leave, tell
from l4ctx.cli.help import Command, Group, show
from l4ctx.cli.inspect import inspect
from l4ctx.cli.list import list as list_seen
from l4ctx.cli.log import log
from l4ctx.cli.log_file import with_log_file
from l4ctx.cli.needle import needle
from l4ctx.cli.plan import plan
from l4ctx.cli.prefill import prefill
from l4ctx.cli.quantize import quantize
from l4ctx.cli.rm import rm
from l4ctx.cli.score import score
from l4ctx.cli.settings import OF_THIS_MACHINE, defaults_of, read_settings
from l4ctx.cli.tokens import tokens
from l4ctx.cli.usage import USAGE_ERROR, refuse_arguments, wants_json
from l4ctx.errors import INPUT, INTERRUPTED, MODEL
from l4ctx.machine.processor import share_cores
from l4ctx.machine.ranks import Launch

app = typer.Typer(
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Entry point of the `l4ctx` command."""
    share_cores()
    if (launch := Launch.of(os.environ)) is not None:
        launch.prepare()
        if launch.speaks:
            signal.signal(signal.SIGTERM, _end_with_the_others)
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process exits)
    keep_descriptions()
    with errors_as_exit_codes(json=wants_json(sys.argv)):
        try:
            code = app(prog_name="l4ctx", standalone_mode=False)
        except KeyboardInterrupt:  # before a command began
            leave(INTERRUPTED)
        except USAGE_ERROR as error:
            refuse_arguments(error)
    sys.exit(code or 0)


def _end_with_the_others(*_: object) -> NoReturn:
    """torchrun ends all ranks when one of them ends. Once they compute, `l4ctx.run.ranks` says why."""
    tell("another rank has ended, or torchrun was: so all ranks end")
    os._exit(MODEL)


@app.callback(cls=Group, epilog=EXIT_CODES)
def l4ctx(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=lambda wanted: _show_version(wanted), is_eager=True
        ),
    ] = False,
) -> None:
    """Ask questions over documents of millions of tokens with Llama 4."""
    _set_defaults(context)
    if context.invoked_subcommand not in ("ask", "prefill") and (launch := Launch.of(os.environ)) is not None:
        if not launch.speaks:
            leave(0)
        fail(f"{context.invoked_subcommand}: several ranks only ask and prefill; leave torchrun out", INPUT, json=False)


def _set_defaults(context: typer.Context) -> None:
    """Takes defaults from the file of settings, unless the command is one that speaks of it, or help is wanted."""
    if context.invoked_subcommand in (None, "config") or {"--help", "-h"} & set(sys.argv):
        return
    settings = read_settings()
    commands: Any = context.command
    defaults = defaults_of(settings, commands.commands, context)
    if "--gpu-memory" in sys.argv:
        for option in OF_THIS_MACHINE:
            defaults["plan"].pop(option.replace("-", "_"), None)
    context.default_map = defaults


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show(f"l4ctx {version('l4ctx')}", "the version")
        raise typer.Exit()


for command in (ask, chat, prefill, inspect, plan, tokens, bench, quantize, score, needle, list_seen, rm, log, config):
    app.command(cls=Command, epilog=EXIT_CODES)(with_log_file(command))
