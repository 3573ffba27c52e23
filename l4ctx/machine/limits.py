"""Limits that the system sets for this process, as with `ulimit`, and what is left of them. Imports no torch."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path

from l4ctx.errors import LimitError
from l4ctx.formatting import human_bytes

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
FEWEST_FILES = 16
"""Open files, below which PyTorch fails at random places."""

SMALLEST_STACK = 256 * 2**10
"""Bytes of a thread's stack; with 64 KiB, importing PyTorch ends the process."""

BESIDE_LIBRARIES = 192 * 2**20
"""Bytes of address space that importing torch takes beside its own libraries: Python's modules, others' libraries. Of
data, which RLIMIT_DATA limits, it takes somewhat more."""


def soft_limit(name: str) -> int | None:
    """A limit such as "RLIMIT_AS"; None where there is none."""
    number = getattr(resource, name, None)
    if number is None:
        return None
    limit = resource.getrlimit(number)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def address_space_left() -> int | None:
    """Bytes that RLIMIT_AS, `ulimit -v`, leaves. Mapped files count as well as allocated memory. None: no limit."""
    return _left("RLIMIT_AS", "VmSize")


def limited_memory() -> list[int]:
    """Bytes that may still be allocated under each limit: of address space, of data, and of resident memory."""
    limits = (address_space_left(), _left("RLIMIT_DATA", "VmData"), _left("RLIMIT_RSS", "VmRSS"))
    return [left for left in limits if left is not None]


def largest_file() -> int | None:
    """The most bytes of a file that RLIMIT_FSIZE, `ulimit -f`, lets this process write. None: no limit."""
    return soft_limit("RLIMIT_FSIZE")


def _left(limit: str, used: str) -> int | None:
    most = soft_limit(limit)
    if most is None:
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return most
    now = next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{used}:")), 0)
    return max(0, most - now)


def check_room_for_torch(*, is_loaded: bool) -> None:
    """Raises LimitError if RLIMIT_NOFILE, RLIMIT_STACK, RLIMIT_DATA or RLIMIT_AS is too low for torch: libraries that
    do not fit into the address space end the process."""
    files = soft_limit("RLIMIT_NOFILE")
    if files is not None and files < FEWEST_FILES:
        raise LimitError(f"the limit of open files (ulimit -n) is {files}; raise it, to {FEWEST_FILES} at least")
    stack = soft_limit("RLIMIT_STACK")
    if stack is not None and stack < SMALLEST_STACK:
        raise LimitError(
            f"the limit of a stack (ulimit -s) is {human_bytes(stack)}; raise it, to {human_bytes(SMALLEST_STACK)} "
            "at least"
        )
    data = None if is_loaded else _left("RLIMIT_DATA", "VmData")
    if data is not None and data < BESIDE_LIBRARIES:
        raise LimitError(
            f"the limit of data (ulimit -d) leaves {human_bytes(data)}, but importing PyTorch takes "
            f"{human_bytes(BESIDE_LIBRARIES)}; raise the limit"
        )
    left = None if is_loaded else address_space_left()
    spec = find_spec("torch") if left is not None else None
    if left is None or spec is None:
        return
    folders = [Path(folder) / "lib" for folder in spec.submodule_search_locations or ()]
    libraries = sum(file.stat().st_size for folder in folders for name in LIBRARIES if (file := folder / name).exists())
    if (needed := libraries + BESIDE_LIBRARIES) > left:
        raise LimitError(
            f"the limit of address space (ulimit -v) leaves {human_bytes(left)}, but PyTorch's libraries take "
            f"{human_bytes(needed)}; raise the limit"
        )


def startable_threads(wanted: int) -> int:
    """How many of the wanted threads this process may have at a time, by trying; the calling one counts.

    A limit of processes (`ulimit -u`) or of a control group allows fewer. OpenMP ends the process at the first thread
    that it cannot start.
    """
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(wanted - 1):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:  # can't start new thread
        pass
    finally:
        enough.set()
        for thread in started:
            thread.join()
    return 1 + len(started)
