"""A request carried out before the eyes of a person: what goes on, the answer as it comes, then the reports."""

from __future__ import annotations

import shlex
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, write_json
from l4ctx.cli.stdin import (
    warn_of_forgotten_pipe,
)

if TYPE_CHECKING:
    from l4ctx.run.request import Request


def carry_out(request: Request, interruption: Interruption, *, json: bool, quiet: bool, memory_report: bool) -> None:
    """Carries the request out; prints the answer as it comes, then what there is to report."""
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.answer import show_answer
    from l4ctx.cli.console import notes, stderr_console
    from l4ctx.cli.progress import read_shown, reading_summary
    from l4ctx.cli.tables.memory import memory_table
    from l4ctx.run.report import run_report
    from l4ctx.run.session import Run

    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    run = Run(request, note, activity.tell)
    interruption.kept = run.kept
    with run.sampling_memory(), closing(run):
        with nullcontext() if "-" in request.paths else activity:  # "-" may be typed in
            run.read_documents()
        with activity:
            run.make_prompt()
            run.plan_memory()
            run.load_model()
            warn_of_forgotten_pipe(request, note)
            read_shown(run, activity)
            if (summary := reading_summary(run)) is not None:
                note(summary)
        if request.question is not None:
            show_answer(run, note, interruption, json=json)
        elif not json:
            note(
                f"{run.prompt_tokens:,} tokens are kept in {request.save_context}; ask with: l4ctx ask QUESTION "
                f"--context {shlex.quote(str(request.save_context))}"
            )
        if json:
            write_json(run_report(run))
    if memory_report:
        console.print(memory_table(run.memory_report()))
