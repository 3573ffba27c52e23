"""A recall map before the eyes of a person: what is planned, how far it is, the map, and its pictures."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.cli.exits import Interruption, write, write_json
from l4ctx.formatting import counted, human_clock, human_seconds, printable

if TYPE_CHECKING:
    from l4ctx.cli.activity import Activity
    from l4ctx.documents.document import DocumentSet
    from l4ctx.evaluation.needle import NeedleOptions, Prepared, Result
    from l4ctx.evaluation.recall import Progress, Work
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.run.answers_file import AnswersFile
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.request import Request


def find(
    request: Request,
    options: NeedleOptions,
    resume: Path | None,
    pictures: list[Path],
    interruption: Interruption,
    *,
    json: bool,
    quiet: bool,
) -> None:
    """Measures what is asked for and not in the file `resume` yet, and shows all of it."""
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import PIPED_COLUMNS, columns, notes, rendered, stderr_console
    from l4ctx.cli.tables.recall import recall_text
    from l4ctx.evaluation.heat_map import heat_map
    from l4ctx.evaluation.needle import Result, check_options, prepare, questions_of
    from l4ctx.evaluation.picture import save
    from l4ctx.evaluation.recall import Recall
    from l4ctx.run.answers_file import AnswersFile
    from l4ctx.run.monitor import Monitor

    check_options(options)
    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    results: list[Result] = []
    interruption.when = lambda: f" after {counted(len(results), 'answer')}" if results else ""
    interruption.kept = lambda: "nothing is kept (--resume FILE keeps answers)"
    with Monitor(note, activity.tell) as monitor:
        with nullcontext() if "-" in request.sources.paths else activity:  # "-" may be typed in
            found = _documents(request, monitor)
        with activity:
            prepared = prepare(request, options, found, monitor)
        file = None
        if resume is not None:
            cases = {case.id: case for case in prepared.cases}
            file = AnswersFile(
                resume,
                questions_of(prepared.cases),
                option="--resume",
                taken=lambda content: results.append(Result.held(cases[content["id"]], content)),
            )
            monitor.resources.callback(file.close)
            interruption.kept = lambda: (
                f"{printable(str(resume))} holds what was answered, and the same command asks the rest"
            )
            if results:
                told = f"{len(results):,} of {counted(len(cases), 'answer')}"
                note(f"{told} are in {printable(str(resume))} already")
        if len(results) < len(prepared.cases):
            _measure(prepared, results, file, monitor, activity)
    recall = Recall(options, sorted(results, key=lambda result: (result.length, result.trial, result.task)))
    for picture in pictures:
        save(heat_map(recall, request.model.resolve().name), picture)
    if json:
        skipped = [{"path": entry.source, "reason": entry.reason} for entry in prepared.skipped]
        write_json({"model": str(request.model), **recall.as_dict(), "skipped": skipped})
    else:
        write(rendered(recall_text(recall, columns(sys.stdout) if sys.stdout.isatty() else PIPED_COLUMNS)))
    for picture in pictures:
        note(f"the picture is in {printable(str(picture))}")


def _documents(request: Request, monitor: Monitor) -> DocumentSet:
    from l4ctx.documents.document import DocumentSet
    from l4ctx.run.inputs import read_sources, tell_skipped
    from model.config import TextConfig

    if not request.sources.paths:
        return DocumentSet()
    monitor.tell("reading files")
    request.kv.check_folder()
    config = TextConfig.from_folder(request.model)
    found = read_sources(request.model, config, request.sources, is_limited=False).documents
    found.require_any(request.sources.paths)
    tell_skipped(found, monitor.note)
    return found


def _measure(
    prepared: Prepared, results: list[Result], file: AnswersFile | None, monitor: Monitor, activity: Activity
) -> None:
    """Adds to `results`, and to the file, what they lack."""
    from dataclasses import asdict

    from l4ctx.evaluation.needle import Texts, planned_inputs
    from l4ctx.evaluation.recall import Work, run
    from l4ctx.run.session import load
    from l4ctx.run.sizing import size

    work = Work(prepared, prepared.texts({result.id for result in results}))
    with activity:
        Texts(prepared).check(work.texts[0])
        sized = size(planned_inputs(prepared, work.texts[-1]), monitor)
        told = (
            f"{counted(len(work.texts), 'text')}, {work.stop:,} tokens to read, {counted(work.questions, 'question')}"
        )
        if not sized.plan.residency.on_accelerator:
            monitor.tell("measuring the speed")
            told += f"; {_time(prepared, work, sized.plan)}"
        monitor.note(told)
        session = load(sized, monitor)
        view = Finding(work)
        activity.show(view)
        for progress in run(prepared, work, session):
            view.observe(progress)
            activity.show(view)
            for result in progress.results:
                if file is not None:
                    file.append(asdict(result))
                results.append(result)
            activity.beat()
    monitor.note(view.summary())


def _time(prepared: Prepared, work: Work, plan: MemoryPlan) -> str:
    """What it will take on this CPU, after a moment of measuring."""
    from l4ctx.evaluation.duration import duration
    from l4ctx.formatting import human_time
    from l4ctx.planning.speed import measured_speed
    from l4ctx.planning.workload import Capacity
    from l4ctx.run.measuring import feed_forward_weight

    weight, step = feed_forward_weight(prepared.request.model, plan), min(plan.prefill_chunk_size, work.stop)
    speed = measured_speed(prepared.config, plan.workload.dtype, "cpu", step, weight)
    taken = duration(prepared, work, plan, speed, Capacity(host=0))
    return (
        f"reading takes about {human_time(taken.reading)} and answering up to {human_time(taken.answering)}, by the "
        "speed measured just now"
    )


class Finding:
    """How many texts are read and questions answered: a view of `l4ctx.cli.activity`."""

    def __init__(self, work: Work) -> None:
        from l4ctx.planning.cost_model import CostModel

        self._work, self._cost = work, CostModel(work.operations, 0, work.stop)
        self._began = time.monotonic()
        self._read = self._text = self._answered = 0
        self._reading = self._asking = self._asking_before = 0.0  # seconds
        self._found = 0

    @property
    def share(self) -> float:
        return self._read / self._work.stop

    def observe(self, progress: Progress) -> None:
        if progress.text != self._text:
            self._text, self._asking_before = progress.text, self._asking
        if (step := progress.step) is not None:
            self._cost.observe(step.step.start, step.step.stop, step.step_seconds)
            self._read = step.step.stop
            self._reading += step.step_seconds
        else:
            self._asking = self._asking_before + progress.seconds
        self._answered += len(progress.results)
        self._found += sum(result.right for result in progress.results)

    def line(self, width: int | None, now: float) -> str:
        """As much as fits, what matters most first. Questions are taken to need the same share of time as so far."""
        from l4ctx.cli.wrapping import cells

        if self._read:
            left = self._cost.seconds_left if self._read < self._work.stop else 0.0
            if self._answered:
                left *= 1 + self._asking / max(self._reading, 1e-9)
            told = f"{human_seconds(left)} left"
        else:
            told = f"{human_clock(now - self._began)} so far"
        parts = [
            f"text {self._text + 1} of {len(self._work.texts)}",
            told,
            f"{self._read:,} of {self._work.stop:,} tokens",
            f"{self._found} of {self._answered} found",
        ]
        while width is not None and len(parts) > 1 and cells(", ".join(parts)) > width:
            parts.pop()
        return ", ".join(parts)

    def summary(self) -> str:
        rate = f" ({self._read / self._reading:,.0f} tokens/s)" if self._reading else ""
        return (
            f"read {counted(self._read, 'token')} in {human_seconds(self._reading)}{rate}, answered "
            f"{counted(self._answered, 'question')} in {human_seconds(self._asking)}"
        )
