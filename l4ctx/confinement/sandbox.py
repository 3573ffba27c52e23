"""Takes from this process what its work does not need: memory, processor time, files, sockets, processes, environment.

Limits of resources hold on every POSIX system. On Linux, Landlock (by its system calls, from 5.13 on) and seccomp (by
libseccomp, where that is installed) come on top; what a kernel lacks is left out.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

MOST_FILES = 32  # open at once

LANDLOCK, SECCOMP = MEANS = "landlock", "seccomp"

_NO_NEW_PRIVILEGES = 38  # prctl's PR_SET_NO_NEW_PRIVS
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
_VERSION = 1  # a flag: asks for the version of the interface
_PATH_BENEATH = 1
_EXECUTE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many bits each version of the interface knows
_TCP = 0b11  # binding and connecting, from version 4 on
_SCOPES = 0b11  # abstract sockets and signals of processes outside, from version 6 on

_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM)
_ALL_THREADS = 4  # SCMP_FLTATR_CTL_TSYNC
_REFUSED_CALLS = (
    # processes and programs
    *("fork", "vfork", "clone", "clone3", "execve", "execveat", "kill", "tkill", "pidfd_open", "pidfd_getfd"),
    *(
        "pidfd_send_signal",
        "rt_sigqueueinfo",
        "rt_tgsigqueueinfo",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "kcmp",
        "unshare",
        "setns",
    ),
    # the network, and other ways to reach another process
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg", "sendmmsg"),
    *("shmget", "shmat", "msgget", "semget", "mq_open", "keyctl", "add_key", "request_key"),
    # the file system, but for opening to read
    *("creat", "mkdir", "mkdirat", "mknod", "mknodat", "unlink", "unlinkat", "rmdir", "rename", "renameat"),
    *("renameat2", "link", "linkat", "symlink", "symlinkat", "truncate", "chmod", "fchmodat", "chown", "lchown"),
    *("fchownat", "utime", "utimes", "utimensat", "setxattr", "lsetxattr", "removexattr", "lremovexattr", "chroot"),
    *("mount", "umount2", "pivot_root", "open_by_handle_at", "name_to_handle_at", "open_tree", "move_mount"),
    # calls that act in place of others, and parts of the kernel that nothing here needs
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "perf_event_open", "userfaultfd", "personality"),
    *("quotactl", "swapon", "swapoff", "reboot", "init_module", "finit_module", "delete_module", "kexec_load"),
)
_OPENING_CALLS = ("open", "openat", "openat2")
_STARTING_CALLS = frozenset({"execve", "clone"})  # a program that is to run needs them: its own start, and threads
_CLONE_THREAD = 0x10000
_MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ


def confine(readable: Iterable[str], then: Callable[[], None]) -> list[str]:
    """Confines this process, which cannot be undone; returns which of LANDLOCK and SECCOMP hold.

    From then on only what is below the folders `readable` can be opened, for reading, and no thread can be started but
    by `then`, which is called once files are closed off.
    """
    _be_the_first_to_go()
    for name in os.environ.keys() - {"TZ"}:  # dates are formatted by it
        del os.environ[name]
    _limit(("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", MOST_FILES))
    folders = [folder for folder in readable if os.path.isdir(folder)]
    if sys.platform != "linux":
        then()
        return []
    libc, library = ctypes.CDLL(None, use_errno=True), _libseccomp()
    held = []
    rights = dict.fromkeys(folders, _READ_FILE | _READ_FOLDER)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and _landlock(libc, rights):
        held.append(LANDLOCK)
    then()
    _limit(("RLIMIT_NPROC", 0))
    if library is not None and _seccomp(library, (*_REFUSED_CALLS, *(() if folders else _OPENING_CALLS))):
        held.append(SECCOMP)
    return held


def confine_program(program: str, readable: Iterable[str]) -> list[str]:
    """Confines this process, which is to become `program`, a statically linked one; returns what holds, see `confine`.

    From then on nothing can be opened but the files `readable`, for reading; nothing can be executed but `program`; and
    no process can be started, only threads. Of these three, Landlock holds the first two, and seccomp the third.
    """
    _be_the_first_to_go()
    _limit(("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", MOST_FILES))
    if sys.platform != "linux":
        return []
    libc, library = ctypes.CDLL(None, use_errno=True), _libseccomp()
    held = []
    rights = {program: _EXECUTE | _READ_FILE} | dict.fromkeys(readable, _READ_FILE)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and _landlock(libc, rights):
        held.append(LANDLOCK)
    refused = [name for name in _REFUSED_CALLS if name not in _STARTING_CALLS]
    if library is not None and _seccomp(library, refused, only_threads=True):
        held.append(SECCOMP)
    return held


def limit_memory(count: int) -> None:
    """Limits the address space from now on, in bytes. A lower limit set by the user stays."""
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (count if most == resource.RLIM_INFINITY else min(count, most), most))


def limit_processor_time(seconds: float) -> None:
    """Ends the process by SIGXCPU after so many seconds of processor time from now on, and less than a second more."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    count = int(used.ru_utime + used.ru_stime + seconds) + 1
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (count if most == resource.RLIM_INFINITY else min(count, most), most))


def _be_the_first_to_go() -> None:
    """Where the machine's memory ends, Linux ends this process rather than its parent."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _limit(*limits: tuple[str, int]) -> None:
    """Sets limits for good; where this system lacks one, it is left out."""
    for name, count in limits:
        kind = getattr(resource, name, None)
        if kind is not None:
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (count, count))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


class _Comparison(ctypes.Structure):
    """Of a system call's argument."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def _landlock(libc: ctypes.CDLL, allowed: Mapping[str, int]) -> bool:
    """Closes the file system off, but for these rights by path, and TCP; returns whether it is closed off."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    if version < 1:
        return False
    rights = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    rules = _Ruleset(rights, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 * (1 if version < 4 else 2 if version < 6 else 3)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        for path, allowed_there in allowed.items():
            _allow(libc, ruleset, path, allowed_there)
        return bool(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    with suppress(OSError):  # it vanished, or is not for this user
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = _PathBeneath(rights, descriptor)
            libc.syscall(
                _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0)
            )
        finally:
            os.close(descriptor)


def _libseccomp() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None


def _seccomp(library: ctypes.CDLL, refused: Iterable[str], *, only_threads: bool = False) -> bool:
    """Refuses these calls, in all threads; returns whether they are refused. `only_threads`: also clone, but for those.

    A list of what is refused, not of what is allowed: what Python, its allocator and pdfium call differs by version,
    and a call that is missing from a list would break sound work.
    """
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if not context:
        return False
    try:
        for name in refused:
            _refuse(library, context, name)
        if only_threads:
            _refuse(library, context, "clone", _Comparison(0, _MASKED_EQUAL, _CLONE_THREAD, 0))
        library.seccomp_attr_set(context, ctypes.c_int(_ALL_THREADS), ctypes.c_uint32(1))
        return bool(library.seccomp_load(context) == 0)
    finally:
        library.seccomp_release(context)


def _refuse(library: ctypes.CDLL, context: ctypes.c_void_p, name: str, comparison: _Comparison | None = None) -> None:
    number = ctypes.c_int(library.seccomp_syscall_resolve_name(name.encode()))
    if number.value >= 0:  # else this architecture, or the library, does not know it
        count, compared = (0, None) if comparison is None else (1, ctypes.byref(comparison))
        library.seccomp_rule_add_array(context, ctypes.c_uint32(_REFUSE), number, ctypes.c_uint(count), compared)
