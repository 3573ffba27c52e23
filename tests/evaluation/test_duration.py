"""How long a recall run is said to take, against sums of the model's closed forms."""

from __future__ import annotations

import pytest

from l4ctx.documents.document import DocumentSet
from l4ctx.evaluation.duration import Duration, duration
from l4ctx.evaluation.needle import NeedleOptions, Prepared, planned_inputs, prepare
from l4ctx.evaluation.recall import Work
from l4ctx.planning.speed import Speed
from l4ctx.planning.workload import Capacity
from l4ctx.run.monitor import Monitor
from l4ctx.run.request import AnswerOptions, ComputeOptions, Request, SourceOptions
from l4ctx.run.sizing import size
from model.costs import answering_operations, reading_operations
from support.places import TINY

LENGTHS, DEPTHS, NEW_TOKENS = (700, 3100), 3, 11


def taken(rate: float, trials: int = 1) -> tuple[Duration, Prepared]:
    answer = AnswerOptions(max_new_tokens=NEW_TOKENS, draft_tokens=0)
    request = Request(TINY, SourceOptions(paths=[], stdin=None), answer=answer, compute=ComputeOptions(dtype="float32"))
    options = NeedleOptions(LENGTHS, ("single", "counting"), DEPTHS, trials, NEW_TOKENS)
    with Monitor(lambda text: None) as monitor:
        prepared = prepare(request, options, DocumentSet(), monitor)
        work = Work(prepared, prepared.texts(set()))
        plan = size(planned_inputs(prepared, work.texts[-1]), monitor).plan
    return duration(prepared, work, plan, Speed(rate, rate), Capacity()), prepared


def test_every_text_question_and_answer_is_counted() -> None:
    (slow, prepared), (fast, _), (twice, _) = taken(1e6), taken(2e6), taken(1e6, trials=2)
    starts = [length - prepared.room for length in LENGTHS]
    assert slow.reading == pytest.approx(sum(reading_operations(prepared.config, 0, one).total for one in starts) / 1e6)
    assert fast.reading == pytest.approx(slow.reading / 2)
    asked = sum(
        reading_operations(prepared.config, start, start + prepared.question_tokens(case.needle.question)).total
        + NEW_TOKENS * answering_operations(prepared.config, case.length)
        for start, length in zip(starts, LENGTHS, strict=True)
        for case in prepared.cases
        if case.length == length
    )
    assert len(prepared.cases) == len(LENGTHS) * DEPTHS * 2
    assert 2 * (slow.answering - fast.answering) == pytest.approx(asked / 1e6)
    assert slow.answering > asked / 1e6, "steps beside products take time, too"
    assert twice.reading == pytest.approx(2 * slow.reading) and twice.answering == pytest.approx(
        2 * slow.answering, rel=0.02
    )
