"""What a confined process can do: its work, within its limits, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from l4ctx.confinement.process import (
    ENDED,
    LARGE,
    SLOW,
    ChildFailedError,
    Confined,
    LibraryMissingError,
    Limits,
    NoChildError,
    OpenFile,
    RefusedError,
    Reply,
)
from l4ctx.confinement.sandbox import LANDLOCK, SECCOMP
from support.places import ROOT

LIMITS = Limits(memory=1 << 30, seconds=60, processor_seconds=30, reply=1 << 20)
WORK = "support.confined_work"
WITHOUT = {"landlock": "sandbox._landlock = lambda *_: False", "seccomp": "sandbox._libseccomp = lambda: None"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


def command(*lines: str) -> list[str]:
    """Runs these lines before the work."""
    paths = [str(ROOT), str(ROOT / "tests")]
    program = ["import sys", f"sys.path[:0] = {paths}", "from l4ctx.confinement import child, sandbox", *lines]
    return [sys.executable, "-I", "-B", "-c", "\n".join([*program, f"child.main({WORK!r})"])]


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    found = Confined(WORK)
    yield found
    found.end()


def ask(confined: Confined, do: str, argument: object = None, limits: Limits = LIMITS, body: bytes = b"") -> Reply:
    with confined.request({"do": do, "argument": argument}, limits, body) as receive:
        return receive()


def attempt(confined: Confined, do: str, argument: object = None) -> dict[str, Any]:
    header = ask(confined, do, argument).header
    return {key: header[key] for key in ("done", "refused") if key in header}


def test_it_does_its_work_and_is_kept(confined: Confined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "token")
    monkeypatch.setenv("TZ", "UTC")
    confined.end()
    pids = set()
    for body in (b"", b"ab" * 500_000):
        with confined.request({"do": "echo"}, LIMITS, body) as receive:
            assert receive().header == {"first": True}
            last = receive()
        assert last.body == body and set(last.header["environment"]) == {"TZ"}
        assert all(os.path.isabs(path) for path in last.header["path"])
        pids.add(confined.pid)
    assert len(pids) == 1 and os.getsid(pids.pop() or 0) != os.getsid(0)
    (tmp_path / "body").write_bytes(b"xyz" * 999_999)
    with (tmp_path / "body").open("rb") as file, confined.request({"do": "echo"}, LIMITS, OpenFile(file, 9)) as receive:
        assert [receive().body, receive().body] == [b"", b"xyzxyzxyz"]
    with pytest.raises(RefusedError) as refused:
        ask(confined, "refuse")
    assert 100 < len(str(refused.value)) < 5000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_gets_a_process_of_its_own(confined: Confined) -> None:
    assert attempt(confined, "sleep", 0) == {"done": None}
    before = confined.pid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of forking beside threads
        forked = os.fork()
    if forked == 0:
        code = 1
        try:
            code = 0 if attempt(confined, "sleep", 0) == {"done": None} and confined.pid != before else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert attempt(confined, "sleep", 0) == {"done": None} and confined.pid == before


def test_a_body_that_is_cut_off_is_an_error(confined: Confined, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"xyz")
    with (
        (tmp_path / "body").open("rb") as file,
        pytest.raises(OSError, match="only 3 of its 4 bytes"),
        confined.request({"do": "echo"}, LIMITS, OpenFile(file, 4)),
    ):
        pass
    assert attempt(confined, "sleep", 0) == {"done": None}


@pytest.mark.parametrize(
    ("do", "argument", "limits", "why"),
    [
        ("burn", None, {"processor_seconds": 0}, SLOW),
        ("sleep", 60, {"seconds": 0.3}, SLOW),
        ("allocate", 1 << 30, {"memory": 1 << 29}, ENDED),
        ("say", 1 << 21, {}, ENDED),  # more than a header holds
        ("exit", 0, {}, ENDED),
    ],
)
def test_whoever_breaks_a_limit_is_ended(
    confined: Confined, do: str, argument: object, limits: dict[str, Any], why: str
) -> None:
    with pytest.raises(ChildFailedError) as failed:
        ask(confined, do, argument, Limits(**{**vars(LIMITS), **limits}))
    assert failed.value.why == why
    assert attempt(confined, "sleep", 0) == {"done": None}


def test_a_reply_beyond_its_limit_is_not_taken(confined: Confined) -> None:
    limits = Limits(**{**vars(LIMITS), "reply": 99})
    with confined.request({"do": "echo"}, limits, b"x" * 100) as receive:
        receive()
        with pytest.raises(ChildFailedError) as failed:
            receive()
    assert failed.value.why == LARGE


@linux
@pytest.mark.parametrize("without", [(), ("landlock",), ("seccomp",), ("landlock", "seccomp")], ids="-".join)
def test_what_it_cannot_do(without: tuple[str, ...], tmp_path: Path) -> None:
    """By what Landlock, seccomp and the limits refuse, and without an error where a kernel lacks them."""
    file = tmp_path / "file"
    file.write_text("text")
    confined = Confined(WORK)
    confined.command = command(*(WITHOUT[name] for name in without))
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            held = confined.held()
            refused = {
                do: "refused" in attempt(confined, do, argument)
                for do, argument in {
                    "read": "/etc/passwd",
                    "append": str(file),
                    "list": "/",
                    "remove": str(file),
                    "connect": server.getsockname()[1],
                    "socket": None,
                    "fork": None,
                    "execute": "/bin/true",
                    "system": "true",
                    "thread": None,
                    "kill": os.getppid(),
                    "descriptors": None,
                    "import": "turtle",
                }.items()
                if not (do in ("execute", "remove", "fork") and not held)
            }
        finally:
            confined.end()
    assert not set(held) & set(without)
    expected = {"append", "descriptors"}  # by RLIMIT_FSIZE and RLIMIT_NOFILE
    if LANDLOCK in held:
        expected |= {"read", "list", "remove", "execute", "system", "import"}
    if SECCOMP in held:
        expected |= refused.keys()
    assert expected <= {do for do, is_refused in refused.items() if is_refused}
    assert file.read_text() == "text"


@linux
def test_only_named_folders_are_readable(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "font").write_text("curves")
    (tmp_path / "other").write_text("text")
    confined = Confined(WORK)
    confined.command = command(f"import {WORK} as it; it.READABLE = ({str(tmp_path / 'a')!r}, '/no/such/folder')")
    try:
        if LANDLOCK not in confined.held():
            pytest.skip("this kernel has no Landlock")
        assert attempt(confined, "read", str(tmp_path / "a" / "font")) == {"done": "curves"}
        assert attempt(confined, "append", str(tmp_path / "a" / "font")) == {"refused": "PermissionError"}
        assert attempt(confined, "read", str(tmp_path / "other")) == {"refused": "PermissionError"}
    finally:
        confined.end()


def test_an_interruption_comes_at_once(confined: Confined) -> None:
    attempt(confined, "sleep", 0)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(confined, "burn")
    assert time.monotonic() - began < 10
    assert attempt(confined, "sleep", 0) == {"done": None}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_it_ends_with_its_parent() -> None:
    code = (
        f"from l4ctx.confinement.process import Confined\nc = Confined({WORK!r})\nc.held()\nprint(c.pid, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    with subprocess.Popen(
        [sys.executable, "-c", code + "import time; time.sleep(99)"], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().decode().strip() / "stat"
        assert child.exists()
        parent.kill()
    end = time.monotonic() + 20
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_cannot_be_started() -> None:
    for line, message in (
        ("raise SystemExit(1)", "^does not start$"),
        (f"sys.modules[{WORK!r}] = None", "^cannot be started: a library is missing$"),
    ):
        confined = Confined(WORK)
        confined.command = command(line)
        confined.start()
        with pytest.raises(NoChildError, match=message) as error:
            ask(confined, "echo")
        assert isinstance(error.value, LibraryMissingError) == ("missing" in message)
    confined = Confined(WORK)
    confined.command = ("/no such command",)
    confined.start()
    with pytest.raises(NoChildError, match=r"^cannot be started: No such file"):
        ask(confined, "echo")
