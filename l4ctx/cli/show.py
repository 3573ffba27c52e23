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
    from collections.abc import Callable

    from rich.console import Console

    from l4ctx.cli.activity import Activity
    from l4ctx.machine.ranks import Launch
    from l4ctx.run.answers_file import AnswersFile
    from l4ctx.run.memory_report import MemoryReport
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.remembering import Memory
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
    from l4ctx.cli.questions import show_missing, without_answered
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.report import run_report

    screen = _Screen.of(interruption, display)
    interruption.owners.setdefault(request.model, CHECKPOINT)  # which a context may have named
    if request.launch is not None:
        from l4ctx.run.ranks import check, dismiss

        check(request)
    with Monitor(screen.note, screen.activity.tell) as monitor:
        interruption.kept = lambda: monitor.kept()
        answers = None
        if request.questions is not None:
            request, answers = without_answered(request, monitor)
            if not show_missing(request, screen.note, json=display.json):
                if request.launch is not None:
                    dismiss(request.launch)
                return
        session = _read(request, monitor, screen)
        cut = _show(session, answers, screen)
        incomplete = _incomplete(session, cut) if cut else ""
        report = session.memory_report() if display.memory_report else None  # while other ranks are there
        if display.json:
            write_json(run_report(session) | (error_report(incomplete, MODEL) if incomplete else {}))
    _show_reports(session, report, screen)
    if incomplete:
        fail(incomplete, MODEL, json=False)  # the report has it


@dataclass(frozen=True)
class _Screen:
    """Where a run is shown, and how."""

    console: Console
    note: Callable[[str], None]
    activity: Activity
    memory: Memory
    interruption: Interruption
    display: Display

    @classmethod
    def of(cls, interruption: Interruption, display: Display) -> _Screen:
        from l4ctx.cli.activity import Activity
        from l4ctx.cli.console import notes, stderr_console
        from l4ctx.run.remembering import Memory

        console = stderr_console()
        note = notes(console, quiet=display.quiet)
        activity, memory = Activity(console, is_shown=not display.quiet), Memory(note, is_on=display.log)
        return cls(console, note, activity, memory, interruption, display)


def _read(request: Request, monitor: Monitor, screen: _Screen) -> Session:
    """Reads documents, loads the model, and reads the prompt up to the question."""
    from l4ctx.cli.progress import read_shown, reading_summary
    from l4ctx.run.inputs import make_inputs, read_request
    from l4ctx.run.session import load
    from l4ctx.run.sizing import size

    with nullcontext() if "-" in request.sources.paths else screen.activity:  # "-" may be typed in
        choices, sources = read_request(request, monitor)
    with screen.activity:
        session = load(size(make_inputs(choices, sources, monitor), monitor), monitor)
        screen.memory.saw(session)
        warn_of_forgotten_pipe(request, screen.note)
        read_shown(session, screen.activity)
        if (summary := reading_summary(session)) is not None:
            screen.note(summary)
    return session


def _show(session: Session, answers: AnswersFile | None, screen: _Screen) -> int:
    """Answers, or tells where the state is kept; how many answers were cut before they were whole in their format."""
    from l4ctx.cli.answer import show_answer
    from l4ctx.cli.citations import show_citations
    from l4ctx.cli.questions import show_answers

    request, display = session.request, screen.display
    if request.question is not None:
        show_answer(session, screen.note, screen.interruption, json=display.json, plain=display.plain)
        if session.answer.citations is not None and not display.json:
            show_citations(session.answer.citations)
        screen.memory.answered(session, request.question, session.answer.as_dict())
        return int(request.answer.schema is not None and session.answer.stop_reason != "stop")
    if request.questions is not None:
        return show_answers(session, answers, screen.note, screen.activity, screen.interruption, screen.memory)
    if not display.json:
        folder = request.context.save_to
        screen.note(
            f"{session.sized.inputs.prompt_tokens:,} tokens are kept in {folder}; ask with: l4ctx ask QUESTION "
            f"--context {shlex.quote(str(folder))}"
        )
    return 0


def _show_reports(session: Session, report: MemoryReport | None, screen: _Screen) -> None:
    from l4ctx.cli.progress import stats_line
    from l4ctx.cli.tables.memory import memory_table, ranks_table
    from l4ctx.cli.tables.weights import weights_table

    if screen.display.stats:
        tell(stats_line(session))
    if report is not None:
        screen.console.print(memory_table(report), "", weights_table(report.weights_by_owner))
        if report.ranks:
            screen.console.print("", ranks_table(report.ranks))


def _incomplete(session: Session, cut: int) -> str:
    """What to say of answers that were cut before they were whole in their format."""
    remedy = "allow more with --max-new-tokens, or bound the schema (maxLength, maxItems)"
    if (options := session.request.questions) is None:
        tokens = session.answer.tokens
        return f"the answer ended after {tokens:,} tokens, before it was whole (--response-format); {remedy}"
    of = counted(len(options.questions), "answer")
    return f"{cut:,} of {of} ended before being whole (--response-format; see stop_reason); {remedy}"
