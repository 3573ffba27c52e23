"""How far the reading of a prompt is, in a line of any width: tokens, time left, rate, document, memory by tier.

Shows nothing itself: that is `l4ctx.cli.activity`'s.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.cli.console import shortened
from l4ctx.cli.wrapping import cells
from l4ctx.formatting import counted, human_bytes, human_clock, human_seconds
from l4ctx.machine.memory import process_memory
from l4ctx.planning.cost_model import CostModel, Rates, Work

if TYPE_CHECKING:
    from cache.residency import KVBytes
    from l4ctx.cli.activity import Activity
    from l4ctx.engine.prefill import PrefillProgress
    from l4ctx.run.session import Session
    from l4ctx.spans import Span

LONG_STEP_SECONDS = 5
"""After so many seconds of a step, the line says which layer it has reached."""

SHORTEST_NAME = 12
"""Columns of a document's name below which it is left out."""


@dataclass(frozen=True)
class _Known:
    """After a step."""

    seconds_left: float
    rates: Rates
    held: KVBytes | None
    at: float  # of time.monotonic


class Reading:
    """A run over positions `start` .. `stop` - 1 of a prompt: those before, which need not be read, count as done."""

    def __init__(
        self,
        work: Work,
        start: int,
        stop: int,
        documents: Sequence[Span] = (),
        layer: Callable[[], str] = lambda: "",
    ) -> None:
        """`layer` says which one computes, as in "layer 3 of 48"."""
        self._cost = CostModel(work, start, stop)
        self._done, self._stop = start, stop
        self._documents, self._layer = documents, layer
        self._began = time.monotonic()
        self._known: _Known | None = None

    def observe(self, step: PrefillProgress) -> None:
        self._cost.observe(step.step.start, step.step.stop, step.step_seconds)
        self._done = step.step.stop
        self._known = _Known(self._cost.seconds_left, self._cost.rates, step.held, time.monotonic())

    @property
    def share(self) -> float:
        return self._done / self._stop

    def line(self, width: int | None, now: float) -> str:
        """As much as fits, what matters most first: of what a narrow line has room for, the time left goes last."""
        done, known = self._done, self._known
        if known is None:
            time_told, verb = f"{human_clock(now - self._began)} so far", "reading "
        else:
            time_told, verb = f"{human_seconds(max(0.0, known.seconds_left - (now - known.at)))} left", "read "
        is_long = now - (known.at if known else self._began) >= LONG_STEP_SECONDS
        layer = self._layer() if is_long else ""
        counts = (
            f"{verb}{done:,} of {self._stop:,} tokens" + (f", {layer}" if layer else ""),
            f"{verb}{done:,} of {self._stop:,} tokens",
            f"{done:,} of {self._stop:,} tokens",
            f"{done:,} of {self._stop:,}",
            f"{100 * done // self._stop}%",
        )
        for count in counts:
            line = f"{count}, {time_told}"
            if width is None or cells(line) <= width:
                return line + self._rest(None if width is None else width - cells(line))
        return time_told

    def _rest(self, width: int | None) -> str:
        """Parts in the order in which they are read; where not all fit, by how much they matter."""
        known, memory, room = self._known, process_memory(), width
        parts = {"rate": "", "average": "", "document": "", "tiers": "", "process": ""}

        def add(name: str, text: str) -> None:
            nonlocal room
            if room is not None and cells(text) > room:
                room = 0  # nothing that matters less is shown instead
                return
            parts[name] = text
            room = None if room is None else room - cells(text)

        if known is not None:
            add("rate", f", {_rate(known.rates.now)} tokens/s")
        if (name := self._document()) is not None:
            least = min(SHORTEST_NAME, cells(name))
            longest = cells(name) if room is None else max(least, min(cells(name), room - len(", in ")))
            add("document", f", in {shortened(name, longest)}")
        if known is not None:
            tiers = ", ".join(f"{tier} {human_bytes(count)}" for tier, count in _tiers(known.held).items() if count)
            add("tiers", f"; KV: {tiers}" if tiers else "")
            add("average", f" (average {_rate(known.rates.average)})")
            add("process", f"; process: {human_bytes(memory.anonymous)}" if memory else "")
        return "".join(parts.values())

    def _document(self) -> str | None:
        """The name of the one that is being read."""
        number = bisect_right(self._documents, self._done, key=lambda span: span.start) - 1
        if number < 0 or self._done >= self._documents[number].stop:
            return None
        return self._documents[number].source


def read_shown(session: Session, activity: Activity) -> None:
    """Reads what a prompt has beyond what a context holds. Raises what `Session.prefill` raises."""
    sized = session.sized
    start, stop = sized.reused, sized.inputs.reading_stop
    number = sized.inputs.config.num_hidden_layers
    is_known = session.model.device.type == "cpu"  # a GPU is given layers long before it computes them

    def layer() -> str:
        return "" if not is_known else f"layer {session.layers.layer + 1} of {number}"

    reading = Reading(sized.operations, start, stop, sized.inputs.prompt.spans, layer) if start < stop else None
    if reading is not None:
        activity.show(reading)
    for step in session.prefill():
        if reading is not None:
            reading.observe(step)
            activity.beat()


def reading_summary(session: Session) -> str | None:
    """What reading documents took; None where nothing of them had to be read."""
    prompt, written = session.sized.inputs.prompt, session.sized.written
    if not prompt.spans or prompt.documents_stop <= session.sized.reused:
        return None
    timing = session.monitor.timings["prefill"]
    rate = f" ({_rate(timing.tokens / timing.seconds)} tokens/s)" if timing.seconds else ""
    size = None if written is None else written.bytes_on_disk()
    on_disk = "" if size is None else f"; {human_bytes(size)} on disk"
    return f"read {counted(timing.tokens, 'token')} in {human_seconds(timing.seconds)}{rate}{on_disk}"


def stats_line(session: Session) -> str:
    """Tokens, time and rate of reading and of the answer, or of all answers."""
    timings, sized = session.monitor.timings, session.sized
    read, answered = timings["prefill"], timings["decode"]
    reused = f", {sized.reused:,} of them reused" if sized.reused else ""
    parts = [f"{counted(sized.inputs.prompt_tokens, 'token')}{reused}"]
    for what, timing in (("read", read), ("answered", answered)):
        if timing.tokens:
            rate = f" ({_rate(timing.tokens / timing.seconds)} tokens/s)" if timing.seconds else ""
            parts.append(f"{what} {timing.tokens:,} in {human_seconds(timing.seconds)}{rate}")
    return "; ".join([*parts, f"loading took {human_seconds(timings['load'].seconds)}"])


def _tiers(held: KVBytes | None) -> dict[str, int]:
    """Bytes of keys and values by where they are. RoPE windows lie where the newest NoPE blocks do."""
    if held is None:
        return {}
    accelerator = held.nope_device + held.rope_windows if held.nope_device else 0
    return {"accelerator": accelerator, "memory": held.total - accelerator, "disk": held.nope_disk}


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
