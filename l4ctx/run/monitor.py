"""What accompanies a run from stage to stage: notes, activity, timings, memory peaks, and what to close at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

from l4ctx.machine.memory import PeakSampler


@dataclass
class Timing:
    """Of one step of a run."""

    seconds: float = 0.0
    tokens: int = 0

    def as_dict(self) -> dict[str, float | None]:
        rate = self.tokens / self.seconds if self.tokens and self.seconds else None
        return {"seconds": round(self.seconds, 6), "tokens_per_second": rate and round(rate, 3)}


def _ignore(what: str) -> None:
    pass


class Monitor:
    """`note` is told what a user should know, and `tell` what is being done, as often as it changes.

    To be entered: memory is sampled within, and `resources` are closed at the end.
    """

    def __init__(self, note: Callable[[str], None], tell: Callable[[str], None] = _ignore) -> None:
        self.note, self.tell = note, tell
        self.timings = {name: Timing() for name in ("load", "tokenize", "prefill", "decode")}
        self.resources = ExitStack()
        self.sampler = PeakSampler()
        self.kept: Callable[[], str] = lambda: "nothing of it is kept"  # what an interruption now leaves

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Counts the time within it as time to load."""
        began = time.perf_counter()
        yield
        self.timings["load"].seconds += time.perf_counter() - began

    def __enter__(self) -> Monitor:
        self.resources.enter_context(self.sampler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.__exit__(kind, error, trace)
