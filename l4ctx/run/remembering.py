"""What is remembered of a run: its answers, and the context and the model that it worked with. Never fails it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.history.answers import AnswerLog
from l4ctx.history.seen import CONTEXTS, MODELS, Seen

if TYPE_CHECKING:
    from l4ctx.run.session import Session


class Memory:
    """Of one run. Off, it does nothing; what cannot be written is told once."""

    def __init__(self, note: Callable[[str], None], *, is_on: bool) -> None:
        self._note, self._is_on = note, is_on

    def saw(self, session: Session) -> None:
        """Takes note of the model and, if there is one, the context."""
        folder = session.request.context.folder

        def remember() -> None:
            seen = Seen()
            seen.add(MODELS, session.request.model)
            if folder is not None:
                seen.add(CONTEXTS, folder)

        self._try(remember)

    def saved(self, folder: Path) -> None:
        """Takes note of a context."""
        self._try(lambda: Seen().add(CONTEXTS, folder))

    def answered(self, session: Session, question: str, answer: dict[str, Any]) -> None:
        """Logs an answer; `answer` has at least `answer`, `stop_reason` and `generated_tokens`."""
        self._try(lambda: AnswerLog().append(answer_record(session, question, answer)))

    def _try(self, action: Callable[[], None]) -> None:
        if not self._is_on:
            return
        try:
            action()
        except OSError as error:
            self._is_on = False
            self._note(f"the log of answers cannot be written: {error.strerror}; --no-log does without")


def answer_record(session: Session, question: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer as it is logged: with what it is about, the model, and times in seconds."""
    inputs, timings, folder = session.sized.inputs, session.monitor.timings, session.request.context.folder
    held = inputs.context.documents() if inputs.context is not None and session.request.answers_from_all else []
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "question": question,
        "answer": answer["answer"],
        "stop_reason": answer["stop_reason"],
        "sources": [span.source for span in (*held, *inputs.prompt.spans)],
        "context": None if folder is None else os.path.abspath(folder),
        "model": os.path.abspath(session.request.model),
        "prompt_tokens": inputs.prompt_tokens,
        "generated_tokens": answer["generated_tokens"],
        "seconds": {name: round(timings[name].seconds, 3) for name in ("load", "prefill", "decode")},
    }
