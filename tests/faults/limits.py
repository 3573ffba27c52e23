"""Runs commands under limits of the system, on disks without room and without permissions, and judges what they leave.

    python tests/faults/limits.py [--operations prefill,ask] [--kinds limit,disk,user]

Each run must end in the right answer or in one clear line. The same command afterwards, without the limit, must leave
what an undisturbed run leaves.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for samples
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for support and faults

from faults import shim
from faults.operations import BY_NAME, OPERATIONS, WARM_UP, Operation, Place
from faults.walk import CODES, NOISE, Verdict, Walk, kind_of
from support.fork_server import ROOT, Ended, Run

KIB, MIB = 2**10, 2**20
NOBODY = 65534
USED = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}
"""Limits that are counted from what the process has when the command begins."""

PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Condition:
    """What a run meets: soft limits, a disk of its own in place of the folder `state`, or permissions.

    `disk` is what there is beside what the state takes: bytes of "size" or "nr_inodes", or "ro". `modes` are
    permissions by path. `user` runs the command.
    """

    name: str
    limits: dict[str, int] = field(default_factory=dict)
    disk: tuple[str, int] | None = None
    modes: dict[str, int] = field(default_factory=dict)
    user: int | None = None


def _limits(name: str, *values: int, user: int | None = None) -> list[Condition]:
    who = "" if user is None else ", an ordinary user"
    return [Condition(f"{name} {value}{who}", {name: value}, user=user) for value in values]


LIMITS = [
    *_limits("RLIMIT_AS", *(mib * MIB for mib in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 3000))),
    *_limits("RLIMIT_DATA", *(mib * MIB for mib in (0, 4, 64, 256, 3000))),
    *_limits("RLIMIT_NOFILE", 4, 5, 6, 7, 8, 10, 12, 16, 18, 20, 24, 32, 64, 256),
    *_limits("RLIMIT_FSIZE", 0, 1, 100, 500, 1000, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 64 * MIB),
    *_limits("RLIMIT_STACK", MIB, 8 * MIB),
]
DISKS = [
    *(Condition(f"{size >> 10} KiB of room", disk=("size", size)) for size in (0, 4096, 16384, 65536, 2**18, 2**20)),
    *(Condition(f"room for {count} names", disk=("nr_inodes", count)) for count in (0, 1, 2, 3, 4, 5, 6, 8)),
    Condition("a read-only disk", disk=("ro", 0)),
]
MODES = {
    "docs": (0o000, 0o300, 0o600),
    "docs/sub": (0o000, 0o300, 0o600),
    "docs/a.md": (0o000,),
    "questions.txt": (0o000,),
    "model": (0o000, 0o300, 0o600),
    "model/config.json": (0o000,),
    "model/tokenizer.json": (0o000,),
    "model/model-00001-of-00002.safetensors": (0o000,),
    "state": (0o000, 0o300, 0o500, 0o600),
    "state/ctx": (0o000, 0o300, 0o500, 0o600),
    "state/ctx/blocks": (0o000, 0o300, 0o500, 0o600),
    "state/ctx/journal": (0o000, 0o400),
    "state/ctx/manifest.json": (0o000,),
    "state/answers": (0o000, 0o400),
}
USERS = [
    Condition("an ordinary user", user=NOBODY),
    *_limits("RLIMIT_NPROC", 1, 2, 3, 5, user=NOBODY),
    *_limits("RLIMIT_AS", 64 * MIB, 3000 * MIB, user=NOBODY),
    *_limits("RLIMIT_NOFILE", 16, 24, 256, user=NOBODY),
    *_limits("RLIMIT_FSIZE", 0, 16 * KIB, user=NOBODY),
    *(
        Condition(f"{path} with {mode:03o}", modes={path: mode}, user=NOBODY)
        for path, modes in MODES.items()
        for mode in modes
    ),
]
KINDS = {"limit": LIMITS, "disk": DISKS, "user": USERS}


def begin(argument: dict[str, Any]) -> None:
    """The hook in the fork: limits, from what the process has already."""
    shim.begin(argument)
    if os.geteuid() != os.getuid() or os.geteuid() == NOBODY:
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # else /proc/self is root's after a change of user
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    used = {name: int(line.split()[1]) * KIB for line in lines for name, key in USED.items() if line.startswith(key)}
    for name, value in argument["limits"].items():
        number = getattr(resource, name)
        resource.setrlimit(number, (used.get(name, 0) + value, resource.getrlimit(number)[1]))


def lift(argument: dict[str, Any]) -> None:
    """The hook after the command."""
    for name in argument["limits"]:
        number = getattr(resource, name)
        resource.setrlimit(number, (resource.getrlimit(number)[1],) * 2)


def import_all(argument: dict[str, Any]) -> None:
    """The hook of a run that the fork server learns from: an ordinary user may not be able to import anything."""
    import importlib
    import pkgutil

    import l4ctx

    for name in ("glob", "shlex", "difflib", "traceback", "subprocess", "encodings.idna"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(l4ctx.__path__, "l4ctx."):
        if ".bench" not in module.name and not module.name.endswith(("__main__", ".child", "pdf_worker")):
            importlib.import_module(module.name)


class Limits:
    """Conditions on the operations of a place, in a folder that every user can reach."""

    def __init__(self, top: Path, library: Path) -> None:
        self.place = Place(top / "place", library, WARM_UP)
        self.place.server.learn(
            Run(["plan", "docs"], str(self.place.top), before="faults.limits:import_all", argument={})
        )
        self.walk = Walk(self.place)

    def close(self) -> None:
        self.place.close()

    def attempt(self, operation: Operation, condition: Condition) -> Verdict:
        """Tries one; "absent" where the path is not there whose permissions it changes."""
        base = self.walk.base(operation)
        self.place.put_back(operation.start)
        if not all((self.place.top / path).exists() for path in condition.modes):
            return Verdict("absent")
        with self._under(condition) as lift:
            ended = self.place.run(
                operation.arguments,
                hooks={"before": "faults.limits:begin", "after": "faults.limits:lift"},
                pipes=True,
                limits=condition.limits,
                seed=2,
            )
            ended = replace(ended, told={**self.place.snapshot(), "fired": True})
            if operation.name == "plan" and condition.limits and ended.code in CODES and ended.stdout:
                why = "" if not NOISE.search(ended.stderr) else kind_of(ended.stderr)  # it tells what fits
            else:
                why = self.walk.wrong(operation, base, ended, lift)
        if why:
            return Verdict("bad", why, ended.code, f"{ended.stdout[-400:]}\n---\n{ended.stderr[-900:]}")
        line = (ended.stderr.splitlines() or [""])[-1]
        return Verdict("line" if ended.code else "answer", "", ended.code, line)

    def kill(self, operation: Operation, fault: shim.Fault) -> Verdict:
        """A signal at a point must end the run and leave what the same command goes on from."""
        base = self.walk.base(operation)
        self.place.put_back(operation.start)
        ended = self.place.run(
            operation.arguments, hooks={"after": None}, fault=[fault.point, fault.nth, fault.kind], seed=2
        )
        if ended.code is None or ended.code >= 0 or NOISE.search(ended.stderr):
            return Verdict("bad", f"exit code {ended.code}", ended.code, ended.stderr[-900:])
        why = self.walk.wrong_state(operation, base, replace(ended, told=self.place.snapshot()))
        return Verdict("bad" if why else "line", why, ended.code)

    @contextmanager
    def _under(self, condition: Condition) -> Iterator[Callable[[], None]]:
        """Yields what takes it away again before the with block ends, for another run."""
        top, modes = self.place.top, {}
        if condition.user is not None:
            self._give(condition.user)
        try:
            self.place.user = condition.user
            if condition.disk is not None:
                with small_disk(self.place.state, *condition.disk) as lift:
                    yield lift
                return
            for path, mode in condition.modes.items():
                modes[top / path] = (top / path).stat().st_mode & 0o7777
                (top / path).chmod(mode)

            def allow() -> None:
                for path, mode in modes.items():
                    path.chmod(mode)

            yield allow
        finally:
            for path, mode in modes.items():
                if path.exists():
                    path.chmod(mode)
            self.place.user = None
            self.place.forget()

    def _give(self, user: int) -> None:
        for name in ("model", "docs", "more.md", "other", "questions.txt", "state"):
            for path in (self.place.top / name, *(self.place.top / name).rglob("*")):
                os.chown(path, user, user)
        os.chown(self.place.top, user, user)


@contextmanager
def small_disk(folder: Path, what: str, room: int) -> Iterator[Callable[[], None]]:
    """A disk of its own in place of a folder, which takes so much more than what is in it. Yields what ends that."""
    copy = folder.with_name("before")
    shutil.copytree(folder, copy)
    mount("-t", "tmpfs", "-o", "size=64m,nr_inodes=10000,mode=0700", "tmpfs", str(folder))
    try:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        shutil.rmtree(copy)
        now = os.statvfs(folder)
        used = {"size": (now.f_blocks - now.f_bfree) * now.f_frsize, "nr_inodes": now.f_files - now.f_ffree}
        mount("-o", f"remount,{f'{what}={max(1, used[what] + room)}' if what in used else what}", str(folder))
        yield lambda: mount("-o", "remount,rw,size=64m,nr_inodes=10000", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


def why_no_disks(folder: Path) -> str:
    """Why there cannot be disks to mount; empty where there can."""
    folder.mkdir()
    try:
        with small_disk(folder, "ro", 0):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"tmpfs cannot be mounted: {getattr(error, 'stderr', '') or error}"
    finally:
        shutil.rmtree(folder)


@contextmanager
def reachable_folder() -> Iterator[Path]:
    """A new one, in memory where there is such a disk, which other users can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="l4ctx-limits-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        folder.chmod(0o711)
        yield folder.resolve()
    finally:
        shutil.rmtree(folder)


def run_limited(ulimit: str, *arguments: str, folder: Path, seconds: float = 120) -> Ended:
    """The command as a process of its own under limits that a shell sets, such as "-n 20"."""
    command = [sys.executable, "-P", "-c", "from l4ctx.cli.app import main; main()", *arguments]
    began = time.monotonic()
    done = subprocess.run(
        ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", default=",".join(BY_NAME))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", default="", help="words that a condition's name has")
    arguments = parser.parse_args()
    began, outcomes = time.monotonic(), Counter[str]()
    with reachable_folder() as top:
        limits = Limits(top, shim.required_shim(top))
        try:
            for operation in OPERATIONS:
                if operation.name not in arguments.operations.split(","):
                    continue
                for kind in arguments.kinds.split(","):
                    for condition in KINDS[kind]:
                        if arguments.only not in condition.name:
                            continue
                        verdict = limits.attempt(operation, condition)
                        outcomes[f"{kind} {verdict.outcome}"] += 1
                        print(verdict.outcome, operation.name, f"[{condition.name}]", verdict.code, verdict.line or "")
                        if verdict.why:
                            print("    ", verdict.why, flush=True)
        finally:
            limits.close()
    print(f"{outcomes.total():,} runs in {time.monotonic() - began:.0f} s: {dict(sorted(outcomes.items()))}")


if __name__ == "__main__":
    main()
