"""A request carried out before the eyes of a person: what goes on, the answer as it comes, then the reports."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, error_report, fail, tell, write_json
from l4ctx.cli.stdin import warn_of_forgotten_pipe
from l4ctx.errors import CHECKPOINT, MODEL, UsageError
from l4ctx.formatting import counted

if TYPE_CHECKING:
    from l4ctx.machine.ranks import Launch
    from l4ctx.run.request import Request
    from l4ctx.run.session import Session


def check_context_ranks(context_ranks: int, launch: Launch | None) -> None:
    """Raises UsageError in a process that is alone."""
    if context_ranks > 1 and launch is None:
        raise UsageError("--context-ranks: torchrun starts the processes to divide the work over; see the manual")


def has_followed(launch: Launch | None) -> bool:
    """Computes what the first of several processes leads, if this is another one."""
    if launch is None or launch.speaks:
        return False
    from l4ctx.run.follower import follow

    follow(launch)
    return True


@dataclass(frozen=True)
class Display:
    """How a person wants to see a run."""

    json: bool = False
    quiet: bool = False
    memory_report: bool = False
    plain: bool = False  # Markdown as it is
    stats: bool = False
    log: bool = True  # keep answers, and which contexts and models were used


def carry_out(request: Request, interruption: Interruption, display: Display) -> None:
    """Carries the request out; prints the answer as it comes, then what there is to report."""
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.answer import show_answer
    from l4ctx.cli.citations import show_citations
    from l4ctx.cli.console import notes, stderr_console
    from l4ctx.cli.progress import read_shown, reading_summary, stats_line
    from l4ctx.cli.questions import show_answers, show_missing, without_answered
    from l4ctx.cli.tables.memory import memory_table, ranks_table
    from l4ctx.cli.tables.weights import weights_table
    from l4ctx.run.inputs import make_inputs, read_request
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.remembering import Memory
    from l4ctx.run.report import run_report
    from l4ctx.run.session import load
    from l4ctx.run.sizing import size

    console = stderr_console()
    note = notes(console, quiet=display.quiet)
    activity = Activity(console, is_shown=not display.quiet)
    memory = Memory(note, is_on=display.log)
    interruption.owners.setdefault(request.model, CHECKPOINT)  # which a context may have named
    if request.launch is not None:
        from l4ctx.run.ranks import check, dismiss

        check(request)
    with Monitor(note, activity.tell) as monitor:
        interruption.kept = lambda: monitor.kept()
        answers, cut = None, 0
        if request.questions is not None:
            request, answers = without_answered(request, monitor)
            if not show_missing(request, note, json=display.json):
                if request.launch is not None:
                    dismiss(request.launch)
                return
        with nullcontext() if "-" in request.sources.paths else activity:  # "-" may be typed in
            choices, sources = read_request(request, monitor)
        with activity:
            session = load(size(make_inputs(choices, sources, monitor), monitor), monitor)
            memory.saw(session)
            warn_of_forgotten_pipe(request, note)
            read_shown(session, activity)
            if (summary := reading_summary(session)) is not None:
                note(summary)
        if request.question is not None:
            show_answer(session, note, interruption, json=display.json, plain=display.plain)
            if session.answer.citations is not None and not display.json:
                show_citations(session.answer.citations)
            memory.answered(session, request.question, session.answer.as_dict())
            cut = int(request.answer.schema is not None and session.answer.stop_reason != "stop")
        elif request.questions is not None:
            cut = show_answers(session, answers, note, activity, interruption, memory)
        elif not display.json:
            folder = request.context.save_to
            note(
                f"{session.sized.inputs.prompt_tokens:,} tokens are kept in {folder}; ask with: l4ctx ask QUESTION "
                f"--context {shlex.quote(str(folder))}"
            )
        incomplete = _incomplete(session, cut) if cut else ""
        report = session.memory_report() if display.memory_report else None  # while other ranks are there
        if display.json:
            write_json(run_report(session) | (error_report(incomplete, MODEL) if incomplete else {}))
    if display.stats:
        tell(stats_line(session))
    if report is not None:
        console.print(memory_table(report), "", weights_table(report.weights_by_owner))
        if report.ranks:
            console.print("", ranks_table(report.ranks))
    if incomplete:
        fail(incomplete, MODEL, json=False)  # the report has it


def _incomplete(session: Session, cut: int) -> str:
    """What to say of answers that were cut before they were whole in their format."""
    remedy = "allow more with --max-new-tokens, or bound the schema (maxLength, maxItems)"
    if (options := session.request.questions) is None:
        tokens = session.answer.tokens
        return f"the answer ended after {tokens:,} tokens, before it was whole (--response-format); {remedy}"
    of = counted(len(options.questions), "answer")
    return f"{cut:,} of {of} ended before being whole (--response-format; see stop_reason); {remedy}"
