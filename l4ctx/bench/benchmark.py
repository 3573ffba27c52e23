"""The benchmark's course: what can be refused is refused, candidates are tried, then engines are measured in turn.

Every measurement is a process of its own, one at a time. Prints nothing; imports no torch.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cache.layout import KV_DTYPES
from l4ctx.bench.jobs import WARM_UP_TOKENS, Candidate, Measurement, WorkerJob
from l4ctx.bench.peers import llama_cpp
from l4ctx.bench.peers.files import check_disk, folder_for_transformers, kinds_of, write_checkpoint, write_gguf
from l4ctx.bench.peers.gguf import GGUFError, check_supported, gguf_bytes
from l4ctx.bench.process import WorkerError, run_worker
from l4ctx.bench.report import OWN, BenchReport, BenchRun, best_candidate
from l4ctx.errors import UsageError
from l4ctx.formatting import human_bytes
from l4ctx.inspection.model_folder import check_model_folder
from l4ctx.machine.memory import available_memory
from l4ctx.machine.processor import computing_dtype, default_attention, processor_name
from l4ctx.planning import remedies
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig

TRANSFORMERS_CHUNKS = (4096, 8192)
TRIAL_TOKENS = 8192
"""Candidates are told apart at so many tokens, or at the greatest length that is measured: what the largest batch size
takes at a time."""

PROBE_TOKENS, PROBE_WARM_UP = 64, 8
HOPELESS = 10
"""Before its trial, a dtype that is so many times slower than the engine's fastest on a few tokens is left out."""

CANDIDATE_DTYPES = ("float32", "bfloat16")
EXTRA = 'pip install "l4ctx[bench]"'


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured. Either `model` or `config` is given."""

    lengths: tuple[int, ...]  # tokens, ascending
    lengths_are_given: bool = True  # by the user; others are shortened to what the model has positions for
    model: Path | None = None
    config: Path | None = None  # a config.json, or its folder: random weights
    decode_tokens: int = 32
    rounds: int = 3
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    prefill_chunk_size: int | None = None
    compares_transformers: bool = False
    llama_bench: str | None = None  # path of the program
    gguf_files: tuple[Path, ...] = ()
    ceilings: bool = True


@dataclass
class Benchmark:
    """`note` is told what a person should know, `working` what is being done."""

    request: BenchRequest
    note: Callable[[str], None]
    working: Callable[[str], None]
    raw: dict[str, Any] = field(init=False)
    config: TextConfig = field(init=False)
    report: BenchReport = field(init=False)
    _machine: dict[str, Any] = field(init=False)
    _folders: dict[str, Path] = field(default_factory=dict)  # of checkpoints, by engine
    _failed_at: dict[str, int] = field(default_factory=dict)  # engine -> tokens that it could not do

    def run(self) -> BenchReport:
        """Raises what a user can cause: UsageError, RequestError, ConfigError, CheckpointError, PromptLengthError,
        MemoryPlanError, and WorkerError when l4ctx itself fails."""
        self._read_config()
        asked = self.request
        if asked.compares_transformers:
            _require("transformers", "--compare transformers")
        if asked.llama_bench is not None and not asked.gguf_files:
            _require("gguf", "--compare llama.cpp")
        self.working("looking at the machine")
        self._machine = self._own_worker("machine")
        candidates = {OWN: self._own_candidates()}
        self.report = BenchReport(
            self.config, self._model(), self._about_machine(), asked.lengths, asked.decode_tokens, asked.rounds
        )
        with tempfile.TemporaryDirectory(prefix="l4ctx-bench-", ignore_cleanup_errors=True) as scratch:
            candidates |= self._peers(Path(scratch))
            self._choose(candidates)
            for number in range(1, asked.rounds + 1):
                self._round(number)
        return self.report

    # What there is

    def _read_config(self) -> None:
        """And what lengths the model has positions for. Raises ConfigError, and PromptLengthError for one that is too
        long, if it was given."""
        asked = self.request
        where = asked.model or asked.config
        assert where is not None
        if asked.model is not None:
            check_model_folder(where)
        file = where / "config.json" if asked.model is not None or where.is_dir() else where
        self.config = (
            TextConfig.from_folder(where)
            if file != where
            else TextConfig.from_file(file, f"{file}: no such file; a config.json is expected")
        )
        self.raw = json.loads(file.read_text(encoding="utf-8"))
        positions = self.config.max_position_embeddings
        longest, room = asked.lengths[-1] + asked.decode_tokens + 1, positions - asked.decode_tokens - 1
        if longest > positions and not asked.lengths_are_given and room > 1:
            shortened = [f"{tokens:,}" for tokens in asked.lengths if tokens > room]
            self.request = replace(asked, lengths=tuple(sorted({min(tokens, room) for tokens in asked.lengths})))
            self.note(
                f"{room:,} tokens are read instead of {' and '.join(shortened)}: the model has {positions:,} positions"
            )
        elif longest > positions:
            from l4ctx.prompt.builder import PromptLengthError

            raise PromptLengthError(
                f"--tokens {asked.lengths[-1]}: with what is decoded these are {longest:,} tokens, "
                f"and the model has {positions:,} positions"
            )

    def _own_candidates(self) -> list[Candidate]:
        """Dtypes that fit into memory at the greatest length, each with the prefill chunk size that `ask` would take.

        Raises MemoryPlanError if none fits.
        """
        asked, stored = self.request, str(self._machine["stored_dtype"])
        capacity = Capacity(host=available_memory(), accelerator=self._machine["accelerator_free"])
        on_accelerator, parameters = capacity.accelerator is not None, int(self._machine["parameters"])
        auto = computing_dtype(asked.dtype, stored, parameters, on_accelerator=on_accelerator, available=capacity.host)
        dtypes = dict.fromkeys([auto, *(CANDIDATE_DTYPES if asked.dtype == "auto" else ())])
        plans = {}
        for dtype in dtypes:
            workload = Workload(
                self.config,
                prompt_tokens=asked.lengths[-1],
                max_new_tokens=asked.decode_tokens + 1,
                weights=parameters * KV_DTYPES[dtype],
                dtype=dtype,
                stored_dtype=stored,
                weights_are_mapped=(
                    asked.model is not None
                    and dtype == stored
                    and not on_accelerator
                    and bool(self._machine["can_be_mapped"])
                ),
                prefill_chunk_size=asked.prefill_chunk_size,
            )
            plans[dtype] = MemoryPlan.of(workload, capacity)
        fitting = {dtype: plan for dtype, plan in plans.items() if not plan.shortfalls(capacity)}
        if not fitting:
            remedies.check(min(plans.values(), key=lambda plan: plan.needed), capacity)
        for dtype in plans.keys() - fitting.keys():
            self.note(f"l4ctx in {dtype} is left out: it does not fit into memory")
        for text in dict.fromkeys(text for plan in fitting.values() for text in plan.notes):
            self.note(text)
        return [
            Candidate(
                OWN,
                dtype,
                plan.prefill_chunk_size,
                is_mapped=plan.weights_are_mapped,
                attention=asked.attention or default_attention(dtype, on_accelerator=on_accelerator),
            )
            for dtype, plan in fitting.items()
        ]

    def _peers(self, scratch: Path) -> dict[str, list[Candidate]]:
        """The candidates of the engines to compare with; writes what files they need.

        Raises MemoryPlanError if the disk has no room for them.
        """
        asked, found = self.request, {}
        kinds = self._gguf_kinds() if asked.llama_bench is not None and not asked.gguf_files else []
        needs_folder = asked.compares_transformers or bool(kinds)
        itemsize = KV_DTYPES[self._machine["stored_dtype"]]
        written = self._machine["parameters"] * itemsize if needs_folder and asked.model is None else 0
        written += sum(gguf_bytes(self.config, kind) for kind in kinds)
        if written:
            check_disk(written, scratch, "the comparison")
        if needs_folder:
            self.working("writing a checkpoint")
            folder = asked.model or write_checkpoint(self.raw, self._machine["stored_dtype"], scratch)
            self._folders["transformers"] = folder_for_transformers(folder, scratch)
        if asked.compares_transformers:
            dtypes = [name for name in CANDIDATE_DTYPES if asked.dtype == "auto"] or [asked.dtype]
            found["transformers"] = [
                Candidate("transformers", dtype, size)
                for dtype in dtypes
                if self._fits("transformers", dtype, self._bytes(dtype))
                for size in self._sizes(TRANSFORMERS_CHUNKS)
            ]
        if asked.llama_bench is not None:
            files = {file.name: file for file in asked.gguf_files}
            for kind in kinds:
                self.working(f"writing a GGUF file in {kind}")
                try:
                    files[kind] = write_gguf(folder, self.config, kind, scratch)
                except WorkerError as error:
                    self._fail(f"llama.cpp {kind}: its file cannot be written: {error}")
            found["llama.cpp"] = [
                Candidate("llama.cpp", name, size, str(file))
                for name, file in files.items()
                for size in self._sizes(llama_cpp.UBATCH_SIZES)
            ]
        return found

    def _gguf_kinds(self) -> list[str]:
        try:
            check_supported(self.config)
        except GGUFError as error:
            self._fail(f"llama.cpp: {error}")
            return []
        return [
            kind
            for kind in kinds_of(self.request.dtype)
            if self._fits("llama.cpp", kind, gguf_bytes(self.config, kind))
        ]

    def _sizes(self, sizes: Sequence[int]) -> list[int]:
        """Batch sizes that make a difference: of those that hold all tokens at once, the smallest."""
        longest = self.request.lengths[-1]
        return [size for n, size in enumerate(sizes) if n == 0 or sizes[n - 1] < longest]

    def _bytes(self, dtype: str) -> int:
        return int(self._machine["parameters"]) * KV_DTYPES[dtype]

    def _fits(self, engine: str, dtype: str, weights: int) -> bool:
        """Whether another engine's weights alone fit into memory."""
        free = self._machine["accelerator_free"] or available_memory()
        if free is None or weights <= free:
            return True
        self.note(
            f"{engine} in {dtype} is left out: its weights take {human_bytes(weights)}, and "
            f"{human_bytes(free)} are free"
        )
        return False

    # Measuring

    def _choose(self, candidates: dict[str, list[Candidate]]) -> None:
        """Tries every candidate once at one length; keeps each engine's fastest. Raises what a failing l4ctx does."""
        tokens = min(TRIAL_TOKENS, self.request.lengths[-1])
        failed: WorkerError | None = None
        for engine, every in candidates.items():
            own = self._hopeful(every) if tokens > 4 * PROBE_TOKENS else every
            for candidate in own if len(own) > 1 else ():
                self.working(f"trial: {candidate}")
                try:
                    measured = self._measure(candidate, tokens, 0)
                except WorkerError as error:
                    failed = error if engine == OWN else failed
                    self._fail(f"{candidate}: {error}")
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
        """Those of one engine without those in dtypes that a few tokens show to be far too slow.

        Batch sizes make no difference there. What fails stays: its trial will say how.
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

    def _round(self, number: int) -> None:
        """All engines at all lengths, then the ceilings. Raises what l4ctx raised, if that fails."""
        for tokens in self.request.lengths:
            for engine, candidate in self.report.chosen.items():
                if tokens >= self._failed_at.get(engine, tokens + 1):
                    continue
                where = f"round {number} of {self.request.rounds}, {tokens:,} tokens"
                self.working(f"{where}: {candidate}")
                try:
                    measured = self._measure(candidate, tokens, self.request.decode_tokens)
                except WorkerError as error:
                    if engine == OWN:
                        error.raise_as_known(f"{candidate}, {tokens:,} tokens")
                    self._failed_at[engine] = tokens
                    self._fail(f"{candidate}, {tokens:,} tokens: {error}")
                    continue
                self.report.runs.append(BenchRun(number, candidate, measured))
                self.note(f"{where}: {engine} {measured.prefill_rate:,.0f} tokens/s")
        if self.request.ceilings:
            self.working(f"round {number} of {self.request.rounds}: the machine's ceilings")
            try:
                self.report.ceilings.append(self._own_worker("ceilings"))
            except WorkerError as error:
                self._fail(f"the machine's ceilings: {error}")

    def _measure(
        self, candidate: Candidate, tokens: int, decode_tokens: int, warm_up_tokens: int = WARM_UP_TOKENS
    ) -> Measurement:
        """Raises WorkerError."""
        device = str(self._machine["device"])
        if candidate.engine == "llama.cpp":
            assert self.request.llama_bench is not None
            return llama_cpp.measure(
                self.request.llama_bench,
                candidate,
                tokens,
                decode_tokens,
                threads=int(self._machine["threads"]),
                on_cpu=device == "cpu",
                parameters=int(self._machine["parameters"]),
                warm_up_tokens=warm_up_tokens,
            )
        folder = self.request.model if candidate.engine == OWN else self._folders[candidate.engine]
        return Measurement.from_dict(
            run_worker(
                WorkerJob(
                    candidate.engine,
                    folder=None if folder is None else str(folder),
                    config=self.raw if folder is None else None,
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

    def _own_worker(self, task: str) -> dict[str, Any]:
        """A task that needs the configuration and the device alone; errors that a user can cause as they are."""
        model = self.request.model
        try:
            return run_worker(
                WorkerJob(
                    task,
                    folder=None if model is None else str(model),
                    config=None if model is not None else self.raw,
                    device=self.request.device if task == "machine" else self._machine["device"],
                )
            )
        except WorkerError as error:
            error.raise_as_known(f"looking at the {task}")

    def _fail(self, text: str) -> None:
        """What an engine could not do: said at once, and in the report."""
        self.note(text)
        self.report.failures.append(text)

    def _model(self) -> dict[str, Any]:
        asked = self.request
        return {
            "path": str(asked.model or asked.config),
            "random_weights": asked.model is None,
            "parameters": self._machine["parameters"],
            "stored_dtype": self._machine["stored_dtype"],
        }

    def _about_machine(self) -> dict[str, Any]:
        return {
            "cpu": processor_name(),
            "system": platform.system(),
            "python": platform.python_version(),
            "threads": self._machine["threads"],
            "torch": self._machine["torch"],
            "device": self._machine["device"],
            "accelerator": self._machine["accelerator"],
            "memory_free": available_memory(),
            "date": time.strftime("%Y-%m-%d"),
        }


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{option} needs the package {package}: {EXTRA}")
