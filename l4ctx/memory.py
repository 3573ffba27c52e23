"""Where every byte goes: what a run will need (MemoryPlan), what it holds and held (MemoryReport), what is free.

Plans are made before weights are loaded, from closed forms; they import no torch. Knows nothing of terminals.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cache import sizes
from model.config import TextConfig, activation_bytes

TOKEN_ID_BYTES = 4
MARGIN_BYTES = 256 * 2**20
"""Left free by a plan: the interpreter, its libraries, and what the allocator does not give back."""


class MemoryPlanError(Exception):
    """A run that cannot fit into memory; the message says what it needs, what is free, and what would help."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one run by owner."""

    weights: int
    weights_are_mapped: bool  # pages of the checkpoint's own files, which the system can drop and read again
    rope_windows: int
    nope_keys_values: int
    token_ids: int
    activations: int
    unbounded_cache: int  # keys and values if every layer kept all of them
    itemsize: int  # of keys, values and activations

    @classmethod
    def of(cls, config: TextConfig, *, weights: int, weights_are_mapped: bool, prompt_tokens: int, max_new_tokens: int,
           itemsize: int, prefill_chunk_size: int) -> MemoryPlan:
        """`itemsize` is that of keys, values and activations, in bytes."""
        length = prompt_tokens + max_new_tokens
        return cls(
            weights=weights,
            weights_are_mapped=weights_are_mapped,
            rope_windows=sizes.window_bytes(config, length, itemsize),
            nope_keys_values=sizes.nope_bytes(config, length, length, itemsize),
            token_ids=TOKEN_ID_BYTES * prompt_tokens,
            activations=activation_bytes(config, min(prefill_chunk_size, prompt_tokens), itemsize),
            unbounded_cache=sizes.unbounded_bytes(config, length, itemsize),
            itemsize=itemsize,
        )

    @property
    def needed(self) -> int:
        """Bytes that must be free where the model computes on the CPU: everything but mapped weights."""
        weights = 0 if self.weights_are_mapped else self.weights
        return weights + self.rope_windows + self.nope_keys_values + self.token_ids + self.activations

    @property
    def needed_on_accelerator(self) -> int:
        """Bytes of an accelerator's memory, where NoPE keys and values lie in host memory."""
        return self.weights + self.rope_windows + self.activations

    def check(self, available: int | None, largest: Iterable[tuple[str, int]], prompt_tokens: int, *,
              on_accelerator: int | None = None) -> None:
        """Raises MemoryPlanError if the run cannot fit into `available` bytes of host memory (None: not known).

        With `on_accelerator` bytes free on one, weights, windows and activations go there. `largest` are documents
        with their tokens.
        """
        remedies = [f"leave out {source} ({tokens / prompt_tokens:.0%} of the tokens)" for source, tokens in largest]
        if self.itemsize > 2:
            remedies.append("--dtype bfloat16 halves keys and values")
        if on_accelerator is None:
            self._check_one("memory", self.needed, available, [*remedies, "a smaller --prefill-chunk-size"])
            return
        self._check_one("memory", self.nope_keys_values + self.token_ids, available, remedies)
        self._check_one("accelerator memory", self.needed_on_accelerator, on_accelerator,
                        ["a smaller --prefill-chunk-size", "--device cpu"])

    def _check_one(self, tier: str, needed: int, available: int | None, remedies: list[str]) -> None:
        if available is None or needed + MARGIN_BYTES <= available:
            return
        raise MemoryPlanError(
            f"this run needs {human_bytes(needed + MARGIN_BYTES)} of {tier} and {human_bytes(available)} are free "
            f"(keys and values {human_bytes(self.nope_keys_values + self.rope_windows)}, weights "
            f"{human_bytes(0 if self.weights_are_mapped else self.weights)}, activations "
            f"{human_bytes(self.activations)}); what helps: {'; '.join(remedies)}")


@dataclass(frozen=True)
class ProcessMemory:
    """Resident bytes of this process: anonymous (allocated) and file-backed (mapped files, which can be dropped)."""

    anonymous: int
    file_backed: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes predicted, held at the end, and at the peak of a run, by owner."""

    predicted: MemoryPlan
    weights: int
    rope_windows: int
    nope_device: int
    nope_host: int
    token_ids: int
    process: ProcessMemory | None
    process_peak: ProcessMemory | None
    accelerator_peak: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def process_memory() -> ProcessMemory | None:
    """From /proc/self/status; None on systems without it."""
    try:
        with open("/proc/self/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file.read().splitlines())
        anonymous, *files = (int(fields[name].split()[0]) * 1024 for name in (b"RssAnon", b"RssFile", b"RssShmem"))
    except (OSError, KeyError, ValueError):
        return None
    return ProcessMemory(anonymous, sum(files))


class PeakSampler:
    """Samples process memory in the background, as a context manager; `peak` is the largest seen of each kind."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.peak = process_memory()
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sample()

    def sample(self) -> None:
        now = process_memory()
        if now is not None and self.peak is not None:
            self.peak = ProcessMemory(max(self.peak.anonymous, now.anonymous),
                                      max(self.peak.file_backed, now.file_backed))

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self.sample()


def available_memory() -> int | None:
    """Bytes that can still be allocated: what the machine has free, within what the control group leaves."""
    free = [amount for amount in (_machine_available(), *_cgroup_available()) if amount is not None]
    return min(free, default=None)


def _machine_available() -> int | None:
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_available(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What every limit from this process's control group up to the root leaves, in version 2 and in version 1."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in entries:
        if controllers == "":
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if top in (group, *group.parents):
                found.append(_left_in_group(group / limit, group / usage, group / "memory.stat"))
    return [amount for amount in found if amount is not None]


def _left_in_group(limit_file: Path, usage_file: Path, stat_file: Path) -> int | None:
    """The limit less the usage, where file pages that the kernel can drop do not count as used."""
    try:
        limit, usage = int(limit_file.read_text()), int(usage_file.read_text())  # "max" is no integer
        fields = dict(line.split() for line in stat_file.read_text().splitlines() if len(line.split()) == 2)
    except (OSError, ValueError):
        return None
    droppable = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return max(0, limit - usage + droppable)


def give_back_free_memory() -> None:
    """Returns what was freed to the system, where the allocator would keep it: glibc only, elsewhere nothing.

    The activations of a prefill chunk come and go in pieces of all sizes; without this the allocator keeps a share of
    them that differs from run to run.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def human_bytes(count: float) -> str:
    """'17 B', '4.0 KiB', '1.5 GiB'."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"
