"""One answer in progress: what the next forward gets, and what its logits make certain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.choose import choose
from l4ctx.engine.loop_guard import LoopGuard
from model.kernels.watch import Observer

StopReason = Literal["stop", "length", "repetition"]


class Drafts(Protocol):
    """Where drafts come from: `l4ctx.drafts.drafter.Drafter`."""

    def propose(self, room: int, rows: int) -> list[int]:
        """At most `room` tokens that may come next, for a forward that `rows` answers share."""
        ...

    def observe(self, tokens: Sequence[int]) -> None:
        """What did come next: one token more than were right, or fewer where the answer ends."""
        ...


class Constraint(Protocol):
    """What an answer has to keep to, such as a schema: `l4ctx.run.response_format.Constraint`."""

    def allowed(self) -> bytes:
        """A byte for each token, which is not 0 where it may come next; there is always one."""
        ...

    def accept(self, token: int) -> None:
        """It does come next."""
        ...


class AnswerCache(Protocol):
    """What an answer needs of the cache that its tokens are appended to."""

    offset: int

    @property
    def room(self) -> int: ...

    def rewind(self, offset: int) -> None: ...


class Row:
    """Continues from `token`, the last token of its prompt, which is not in `cache` yet.

    Call `feed`, run the model on that, and give the logits to `take`, until `stop_reason` is set: "stop" at a stop
    token (which is no part of the answer), "repetition" when `guard` detects a loop, or "length" after
    `max_new_tokens`.

    `drafts` are verified by choosing each token as without them, up to the first that differs. As a draft is certain of
    its token, this is the rejection rule of https://arxiv.org/abs/2302.01318: what is sampled has the model's own
    distribution, and a seed gives the answer that it gives without drafts.
    """

    def __init__(
        self,
        cache: AnswerCache,
        token: int,
        *,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        sampling: Sampling = Sampling(),
        guard: LoopGuard | None = None,
        drafts: Drafts | None = None,
        observer: Observer | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """`observer` is told what forwards of this answer attend to; `constraint` says which tokens it may consist of,
        drafted ones among them."""
        self.cache, self.observer = cache, observer
        self.stop_reason: StopReason | None = None if max_new_tokens else "length"
        self.tokens = 0  # of the answer
        self._last, self._fed = token, list[int]()
        self._max_new_tokens, self._stop_tokens = max_new_tokens, stop_tokens
        self._sampling, self._guard, self._drafts, self._constraint = sampling, guard, drafts, constraint
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def feed(self, rows: int = 1, most_drafted: int = sys.maxsize) -> list[int]:
        """The tokens (T >= 1) that the next forward appends to `cache`, with all their logits: the last one that is
        certain, and a draft of at most `most_drafted` tokens, which the cache can take back.

        `rows` answers share that forward.
        """
        if not self._fed:
            self._fed = [self._last]
            room = min(self.cache.room - 1, self._max_new_tokens - self.tokens - 1, most_drafted)
            if self._drafts is not None:
                self._fed += self._drafts.propose(max(0, room), rows)
        return self._fed

    def take(self, logits: Tensor) -> list[int]:
        """From the logits (T, V) behind the tokens that were fed, the answer's next tokens. Raises GenerationError."""
        fed, self._fed = self._fed, []
        before, chosen = self.cache.offset - len(fed), list[int]()
        for drafted, row in zip([*fed[1:], None], logits, strict=True):
            self._last = self._choose(row)
            chosen.append(self._last)
            self.stop_reason = self._reason_to_stop(self._last)
            if self._last != drafted or self.stop_reason is not None:
                break
        if len(chosen) < len(fed):
            self.cache.rewind(before + len(chosen))
        if self._drafts is not None:
            self._drafts.observe(chosen)
        return chosen[:-1] if self.stop_reason == "stop" else chosen

    def _choose(self, logits: Tensor) -> int:
        """A token id from logits (V,), among those that are allowed."""
        if self._constraint is None:
            return choose(logits, self._sampling, self._generator)
        allowed = torch.frombuffer(bytearray(self._constraint.allowed()), dtype=torch.uint8)[: len(logits)]
        ids = allowed.nonzero().flatten()
        token = int(ids[choose(logits[ids.to(logits.device)], self._sampling, self._generator)])
        self._constraint.accept(token)
        return token

    def _reason_to_stop(self, token: int) -> StopReason | None:
        if token in self._stop_tokens:
            return "stop"
        self.tokens += 1
        if self._guard is not None and self._guard.push(token):
            return "repetition"
        return "length" if self.tokens == self._max_new_tokens else None
