"""The shim in Python: compiles it, and arms it in a fork of the command. `shim.c` says what it sees.

`begin` and `report` are the hooks of `support.fork_server.Run`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import snapshots

SOURCE = Path(__file__).with_name("shim.c")

ACTIONS = {"fail": 1, "half": 2, "none": 3, "after": 4, "signal": 5}

# What may go wrong in each kind of call: errors, "half" (fewer bytes than asked for), "none" (the end of the file),
# "after E" (done, and reported as failed, as a network file system may).
_STATUS = ["EIO", "EACCES", "ENOENT", "ESTALE", "ENOMEM"]
_READ = ["EIO", "EINTR", "half", "ESTALE", "ENOMEM", "none"]
_WRITE = ["ENOSPC", "EDQUOT", "EIO", "EINTR", "EFBIG", "half"]
_NAMES = ["EIO", "EACCES", "ENOENT", "ENOSPC", "EDQUOT", "EROFS"]
_NEW = ["EACCES", "EIO", "EMFILE", "ENOSPC", "EDQUOT", "EROFS"]
FAULTS: dict[str, list[str]] = {
    "open": ["EIO", "EACCES", "ENOENT", "EMFILE", "ENOMEM", "EINTR", "ESTALE"],
    "open-write": _NEW,
    "open-create": _NEW,
    "open-temporary": [*_NEW, "EOPNOTSUPP"],
    "close": ["EIO", "EINTR"],
    "read": _READ,
    "pread": _READ,
    "readv": _READ,
    "preadv": _READ,
    "write": _WRITE,
    "pwrite": _WRITE,
    "writev": _WRITE,
    "fsync": ["EIO", "ENOSPC", "EDQUOT", "EINVAL", "EINTR"],
    "fdatasync": ["EIO", "ENOSPC", "EDQUOT", "EINVAL", "EINTR"],
    "ftruncate": ["EIO", "EINTR", "EPERM"],
    "truncate": ["EIO", "EACCES", "EINTR"],
    "fallocate": ["ENOSPC", "EOPNOTSUPP", "EIO", "EINTR"],
    "rename": [*_NAMES, "after EIO"],
    "link": [*_NAMES, "EEXIST", "EPERM"],
    "symlink": [*_NAMES, "EEXIST"],
    "unlink": ["EIO", "EACCES", "ENOENT", "EROFS", "EBUSY", "after EIO"],
    "rmdir": ["EIO", "EACCES", "ENOTEMPTY", "EROFS"],
    "mkdir": [*_NAMES, "after EIO"],
    "stat": _STATUS,
    "lstat": _STATUS,
    "fstat": ["EIO", "ESTALE", "ENOMEM"],
    "access": ["EIO", "EACCES", "EROFS"],
    "readlink": ["EIO", "EACCES", "ENOMEM"],
    "chmod": ["EIO", "EPERM", "EROFS"],
    "fchmod": ["EIO", "EPERM", "EROFS"],
    "utimensat": ["EIO", "EPERM", "EROFS"],
    "futimens": ["EIO", "EPERM", "EROFS"],
    "flock": ["EINTR", "EAGAIN", "ENOLCK", "EIO"],
    "fcntl-lock": ["EINTR", "EAGAIN", "ENOLCK", "EIO"],
    "statvfs": ["EIO", "EACCES", "ENOENT", "ENOSYS"],
    "fstatvfs": ["EIO", "ENOSYS"],
    "copy_file_range": ["EIO", "ENOSPC", "EXDEV"],
    "sendfile": ["EIO", "EAGAIN", "ENOSPC"],
    "getcwd": ["ENOENT", "EACCES", "ENOMEM"],
    "opendir": ["EIO", "EACCES", "ENOENT", "EMFILE", "ENOMEM", "ESTALE"],
    "readdir": ["EIO", "ENOENT", "ESTALE", "EINTR"],
    "mmap": ["ENOMEM", "EACCES", "ENODEV"],
    "pthread_create": ["EAGAIN"],
}


@dataclass(frozen=True, order=True)
class Fault:
    """The `nth` call of `point` ("CALL LABEL/PATH") ends in `kind`: one of FAULTS, or a signal, "signal SIGHUP"."""

    point: str
    nth: int
    kind: str


def compile_shim(folder: Path) -> Path | str:
    """The shim as a library in `folder`, or why there is none."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "the shim needs Linux and glibc"
    if compiler is None:
        return "no C compiler (cc)"
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-w", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return library if done.returncode == 0 else f"the shim does not compile: {done.stderr[:500]}"


def required_shim(folder: Path) -> Path:
    """The same. Raises SystemExit where there is none."""
    library = compile_shim(folder)
    if isinstance(library, str):
        raise SystemExit(library)
    return library


def _library() -> Any:
    """Of this process, which was started with the shim."""
    library = ctypes.CDLL(None)
    library.fault_seed.argtypes = [ctypes.c_ulong]
    return library


def begin(argument: dict[str, Any]) -> None:
    """Counts and fails from here on. `argument`: "roots" by label, and perhaps "fault", "log" (a path), "seed", and
    "at_first": take a snapshot before, too."""
    from cache import layout

    layout.MIN_BLOCK_BYTES = layout.MIN_SEGMENT_BYTES = layout.MIN_SEGMENT_TOKENS = 1  # blocks of one attention chunk
    library, log = _library(), argument.get("log")
    if argument.get("at_first"):
        argument["first"] = snapshots.context(Path(argument["state"]) / "ctx")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) if log else -1
    lines = "\n".join(f"{label}={path}" for label, path in argument["roots"].items())
    library.fault_start(lines.encode(), descriptor)
    library.fault_seed(argument.get("seed", 0))
    if fault := argument.get("fault"):
        point, nth, kind = fault
        action = kind.split()[0] if kind.split()[0] in ACTIONS else "fail"
        number = getattr(signal if action == "signal" else errno, kind.split()[-1], 0)
        library.fault_arm(point.encode(), nth, ACTIONS[action], number)


def report(argument: dict[str, Any]) -> dict[str, Any]:
    """Stops counting; what was counted, whether the fault came, and what the folder "state" holds now."""
    library = _library()
    library.fault_stop()
    told: dict[str, Any] = {"fired": bool(library.fault_fired()), "first": argument.get("first")}
    if argument.get("points"):
        with open(argument["points"], "wb") as file:
            library.fault_points(file.fileno())
    if state := argument.get("state"):
        told |= {"tree": snapshots.tree(Path(state)), "context": snapshots.context(Path(state) / "ctx")}
        told["files"] = snapshots.tree(Path(state), without="ctx")
    return told
