"""One answer in progress: what the next forward gets, and what its logits make certain."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.choose import choose
from l4ctx.engine.loop_guard import LoopGuard

StopReason = Literal["stop", "length", "repetition"]


class Row:
    """Continues from `token`, the last token of its prompt, which is not in `cache` yet.

    Call `feed`, run the model on that, and give the logits to `take`, until `stop_reason` is set: "stop" at a stop
    token (which is no part of the answer), "repetition" when `guard` detects a loop, or "length" after
    `max_new_tokens`.
    """

    def __init__(
        self,
        cache: HybridKVCache,
        token: int,
        *,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        sampling: Sampling = Sampling(),
        guard: LoopGuard | None = None,
    ) -> None:
        self.cache = cache
        self.stop_reason: StopReason | None = None if max_new_tokens else "length"
        self.tokens = 0  # of the answer
        self._fed = [token]
        self._max_new_tokens, self._stop_tokens = max_new_tokens, stop_tokens
        self._sampling, self._guard = sampling, guard
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def feed(self) -> list[int]:
        """The tokens (T >= 1) that the next forward appends to `cache`, with all their logits."""
        return self._fed

    def take(self, logits: Tensor) -> list[int]:
        """From the logits (T, V) behind the tokens that were fed, the answer's next tokens. Raises GenerationError."""
        token = choose(logits[0], self._sampling, self._generator)
        if token in self._stop_tokens:
            self.stop_reason = "stop"
            return []
        self.tokens += 1
        self._fed = [token]
        if self._guard is not None and self._guard.push(token):
            self.stop_reason = "repetition"
        elif self.tokens == self._max_new_tokens:
            self.stop_reason = "length"
        return [token]
