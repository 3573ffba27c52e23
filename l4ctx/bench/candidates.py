"""The candidates of each engine: dtypes and batch sizes that fit into memory and are worth a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.layout import KV_DTYPES
from l4ctx.bench.jobs import Candidate
from l4ctx.bench.peers import llama_cpp
from l4ctx.bench.peers.files import check_disk, folder_for_transformers, kinds_of, write_checkpoint, write_gguf
from l4ctx.bench.peers.gguf import GGUFError, check_supported, gguf_bytes
from l4ctx.bench.process import WorkerError
from l4ctx.bench.report import OWN
from l4ctx.bench.request import BenchRequest
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import available_memory
from l4ctx.machine.processor import computing_dtype, default_attention
from l4ctx.planning import remedies
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig

TRANSFORMERS_CHUNKS = (4096, 8192)
CANDIDATE_DTYPES = ("float32", "bfloat16")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is measured, and where: the request, the model's configuration, and the machine as a worker sees it."""

    request: BenchRequest
    raw: dict[str, Any]  # the content of config.json
    config: TextConfig
    machine: dict[str, Any]  # of l4ctx.bench.worker.measure_machine

    def weight_bytes(self, dtype: str) -> int:
        return int(self.machine["parameters"]) * KV_DTYPES[dtype]


def own_candidates(subject: Subject, note: Note) -> list[Candidate]:
    """The dtypes that fit into memory at the greatest length, each with the prefill chunk size that `ask` would choose.

    Raises MemoryPlanError if none fits.
    """
    asked, machine, stored = subject.request, subject.machine, str(subject.machine["stored_dtype"])
    capacity = Capacity(host=available_memory(), accelerator=machine["accelerator_free"])
    on_accelerator, parameters = capacity.accelerator is not None, int(machine["parameters"])
    auto = computing_dtype(asked.dtype, stored, on_accelerator=on_accelerator)
    dtypes = dict.fromkeys([auto, *(CANDIDATE_DTYPES if asked.dtype == "auto" else ())])
    plans = {}
    for dtype in dtypes:
        workload = Workload(
            subject.config,
            prompt_tokens=asked.lengths[-1],
            max_new_tokens=asked.decode_tokens + 1,
            weights=parameters * KV_DTYPES[dtype],
            dtype=dtype,
            stored_dtype=stored,
            weights_are_mapped=(asked.model is not None and dtype == stored and not on_accelerator),
            prefill_chunk_size=asked.prefill_chunk_size,
        )
        plans[dtype] = plan_memory(workload, capacity)
    fitting = {dtype: plan for dtype, plan in plans.items() if not plan.shortfalls(capacity)}
    if not fitting:
        remedies.check(min(plans.values(), key=lambda plan: plan.needed), capacity)
    for dtype in plans.keys() - fitting.keys():
        note(f"l4ctx in {dtype} is left out: it does not fit into memory")
    for text in dict.fromkeys(text for plan in fitting.values() for text in plan.notes):
        note(text)
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


@dataclass
class Peers:
    """The engines to compare with. `fail` is told what one of them cannot do, in one line."""

    subject: Subject
    scratch: Path  # a folder for files that they need
    note: Note
    working: Note
    fail: Note
    folder: Path | None = None  # the checkpoint that transformers reads, once `candidates` has found it

    def candidates(self) -> dict[str, list[Candidate]]:
        """Those of each engine; writes the files that it needs.

        Raises MemoryPlanError if the disk has no room for them.
        """
        asked, machine, found = self.subject.request, self.subject.machine, {}
        kinds = self._gguf_kinds() if asked.llama_bench is not None and not asked.gguf_files else []
        needs_folder = asked.compares_transformers or bool(kinds)
        written = self.subject.weight_bytes(machine["stored_dtype"]) if needs_folder and asked.model is None else 0
        written += sum(gguf_bytes(self.subject.config, kind) for kind in kinds)
        if written:
            check_disk(written, self.scratch, "the comparison")
        if needs_folder:
            self.working("writing a checkpoint")
            folder = asked.model or write_checkpoint(self.subject.raw, machine["stored_dtype"], self.scratch)
            self.folder = folder_for_transformers(folder, self.scratch)
        if asked.compares_transformers:
            dtypes = [name for name in CANDIDATE_DTYPES if asked.dtype == "auto"] or [asked.dtype]
            found["transformers"] = [
                Candidate("transformers", dtype, size)
                for dtype in dtypes
                if self._fits("transformers", dtype, self.subject.weight_bytes(dtype))
                for size in self._sizes(TRANSFORMERS_CHUNKS)
            ]
        if asked.llama_bench is not None:
            files = {file.name: file for file in asked.gguf_files}
            for kind in kinds:
                self.working(f"writing a GGUF file in {kind}")
                try:
                    files[kind] = write_gguf(folder, self.subject.config, kind, self.scratch)
                except WorkerError as error:
                    self.fail(f"llama.cpp {kind}: its file cannot be written: {error}")
            found["llama.cpp"] = [
                Candidate("llama.cpp", name, size, str(file))
                for name, file in files.items()
                for size in self._sizes(llama_cpp.UBATCH_SIZES)
            ]
        return found

    def _gguf_kinds(self) -> list[str]:
        try:
            check_supported(self.subject.config)
        except GGUFError as error:
            self.fail(f"llama.cpp: {error}")
            return []
        return [
            kind
            for kind in kinds_of(self.subject.request.dtype)
            if self._fits("llama.cpp", kind, gguf_bytes(self.subject.config, kind))
        ]

    def _sizes(self, sizes: Sequence[int]) -> list[int]:
        """Batch sizes that make a difference: of those that take all tokens at once, only the smallest."""
        longest = self.subject.request.lengths[-1]
        return [size for n, size in enumerate(sizes) if n == 0 or sizes[n - 1] < longest]

    def _fits(self, engine: str, dtype: str, weights: int) -> bool:
        """Whether the engine's weights alone fit into memory."""
        free = self.subject.machine["accelerator_free"] or available_memory()
        if free is None or weights <= free:
            return True
        self.note(
            f"{engine} in {dtype} is left out: its weights take {human_bytes(weights)}, but only "
            f"{human_bytes(free)} is free"
        )
        return False
