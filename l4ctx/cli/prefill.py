"""The `prefill` command as a person types it, and what is refused at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.compute_options import MemoryFlags
from l4ctx.cli.dry_run import DryRunFlags, show_prompt
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes
from l4ctx.cli.show import Display, carry_out, check_context_ranks, has_followed
from l4ctx.cli.sources import SourceFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, paths_or_pipe
from l4ctx.errors import UsageError
from l4ctx.machine.ranks import Launch

if TYPE_CHECKING:
    from l4ctx.run.request import Request


@spread
def prefill(
    paths: options.Paths = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.context_folder,
            metavar="CONTEXT",
            help="Folder to keep what is read in; created, or resumed. Only you can read it.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    *,
    read: SourceFlags,
    system: options.System = None,
    replace: options.Replace = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check every byte that CONTEXT holds, and read again from the first damage on."),
    ] = False,
    held: MemoryFlags,
    device: options.Device = "auto",
    attention: options.Attention = None,
    prefill_chunk_size: options.PrefillChunkSize = None,
    context_ranks: options.ContextRanks = 1,
    dry: DryRunFlags,
    log: options.Log = True,
    memory_report: options.MemoryReport = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read documents once and keep what was read, to ask about it many times.

    l4ctx prefill docs/ report.md -o CONTEXT --model DIR

    After an interruption the same command resumes. After documents changed, it reads from the first change on.
    """

    launch = Launch.of(os.environ)

    def request() -> Request:
        from l4ctx.run.request import ContextOptions, Request

        if json or dry.dry_run:
            check_stdout("to")
        dry.check(launch)
        check_context_ranks(context_ranks, launch)
        if output is None and not dry.dry_run:
            raise UsageError("no context: name a folder to keep what is read in, with -o CONTEXT")
        documents, stdin = paths_or_pipe(read.named(paths or []), quiet=quiet)
        if not documents:
            raise UsageError("no documents: l4ctx prefill PATH... -o CONTEXT, or pipe a text in")
        return Request(
            checkpoint_folder(model, output, may_be_new=True),
            read.options(documents, stdin),
            system=system,
            context=ContextOptions(save_to=output, replace=replace, verify=verify),
            compute=held.compute(device, prefill_chunk_size, attention, context_ranks),
            kv=held.kv(),
            launch=launch,
        )

    with errors_as_exit_codes(json=json, checkpoint=model, context=output) as interruption:
        if dry.dry_run:
            show_prompt(request(), interruption, dry, json=json, quiet=quiet)
        elif not has_followed(launch):
            carry_out(request(), interruption, Display(json, quiet, memory_report, log=log))
