"""A session that generates given pieces, for tests of how an answer is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from l4ctx.engine.loop_guard import Loop
from l4ctx.run.session import Answer


class Generating:
    """As much of a session as showing an answer needs."""

    def __init__(self, pieces: list[str], stop: Any = "stop", loop: Loop | None = None) -> None:
        self.pieces, self.stop, self.loop = pieces, stop, loop
        self.answer = Answer()
        self.sized = SimpleNamespace(inputs=SimpleNamespace(max_new_tokens=9))

    def decode(self) -> Any:
        for piece in self.pieces:
            self.answer.tokens += 1
            self.answer.text += piece
            yield piece
        if isinstance(self.stop, BaseException):
            raise self.stop
        self.answer.stop_reason, self.answer.loop = self.stop, self.loop
