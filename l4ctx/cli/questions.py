"""Shows the answers to many questions: a line of JSON for each, as it is ready, and how far the run is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, write_json
from l4ctx.cli.wrapping import cells
from l4ctx.formatting import counted, human_seconds, printable
from l4ctx.run.answers_file import AnswersFile

if TYPE_CHECKING:
    from l4ctx.cli.activity import Activity
    from l4ctx.run.answering import Progress, Ready
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.questions import QuestionsOptions
    from l4ctx.run.remembering import Memory
    from l4ctx.run.request import Request
    from l4ctx.run.session import Session

LEAST_SHARE = 0.02
"""Of the questions, before the time that the others take is told."""


def without_answered(request: Request, monitor: Monitor) -> tuple[Request, AnswersFile | None]:
    """The request without the questions that --resume-answers holds answers to, and that file, open until the run ends.

    Raises AnswersFileError.
    """
    options = request.questions
    assert options is not None
    if options.answers is None:
        return request, None
    file = AnswersFile(options.answers, options.questions)
    monitor.resources.callback(file.close)
    missing = [question for question in options.questions if question.id not in file.answered]
    taken = len(options.questions) - len(missing)
    return replace(request, questions=replace(options, questions=missing, taken=taken)), file


def show_missing(request: Request, note: Callable[[str], None], *, json: bool) -> bool:
    """Says what --resume-answers holds already; whether there is anything left to ask."""
    options = request.questions
    assert options is not None
    if options.taken:
        note(f"{_counted_answers(options)} are in {printable(str(options.answers))} already")
    if not options.questions and json:
        write_json({"answers": 0, "taken_answers": options.taken})
    return bool(options.questions)


def show_answers(
    session: Session,
    file: AnswersFile | None,
    note: Callable[[str], None],
    activity: Activity,
    interruption: Interruption,
    memory: Memory,
) -> int:
    """Answers all questions; each answer goes to `file` first, then to the log and to standard output.

    Returns how many were cut before they were whole in their format; these are not kept in `file`, so that they are
    asked again. Raises OutputError and what `answers` raises.
    """
    from l4ctx.run.answering import answers

    options = session.request.questions
    assert options is not None
    view = Answering(len(options.questions))
    interruption.when = lambda: f" after {view.done:,} of {counted(view.of, 'answer')}"
    kept = "they are printed"
    if file is not None:
        kept = f"{printable(str(options.answers))} holds them, and the same command asks the others"
    interruption.kept = lambda: kept
    activity.show(view)
    ordered, cut, has_format = _Ordered(options.in_order), 0, session.request.answer.schema is not None
    is_shared = sys.stdout is not None and sys.stdout.isatty()  # answers on a terminal would run into the live line
    with nullcontext() if is_shared else activity:
        for progress in answers(session):
            view.observe(progress)
            for ready in progress.ready:
                is_cut = has_format and ready.content["stop_reason"] != "stop"
                cut += is_cut
                if file is not None and not is_cut:
                    file.append(ready.content)
                memory.answered(session, ready.content["question"], ready.content)
            for ready in ordered.next(progress.ready):
                write_json(ready.content)
            activity.beat()
    note(view.summary())
    return cut


def _counted_answers(options: QuestionsOptions) -> str:
    return f"{options.taken:,} of {counted(options.taken + len(options.questions), 'answer')}"


class _Ordered:
    """Answers as they come, or in the order of their questions: then those that came early are held."""

    def __init__(self, in_order: bool) -> None:
        self._in_order = in_order
        self._next, self._held = 0, dict[int, "Ready"]()

    def next(self, ready: list[Ready]) -> Iterator[Ready]:
        if not self._in_order:
            yield from ready
            return
        self._held.update((one.number, one) for one in ready)
        while self._next in self._held:
            yield self._held.pop(self._next)
            self._next += 1


class Answering:
    """How many questions are answered: a view of `l4ctx.cli.activity`."""

    share = None

    def __init__(self, of: int) -> None:
        self.of, self.done = of, 0
        self._tokens, self._seconds = 0, 0.0

    def observe(self, progress: Progress) -> None:
        self.done += len(progress.ready)
        self._tokens, self._seconds = progress.tokens, progress.seconds

    def line(self, width: int | None, now: float) -> str:
        parts = [f"answered {self.done:,} of {counted(self.of, 'question')}"]
        if self.done >= max(1, LEAST_SHARE * self.of):
            parts.append(f"{human_seconds(self._seconds / self.done * (self.of - self.done))} left")
        if self._seconds:
            parts.append(self._rate())
        while width is not None and len(parts) > 1 and cells(", ".join(parts)) > width:
            parts.pop()
        return ", ".join(parts)

    def summary(self) -> str:
        rate = f" ({self._rate()})" if self._seconds else ""
        return f"{counted(self.done, 'answer')} in {human_seconds(self._seconds)}{rate}"

    def _rate(self) -> str:
        return f"{self._tokens / self._seconds:,.1f} tokens/s"
