"""The parent's side of confined processes: started when first needed, kept for the next request, killed if they hang.

What a process crashes on, runs out of memory or never ends with costs that process and nothing more. What runs in it is
`l4ctx.confinement.child`.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from l4ctx.confinement.work import FRAME, MOST_HEADER, packed
from l4ctx.machine.memory import process_memory

START_SECONDS = 60.0

_COMMAND = (sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c")  # nothing from the environment or the current folder
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from l4ctx.confinement.child import main; main(sys.argv[1])"
_KEPT_VARIABLES = (
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
)  # what starts an interpreter, and the time
_PIECE = 1 << 20  # bytes of a file that are held at once while it is sent


class ConfinementError(Exception):
    """A confined process did not do its work; the message says why in one line."""


class NoChildError(ConfinementError):
    """The process cannot be started."""


class LibraryMissingError(NoChildError):
    """What the work takes is not installed."""


class RefusedError(ConfinementError):
    """The process refused a request."""


class ChildFailedError(ConfinementError):
    """The process was too slow, said too much or ended; it is gone.

    `why` is one of ENDED, SLOW and LARGE. `try_again`: it ended, and had served other requests, which may have caused
    it; a fresh one may succeed.
    """

    def __init__(self, why: str, *, try_again: bool = False) -> None:
        super().__init__(f"the process {why}")
        self.why, self.try_again = why, try_again


ENDED, SLOW, LARGE = "ended", "takes too long", "says too much"


@dataclass(frozen=True)
class Limits:
    """What a request may take, in bytes and seconds; both kinds of seconds are counted anew after each reply."""

    memory: int
    seconds: float
    processor_seconds: float
    reply: int
    left: int = 64 << 20
    """Bytes that the process may still hold afterwards, beside those that it says to keep; else it is ended."""


@dataclass(frozen=True)
class Reply:
    """One message from the process."""

    header: dict[str, Any]
    body: bytearray


@dataclass(frozen=True)
class OpenFile:
    """A file whose bytes are a request's body, from its current position on."""

    file: BinaryIO | io.FileIO
    size: int


Body = bytes | OpenFile


class Confined:
    """A process for one kind of work, the function `work()` of a module (see `l4ctx.confinement.work`)."""

    def __init__(self, module: str) -> None:
        self.command: Sequence[str] = ()  # another one, in tests
        self._module = module
        self._one_at_a_time = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that was started last; None where none was."""
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Starts it without waiting for it; where that fails, the first request says why."""
        with suppress(NoChildError), self._one_at_a_time:
            self._started()

    def end(self) -> None:
        if self._child is not None:
            self._child.end()

    def held(self) -> list[str]:
        """What of Linux confines it, beside limits: see `l4ctx.confinement.sandbox.confine`. Raises NoChildError."""
        with self._one_at_a_time:
            child = self._started()
            child.await_greeting()
            return child.held

    @contextmanager
    def request(self, header: dict[str, Any], limits: Limits, body: Body = b"") -> Iterator[Callable[[], Reply]]:
        """Asks the process; yields a function that awaits the next reply. One thread at a time.

        The body is sent only if the work asks for it. Who leaves before the last reply, by an exception or not, ends
        the process. Raises NoChildError; RefusedError and ChildFailedError, as does the function; and OSError where the
        body is a file that ends early or cannot be read.
        """
        with self._one_at_a_time:
            child = self._started()
            try:
                child.await_greeting()
                child.ask(header, limits, body)
                yield lambda: child.receive(limits)
            finally:
                if not (child.is_idle and child.is_small(limits.left)):
                    self.end()

    def _started(self) -> _Child:
        if self._child is None or not self._child.is_alive():
            self.end()
            self._child = _Child(self.command or isolated_command(_PROGRAM, self._module))
        return self._child


class _Child:
    """A running process and the pipes to and from it. Ends with this object or with the interpreter."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises NoChildError."""
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
                | {"LC_CTYPE": "C.UTF-8"},
            )  # gets no Ctrl-C
        except OSError as error:
            raise NoChildError(f"cannot be started: {error.strerror}") from None
        self._parent = os.getpid()
        self.end = weakref.finalize(self, _end, self.process)
        self.held: list[str] = []
        self.is_idle = False  # and not between a request and its last reply
        self._is_greeted = False
        self._requests = 0
        self._kept = 0  # bytes that it keeps for the next request
        assert self.process.stdin is not None and isinstance(self.process.stdout, io.FileIO)
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._poll = select.poll() if hasattr(select, "poll") else None  # without: waits as long as it takes
        if self._poll is not None:
            self._poll.register(self._stdout, select.POLLIN)

    def await_greeting(self) -> None:
        """Raises NoChildError."""
        if self._is_greeted:
            return
        try:
            hello = self.receive(Limits(0, START_SECONDS, 0, 0)).header
        except RefusedError as error:
            raise NoChildError(f"cannot be started: {error}") from None
        except ChildFailedError:
            raise NoChildError("does not start") from None
        if "missing" in hello:
            raise LibraryMissingError("cannot be started: a library is missing")
        self.held = hello.get("held", [])
        self._is_greeted = self.is_idle = True

    def is_alive(self) -> bool:
        """Whether it serves this process: after a fork, its pipes are still the parent's."""
        return self._parent == os.getpid() and self.end.alive and self.process.poll() is None

    def is_small(self, left: int) -> bool:
        held = process_memory(self.process.pid)
        return held is None or held.anonymous <= left + self._kept

    def ask(self, header: dict[str, Any], limits: Limits, body: Body) -> None:
        """A request; until it has the body, it waits as long as that takes. Raises as `receive` does, and OSError."""
        self._requests += 1
        self.is_idle = False
        count = len(body) if isinstance(body, bytes) else body.size
        bounds = {"memory": limits.memory, "processor_seconds": limits.processor_seconds}
        self._send(packed(header | bounds, count))
        if "wanted" in self.receive(limits, waits=False).header:
            self._send_body(body)
            self.receive(limits, waits=False)

    def _send_body(self, body: Body) -> None:
        if isinstance(body, bytes):
            self._send(body)
            return
        left = body.size
        while left:
            piece = body.file.read(min(left, _PIECE))
            if not piece:
                raise OSError(0, f"only {body.size - left:,} of its {body.size:,} bytes could be read")
            self._send(piece)
            left -= len(piece)

    def _send(self, raw: bytes) -> None:
        left = memoryview(raw)
        try:
            while left:
                left = left[self._stdin.write(left) :]
        except BrokenPipeError:
            raise self._failed() from None

    def receive(self, limits: Limits, *, waits: bool = True) -> Reply:
        """The next reply, within the limits. Raises RefusedError and ChildFailedError."""
        deadline = time.monotonic() + limits.seconds if waits else None
        try:
            header_bytes, body_bytes = FRAME.unpack(self._next(FRAME.size, deadline))
            if header_bytes > MOST_HEADER:
                raise ValueError
            header = json.loads(self._next(header_bytes, deadline))
            if body_bytes > limits.reply:
                raise ChildFailedError(LARGE)
            body = self._next(body_bytes, deadline)
            self.is_idle = "last" in header
            self._kept = int(header.get("kept", self._kept))
        except TimeoutError:
            raise ChildFailedError(SLOW) from None
        except (ValueError, TypeError, AttributeError):  # it is no longer itself
            raise ChildFailedError(ENDED) from None
        if "error" in header:
            raise RefusedError(str(header["error"]))
        return Reply(header, body)

    def _next(self, count: int, deadline: float | None) -> bytearray:
        """Exactly so many bytes. Raises TimeoutError and ChildFailedError."""
        taken = bytearray(count)
        left = memoryview(taken)
        while left:
            wait = None if deadline is None else 1000 * max(0.0, deadline - time.monotonic())
            if self._poll is not None and not self._poll.poll(wait):
                raise TimeoutError
            received = self._stdout.readinto(left)
            if not received:
                raise self._failed()
            left = left[received:]
        return taken

    def _failed(self) -> ChildFailedError:
        """What to raise once it has closed its pipes."""
        with suppress(subprocess.TimeoutExpired):
            if self.process.wait(1) == -getattr(signal, "SIGXCPU", 0):
                return ChildFailedError(SLOW)
        return ChildFailedError(ENDED, try_again=self._requests > 1)


def isolated_command(program: str, argument: str) -> list[str]:
    """Runs the Python source `program` with `argument`, and behind it where to import from, as sys.argv."""
    return [*_COMMAND, program, argument, *_search_path()]


def _search_path() -> list[str]:
    """Where this process imports from, but for the current folder."""
    own = str(Path(__file__).resolve().parents[2])
    found = [os.path.abspath(entry) for entry in sys.path if os.path.isabs(entry)]
    return found if own in found else [*found, own]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Now: it has nothing to lose."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
