"""The course of a benchmark: candidates are tried once, then the fastest of each engine are measured in turn.

Every measurement is a process of its own, one at a time. What can be refused is refused before the first.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from l4ctx.bench.candidates import Peers, Subject, own_candidates
from l4ctx.bench.jobs import WARM_UP_TOKENS, Candidate, Measurement, WorkerJob
from l4ctx.bench.peers import llama_cpp
from l4ctx.bench.process import WorkerError, run_worker
from l4ctx.bench.report import OWN, BenchReport, BenchRun, best_candidate
from l4ctx.bench.request import BenchRequest, fitted_to_positions, read_config
from l4ctx.errors import UsageError
from l4ctx.machine.memory import available_memory
from l4ctx.machine.processor import processor_name

TRIAL_TOKENS = 8192
"""Length of a trial, or the greatest length that is measured if that is less: one step of the largest batch size."""

PROBE_TOKENS, PROBE_WARM_UP = 64, 8
HOPELESS = 10
"""A dtype this many times slower than the engine's fastest on a few tokens is left out before its trial."""

EXTRA = 'pip install "l4ctx[bench]"'


def run_benchmark(request: BenchRequest, note: Callable[[str], None], working: Callable[[str], None]) -> BenchReport:
    """Measures; `note` is told what a person should know, `working` what is being done.

    Raises what a user can cause: UsageError, RequestError, ConfigError, CheckpointError, PromptLengthError,
    MemoryPlanError, and WorkerError when l4ctx itself fails.
    """
    raw, config = read_config(request)
    request = fitted_to_positions(request, config, note)
    if request.compares_transformers:
        _require("transformers", "--compare transformers")
    if request.llama_bench is not None and not request.gguf_files:
        _require("gguf", "--compare llama.cpp")
    working("looking at the machine")
    subject = Subject(request, raw, config, run_task("machine", request, raw, request.device))
    own = own_candidates(subject, note)
    report = BenchReport(
        config,
        _about_model(subject),
        _about_machine(subject.machine),
        request.lengths,
        request.decode_tokens,
        request.rounds,
    )

    def fail(text: str) -> None:
        note(text)
        report.failures.append(text)

    with tempfile.TemporaryDirectory(prefix="l4ctx-bench-", ignore_cleanup_errors=True) as scratch:
        peers = Peers(subject, Path(scratch), note, working, fail)
        candidates = {OWN: own} | peers.candidates()
        benchmark = Benchmark(subject, report, peers.folder, note, working, fail)
        benchmark.choose(candidates)
        for number in range(1, request.rounds + 1):
            benchmark.round(number)
    return report


@dataclass
class Benchmark:
    """Trials and rounds, which fill the report. The callables are those of `run_benchmark`."""

    subject: Subject
    report: BenchReport
    folder: Path | None  # the checkpoint that transformers reads
    note: Callable[[str], None]
    working: Callable[[str], None]
    fail: Callable[[str], None]  # told what an engine cannot do
    _failed_at: dict[str, int] = field(default_factory=dict)  # engine -> tokens at which it failed

    def choose(self, candidates: dict[str, list[Candidate]]) -> None:
        """Tries every candidate once, all at one length, and keeps each engine's fastest.

        Raises what l4ctx raises, if that fails.
        """
        tokens = min(TRIAL_TOKENS, self.subject.request.lengths[-1])
        failed: WorkerError | None = None
        for engine, every in candidates.items():
            own = self._hopeful(every) if tokens > 4 * PROBE_TOKENS else every
            for candidate in own if len(own) > 1 else ():
                self.working(f"trial: {candidate}")
                try:
                    measured = self._measure(candidate, tokens, 0)
                except WorkerError as error:
                    failed = error if engine == OWN else failed
                    self.fail(f"{candidate}: {error}")
                    continue
                self.report.trials.append(BenchRun(0, candidate, measured))
                self.note(f"trial: {candidate}: {measured.prefill_rate:,.0f} tokens/s")
            chosen = own[0] if len(own) == 1 else best_candidate(self.report.trials, engine)
            if chosen is not None:
                self.report.chosen[engine] = chosen
            elif engine == OWN and failed is not None:
                failed.raise_as_known(f"{own[-1]}")
            else:
                self.note(f"{engine} is left out")

    def _hopeful(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates of one engine without the dtypes that a few tokens show to be far too slow.

        Batch sizes make no difference at that length. What fails is kept: its trial will say how.
        """
        rates: dict[str, float] = {}
        first: dict[str, Candidate] = {}
        for candidate in candidates:
            first.setdefault(candidate.dtype, candidate)
        for dtype, candidate in first.items() if len(first) > 1 else ():
            self.working(f"first tokens: {candidate}")
            with suppress(WorkerError):
                rates[dtype] = self._measure(candidate, PROBE_TOKENS, 0, PROBE_WARM_UP).prefill_rate
        best = max(rates, key=rates.__getitem__, default="")
        slow = {dtype for dtype, rate in rates.items() if HOPELESS * rate <= rates[best]}
        for dtype in slow:
            text = (
                f"{first[dtype].engine} in {dtype} is left out: {rates[dtype]:.3g} tokens/s at the first "
                f"{PROBE_TOKENS} tokens, {rates[best]:.3g} in {best}"
            )
            self.note(text)
            self.report.left_out.append(text)
        return [candidate for candidate in candidates if candidate.dtype not in slow]

    def round(self, number: int) -> None:
        """All engines at all lengths, then the ceilings. Raises what l4ctx raises, if that fails."""
        asked, machine = self.subject.request, self.subject.machine
        for tokens in asked.lengths:
            for engine, candidate in self.report.chosen.items():
                if tokens >= self._failed_at.get(engine, tokens + 1):
                    continue
                where = f"round {number} of {asked.rounds}, {tokens:,} tokens"
                self.working(f"{where}: {candidate}")
                try:
                    measured = self._measure(candidate, tokens, asked.decode_tokens)
                except WorkerError as error:
                    if engine == OWN:
                        error.raise_as_known(f"{candidate}, {tokens:,} tokens")
                    self._failed_at[engine] = tokens
                    self.fail(f"{candidate}, {tokens:,} tokens: {error}")
                    continue
                self.report.runs.append(BenchRun(number, candidate, measured))
                self.note(f"{where}: {engine} {measured.prefill_rate:,.0f} tokens/s")
        if asked.ceilings:
            self.working(f"round {number} of {asked.rounds}: the machine's ceilings")
            try:
                self.report.ceilings.append(run_task("ceilings", asked, self.subject.raw, machine["device"]))
            except WorkerError as error:
                self.fail(f"the machine's ceilings: {error}")

    def _measure(
        self, candidate: Candidate, tokens: int, decode_tokens: int, warm_up_tokens: int = WARM_UP_TOKENS
    ) -> Measurement:
        """One run in a process of its own. Raises WorkerError."""
        asked, machine = self.subject.request, self.subject.machine
        device = str(machine["device"])
        if candidate.engine == "llama.cpp":
            assert asked.llama_bench is not None
            return llama_cpp.measure(
                asked.llama_bench,
                candidate,
                tokens,
                decode_tokens,
                threads=int(machine["threads"]),
                on_cpu=device == "cpu",
                parameters=int(machine["parameters"]),
                warm_up_tokens=warm_up_tokens,
            )
        folder = asked.model if candidate.engine == OWN else self.folder
        return Measurement.from_dict(
            run_worker(
                WorkerJob(
                    candidate.engine,
                    folder=None if folder is None else str(folder),
                    config=self.subject.raw if folder is None else None,
                    dtype=candidate.dtype,
                    batch_size=candidate.batch_size,
                    tokens=tokens,
                    decode_tokens=decode_tokens,
                    warm_up_tokens=warm_up_tokens,
                    device=device,
                    attention=candidate.attention or "sdpa",
                    is_mapped=candidate.is_mapped,
                )
            )
        )


def run_task(task: str, request: BenchRequest, raw: dict[str, Any], device: str) -> dict[str, Any]:
    """A worker's task that needs only the configuration and the device. Errors that a user can cause are raised as
    they are."""
    model = request.model
    try:
        return run_worker(
            WorkerJob(
                task,
                folder=None if model is None else str(model),
                config=None if model is not None else raw,
                device=device,
            )
        )
    except WorkerError as error:
        error.raise_as_known(f"looking at the {task}")


def _about_model(subject: Subject) -> dict[str, Any]:
    request, machine = subject.request, subject.machine
    return {
        "path": str(request.model or request.config),
        "random_weights": request.model is None,
        "parameters": machine["parameters"],
        "stored_dtype": machine["stored_dtype"],
    }


def _about_machine(machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "cpu": processor_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": machine["threads"],
        "torch": machine["torch"],
        "device": machine["device"],
        "accelerator": machine["accelerator"],
        "memory_free": available_memory(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{option} needs the package {package}: {EXTRA}")
