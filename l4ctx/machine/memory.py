"""Memory of this process, and free memory and disk space on this machine. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType

from l4ctx.machine.limits import limited_memory

SPARE_SHARE = 1 / 4
"""Share of the free memory that may be spent for speed alone."""


@dataclass(frozen=True)
class ProcessMemory:
    """Resident bytes of a process: anonymous (allocated) and file-backed (mapped files, which can be dropped)."""

    anonymous: int
    file_backed: int

    def most(self, other: ProcessMemory) -> ProcessMemory:
        """The elementwise maximum."""
        return ProcessMemory(max(self.anonymous, other.anonymous), max(self.file_backed, other.file_backed))


def process_memory(process: int | str = "self") -> ProcessMemory | None:
    """Resident memory of this process or another, by PID, from /proc/PID/status; None on systems without it."""
    try:
        with open(f"/proc/{process}/status", "rb") as file:
            return _resident(file.read())
    except (OSError, KeyError, ValueError):
        return None


def _resident(status: bytes) -> ProcessMemory:
    """What a file /proc/PID/status says. Raises KeyError and ValueError."""
    fields = dict(line.split(b":", 1) for line in status.splitlines())
    anonymous, *files = (int(fields[name].split()[0]) * 1024 for name in (b"RssAnon", b"RssFile", b"RssShmem"))
    return ProcessMemory(anonymous, sum(files))


class OwnMemory:
    """This process's memory, read from a file that stays open: a confined process can open none."""

    def __init__(self) -> None:
        self._status: BufferedReader | None = None
        with suppress(OSError):
            self._status = open("/proc/self/status", "rb")  # noqa: SIM115

    def anonymous(self) -> int:
        """Bytes; 0 if unknown."""
        try:
            if self._status is None:
                return 0
            self._status.seek(0)
            return _resident(self._status.read()).anonymous
        except (OSError, KeyError, ValueError):
            return 0


class PeakSampler:
    """Samples process memory in the background while the context is open; `peak` is the maximum of each kind.

    Where no thread can be started, it samples at the beginning and at the end alone.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.peak = process_memory()
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        if self.peak is not None:
            with suppress(RuntimeError, MemoryError):  # can't start new thread
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sample()

    def sample(self) -> None:
        now = process_memory()
        if now is not None and self.peak is not None:
            self.peak = self.peak.most(now)

    def _run(self) -> None:
        with suppress(MemoryError):  # the work itself will report it
            while not self._stop.wait(self._seconds):
                self.sample()


def available_memory() -> int | None:
    """Bytes that can still be allocated: the machine's free memory, limited by what its control groups and this
    process's own limits (`ulimit`) leave."""
    free = [amount for amount in (_machine_available(), *_cgroup_available()) if amount is not None]
    return min([*free, *limited_memory()], default=None)


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
    """Bytes left under each limit from this process's control group up to the root, for cgroup v2 and v1."""
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
    """The limit minus the usage, not counting file pages that the kernel can reclaim."""
    try:
        limit, usage = int(limit_file.read_text()), int(usage_file.read_text())  # "max" raises ValueError: no limit
        fields = dict(line.split() for line in stat_file.read_text().splitlines() if len(line.split()) == 2)
    except (OSError, ValueError):
        return None
    droppable = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return max(0, limit - usage + droppable)


def available_disk(folder: Path) -> int | None:
    """Free disk space in bytes at `folder`, or at its nearest existing parent; None if unknown."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


LARGE_BLOCK_BYTES = 4 * 2**20
"""From so many bytes on, the memory of one of several ranks goes back to the system when it is freed."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def return_large_blocks() -> None:
    """Lets the allocator return large blocks as soon as they are freed. Does nothing without glibc.

    By default it keeps blocks of up to 32 MiB once one was freed: a prefill chunk's activations, of some ten sizes,
    then take up to half as much again as a plan says, once for each rank of a machine. New blocks cost page faults, 5
    to 10 % of the time of reading with a model of width 512, so that one process alone keeps the default.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        option(_TRIM_THRESHOLD, 2 * LARGE_BLOCK_BYTES)


def give_back_free_memory() -> None:
    """Returns freed memory that the allocator has kept to the system. Does nothing without glibc.

    A prefill chunk's activations are allocated and freed in all sizes; without this, the allocator keeps a share of
    them that varies from run to run.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
