"""The answers to many questions, several at a time, as they are ready."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from l4ctx.run.asking import Asking
from l4ctx.run.context import with_repair_hint
from l4ctx.run.monitor import Timing
from l4ctx.run.questions import Question
from l4ctx.run.session import Session

if TYPE_CHECKING:
    from cache.context import Continuation
    from l4ctx.engine.questions import Answered, Asked
    from l4ctx.engine.row import Row
    from l4ctx.prompt.attended import AttentionLog
    from l4ctx.prompt.citations import Citing
    from l4ctx.run.drafting import DraftSource


class Ready(NamedTuple):
    """An answer, as the object that is printed for it."""

    number: int  # of its question, from 0
    content: dict[str, Any]


class Progress(NamedTuple):
    """After each forward."""

    ready: list[Ready]
    tokens: int  # of all answers so far
    seconds: float


class _Turn(NamedTuple):
    """A question when its turn comes."""

    number: int
    question: Question
    max_new_tokens: int
    ids: array[int]  # of the question
    log: AttentionLog | None


def answers(session: Session) -> Iterator[Progress]:
    """Answers all questions of the request, several at a time. Raises GenerationError and ContextError."""
    from l4ctx.engine.questions import answer_rounds

    asking, plan = session.sized.inputs.asking, session.sized.plan
    assert asking is not None and plan.workload.rows is not None
    begin, citing = _Beginning(session, session.draft_source()), session.citing()
    began, tokens = time.perf_counter(), 0
    rounds = answer_rounds(
        session.model,
        session.cache,
        _asked(asking, citing),
        begin,
        rows=plan.workload.rows.count,
        step_tokens=plan.prefill_chunk_size,
    )
    with with_repair_hint(session.request.context.folder):
        for answered, new_tokens in rounds:
            tokens += new_tokens
            seconds = time.perf_counter() - began
            session.monitor.timings["decode"] = Timing(seconds, tokens)
            yield Progress([_ready(one, session, citing) for one in answered], tokens, seconds)


def _asked(asking: Asking, citing: Citing | None) -> Iterator[Asked[_Turn]]:
    from l4ctx.engine.questions import Asked

    for number, question in enumerate(asking.options.questions):
        ids = asking.ids(question)
        max_new_tokens = asking.max_new_tokens(question, len(ids))
        turn = _Turn(number, question, max_new_tokens, ids, None if citing is None else citing.log())
        yield Asked(turn, ids, len(ids) + max_new_tokens)


class _Beginning:
    """Makes the row of an answer that begins: with the question's own settings, and those of all for the rest."""

    def __init__(self, session: Session, drafts: DraftSource | None) -> None:
        self._session, self._drafts, self._format = session, drafts, session.response_format()

    def __call__(self, turn: _Turn, cache: Continuation, token: int) -> Row:
        from l4ctx.engine.loop_guard import LoopGuard
        from l4ctx.engine.row import Row

        checked, settings = self._session.sized.inputs.checked, turn.question.settings._asdict()
        del settings["max_new_tokens"]
        return Row(
            cache,
            token,
            max_new_tokens=turn.max_new_tokens,
            stop_tokens=checked.generation.stop_tokens,
            sampling=replace(
                checked.sampling, **{name: value for name, value in settings.items() if value is not None}
            ),
            guard=LoopGuard() if self._session.request.answer.loop_guard else None,
            drafts=None if self._drafts is None else self._drafts.drafter(turn.ids),
            observer=turn.log,
            constraint=None if self._format is None else self._format.answer(),
        )


def _ready(answered: Answered[_Turn], session: Session, citing: Citing | None) -> Ready:
    turn, inputs = answered.question, session.sized.inputs
    content: dict[str, Any] = {
        "id": turn.question.id,
        "question": turn.question.text,
        "answer": inputs.tokenizer.decode(answered.ids),
        "stop_reason": answered.row.stop_reason,
        "generated_tokens": len(answered.ids),
    }
    if citing is not None and turn.log is not None:
        first_query = inputs.prompt_tokens + len(turn.ids) - 1
        content["citations"] = citing.cite(answered.ids, turn.question.text, turn.log, first_query).as_dict()
    return Ready(turn.number, content)
