"""What a person sees: the progress of reading, the memory table, and text made safe for a terminal.

Builds what `cli.py` prints; decides nothing. Progress is drawn on the console that it is given.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from l4ctx.memory import human_bytes, process_memory
from l4ctx.progress import CostModel, Work

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from cache.sizes import KVBytes
    from l4ctx.prefill import PrefillProgress
    from l4ctx.report import MemoryReport

PLAIN_LINE_SECONDS = 30.0
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    """Text that cannot steer a terminal: control characters but newline and tab become U+FFFD, `\\r` goes."""
    return _CONTROLS.sub("\ufffd", text.replace("\r", ""))


class _Unfailing:
    """A text stream whose failures to write are ignored: a note that is lost must not cost the answer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stderr_console() -> Console:
    """A console on standard error that goes on when that is closed or full."""
    from rich.console import Console

    return Console(file=cast(TextIO, _Unfailing(sys.stderr)))


def notes(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """Where notes go: one line each on the console, or nowhere."""
    def note(text: str) -> None:
        if not quiet:
            console.print(without_controls(f"l4ctx: {text}"), markup=False, highlight=False, soft_wrap=True)

    return note


def rendered(content: RenderableType) -> str:
    """What standard output is to show: styled and as wide as it is if it is a terminal, else plain."""
    from rich.console import Console

    shown = io.StringIO()
    is_terminal = sys.stdout.isatty()
    width = Console(file=sys.stdout).width if is_terminal else 160
    Console(file=shown, width=width, force_terminal=is_terminal).print(content)
    return "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def show_waiting(console: Console) -> AbstractContextManager[object]:
    """Within it a terminal shows that work goes on which has no steps: decoding, tokenizing, loading."""
    return console.status("preparing", spinner="line") if console.is_interactive else nullcontext()


def human_seconds(seconds: float) -> str:
    """'0.4 s', '12 s', '3:05 min', '2:10:00 h'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def show_reading(steps: Iterable[PrefillProgress], work: Work, console: Console) -> Iterator[PrefillProgress]:
    """Passes the steps on and draws them: a live line on a terminal, else a plain one every so often."""
    observed = _observed(steps, work)
    if console.is_interactive:
        yield from _live(observed, console)
        return
    shown = time.monotonic()
    for step, cost in observed:
        yield step
        if time.monotonic() - shown > PLAIN_LINE_SECONDS and step.done < step.total:
            console.print(f"l4ctx: read {_line(step, cost)}", highlight=False, soft_wrap=True)
            shown = time.monotonic()


def _observed(steps: Iterable[PrefillProgress], work: Work) -> Iterator[tuple[PrefillProgress, CostModel]]:
    """Each step with the one cost model that has seen it and all before it."""
    cost: CostModel | None = None
    for step in steps:
        cost = cost or CostModel(work, step.start, step.start + step.total)
        cost.observe(step.step.start, step.step.stop, step.step_seconds)
        yield step, cost


def _live(observed: Iterable[tuple[PrefillProgress, CostModel]], console: Console) -> Iterator[PrefillProgress]:
    from rich.progress import BarColumn, Progress, TextColumn

    bar_width = 24 if console.width >= 160 else 10
    with Progress(TextColumn("reading"), BarColumn(bar_width), TextColumn("{task.description}"),
                  console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        for step, cost in observed:
            line = _line(step, cost, console.width - len("reading") - bar_width - 3)
            bar.update(task, total=step.total, completed=step.done, description=line)
            yield step


def _line(step: PrefillProgress, cost: CostModel, width: int | None = None) -> str:
    """As much as fits into `width` columns, what matters most first."""
    rates, memory = cost.rates, process_memory()
    tiers = ", ".join(f"{tier} {human_bytes(count)}" for tier, count in _tiers(step.held).items() if count)
    line, *rest = (
        f"{step.done:,} of {step.total:,} tokens",
        f", {human_seconds(cost.seconds_left)} left",
        f", {_rate(rates.now)} tokens/s",
        f" (average {_rate(rates.average)})",
        f"; KV: {tiers}" if tiers else "",
        f"; process: {human_bytes(memory.anonymous)}" if memory else "",
    )
    for part in rest:
        if width is not None and len(line) + len(part) > width:
            break
        line += part
    return line


def _tiers(held: KVBytes | None) -> dict[str, int]:
    """Bytes of keys and values by where they are. RoPE windows lie where the newest NoPE blocks do."""
    if held is None:
        return {}
    accelerator = held.nope_device + held.rope_windows if held.nope_device else 0
    return {"accelerator": accelerator, "memory": held.total - accelerator, "disk": held.nope_disk}


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def memory_table(report: MemoryReport) -> Table:
    """The memory report for people, a row an owner: bytes predicted for the end, at the most, held, and at the peak."""
    from rich.table import Table

    plan, end, most = report.predicted, report.predicted.end, report.predicted.peak
    table = Table(box=None, pad_edge=False, title="memory", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("predicted", "at most", "held", "peak"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, *values: int | None) -> None:
        if any(values):
            table.add_row(name, *("" if value is None else human_bytes(value) for value in values))

    row("weights, mapped from the checkpoint" if plan.weights_are_mapped else "weights",
        plan.weights, None, report.weights)
    row("RoPE windows", end.rope_windows, most.rope_windows, report.rope_windows)
    row("NoPE keys and values, accelerator", end.nope_device, most.nope_device, report.nope_device)
    row("NoPE keys and values, host memory", end.nope_host, most.nope_host, report.nope_host)
    row("NoPE keys and values, disk", end.nope_disk, most.nope_disk, report.nope_disk)
    row("read buffers", end.buffers, most.buffers, report.buffers)
    row("token ids", plan.token_ids, None, report.token_ids)
    row("activations", None, plan.activations)
    row("images and the vision tower", None, plan.images)
    if report.process and report.process_peak:
        row("process, anonymous", None, None, report.process.anonymous, report.process_peak.anonymous)
        row("process, file-backed", None, None, report.process.file_backed, report.process_peak.file_backed)
    row("accelerator", None, None, None, report.accelerator_peak)
    held = report.rope_windows + report.nope_device + report.nope_host + report.buffers
    row("keys and values in memory", end.total, None, held)
    row("  an unbounded cache would take", plan.unbounded_cache)
    return table
