"""Runs what `needle` has prepared, and sums its results by task, length and depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from l4ctx.evaluation.intervals import wilson
from l4ctx.evaluation.needle import NeedleOptions, Prepared, Result, Text, Texts
from model.costs import Operations, reading_operations

if TYPE_CHECKING:
    from l4ctx.engine.prefill import PrefillProgress
    from l4ctx.run.session import Session


@dataclass(frozen=True)
class Progress:
    """When a text is made, after each step of its prefill, and after answers.

    Positions of a step are on a line on which texts follow one another.
    """

    text: int  # its number, from 0
    step: PrefillProgress | None
    results: Sequence[Result] = ()
    seconds: float = 0.0  # of all questions about this text so far


class Work:
    """What there is to read: texts one behind another."""

    def __init__(self, prepared: Prepared, texts: Sequence[Text]) -> None:
        self.texts, self._config = texts, prepared.config
        self.starts, self.stop = list[int](), 0
        for text in texts:
            self.starts.append(self.stop)
            self.stop += text.length - prepared.room
        self.questions = sum(len(text.cases) for text in texts)

    def operations(self, start: int, stop: int) -> Operations:
        """Of reading the positions start .. stop - 1 of that line."""
        total = Operations(0, 0, 0)
        for first, end in zip(self.starts, [*self.starts[1:], self.stop], strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                part = reading_operations(self._config, low - first, high - first)
                total = Operations(
                    total.linear + part.linear,
                    total.chunked_attention + part.chunked_attention,
                    total.full_attention + part.full_attention,
                )
        return total


def run(prepared: Prepared, work: Work, session: Session) -> Iterator[Progress]:
    """Reads each text and asks about it. `session` was planned for the longest.

    Raises HaystackError, and what `Session.prefill` and `answers` raise.
    """
    from l4ctx.run.answering import answers

    made = Texts(prepared)
    for number, text in enumerate(work.texts):
        session.monitor.tell("making the text")
        inputs, cuts = made.inputs(text)
        session = session.anew(inputs)
        yield Progress(number, None)
        start = work.starts[number]
        for step in session.prefill():
            yield Progress(number, replace(step, step=range(start + step.step.start, start + step.step.stop)))
        for progress in answers(session):
            found = [
                Result.of(case, ready.content, cut=cuts[case.id])
                for ready in progress.ready
                for case in (text.cases[ready.number],)
            ]
            yield Progress(number, None, found, progress.seconds)


@dataclass(frozen=True)
class Cell:
    """How many questions of a kind were asked, and answered right."""

    right: int
    asked: int

    @classmethod
    def of(cls, results: Sequence[Result]) -> Cell:
        return cls(sum(result.right for result in results), len(results))

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.asked)

    def as_dict(self) -> dict[str, Any]:
        return {"right": self.right, "asked": self.asked, "recall": self.share, "interval": list(self.interval)}


@dataclass(frozen=True)
class Recall:
    """All results, as a map."""

    options: NeedleOptions
    results: Sequence[Result]

    def cell(self, task: str | None = None, length: int | None = None, depth: int | None = None) -> Cell:
        """Of those that have what is given."""
        wanted = {"task": task, "length": length, "depth": depth}
        return Cell.of(
            [
                result
                for result in self.results
                if all(value is None or getattr(result, name) == value for name, value in wanted.items())
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json. A depth is a share of the text, from its beginning."""
        options = self.options
        return {
            "lengths": list(options.lengths),
            "depths": options.depths,
            "trials": options.trials,
            "seed": options.seed,
            "all": self.cell().as_dict(),
            "tasks": [{"task": task, **self.cell(task).as_dict()} for task in options.tasks],
            "by_length": [
                {"task": task, "length": length, **self.cell(task, length).as_dict()}
                for task in options.tasks
                for length in options.lengths
            ],
            "cells": [
                {
                    "task": task,
                    "length": length,
                    "depth": [depth / options.depths, (depth + 1) / options.depths],
                    **self.cell(task, length, depth).as_dict(),
                }
                for task in options.tasks
                for length in options.lengths
                for depth in range(options.depths)
            ],
            "cut": self.cut().as_dict(),
            "answers": [asdict(result) for result in self.results],
        }

    def cut(self) -> Cell:
        """Of facts that a boundary of attention chunks cuts: no RoPE layer sees both parts."""
        return Cell.of([result for result in self.results if result.cut])
