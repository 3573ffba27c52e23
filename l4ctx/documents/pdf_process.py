"""The process in which pdfium runs: started when it is first needed, kept for the next document, killed if it hangs.

A page on which pdfium crashes, runs out of memory or never ends costs that process and nothing more. The code that it
runs is `l4ctx.documents.pdf_worker`.
"""

from __future__ import annotations

import io
import json
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from l4ctx.documents.pdf_worker import FRAME
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import available_memory, process_memory

PAGE_SECONDS = 60.0  # for one page, and for opening the document
START_SECONDS = 60.0
MOST_MEMORY = 4 << 30  # bytes of address space of the process, beside what the document takes
LEAST_MEMORY = 1 << 30  # the same where hardly any memory is free: below it, sound pages would fail
MOST_LEFT = 64 << 20  # bytes that it may still hold after a request, beside a document that it keeps; else it is ended
MOST_TEXT = 2**27  # bytes of text in UTF-8: more than any model reads

_COMMAND = (sys.executable, "-P", "-m", "l4ctx.documents.pdf_worker")  # -P: not from the current folder


class NoWorkerError(Exception):
    """The process cannot be started; the message says why in one line."""


class LibraryMissingError(NoWorkerError):
    """pypdfium2 is not installed."""


class RefusedError(Exception):
    """The process refused a request; the message says why in one line."""


class PdfiumError(Exception):
    """pdfium failed or was too slow, and its process is ended; the message is to follow what was read.

    `try_again`: the process had read another document, which may have caused it, or was killed; a fresh one may
    succeed.
    """

    def __init__(self, message: str, *, try_again: bool = False) -> None:
        super().__init__(message)
        self.try_again = try_again


@dataclass(frozen=True)
class Reply:
    """One message from the process."""

    header: dict[str, Any]
    body: bytearray


def memory_limit(document_bytes: int) -> int:
    """Bytes of address space that the process may have for a request about a document of that size.

    At most about half of the memory that is free now, and never less than LEAST_MEMORY beside the document. To be asked
    before every request: models, keys and values take memory after documents are read and before pages are drawn.
    """
    most, free = MOST_MEMORY + 2 * document_bytes, available_memory()
    return most if free is None else min(most, max(free // 2, LEAST_MEMORY + document_bytes))


@contextmanager
def request(header: dict[str, Any], body: bytes = b"") -> Iterator[Callable[[], Reply]]:
    """Asks the process, starting one where none runs; yields a function that awaits the next reply.

    One thread at a time. `header` says what to "do" ("read" or "draw"), the "memory" to do it in (bytes), and what else
    the task needs. What is read is `body`; what is drawn from, the file at "path" or, where that is None, `body`, whose
    digest is "sha256": it is kept open from one request to the next, see `l4ctx.documents.pdf_worker`. Who leaves
    before the last reply, by an exception or not, ends the process. Raises NoWorkerError; RefusedError and PdfiumError,
    as does the function, which waits for PAGE_SECONDS.
    """
    with _one_at_a_time:
        worker = _started()
        try:
            worker.ask(header, body)
            yield lambda: worker.receive(PAGE_SECONDS)
        finally:
            if not (worker.is_idle and worker.is_small()):
                worker.end()


class _Worker:
    """A running process and the pipes to and from it. Ends with this object or with the interpreter."""

    def __init__(self) -> None:
        try:
            self.process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # gets no Ctrl-C
        except OSError as error:
            raise NoWorkerError(f"the process that reads it cannot be started: {error.strerror}") from None
        self.end = weakref.finalize(self, _end, self.process)
        self.is_idle = False  # and not between a request and its last reply
        self._requests = 0
        self._kept = 0  # bytes of the document that it keeps open
        assert self.process.stdin is not None and isinstance(self.process.stdout, io.FileIO)
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._poll = select.poll() if hasattr(select, "poll") else None  # without: waits as long as it takes
        if self._poll is not None:
            self._poll.register(self._stdout, select.POLLIN)
        try:
            self._greet()
        except BaseException:
            self.end()
            raise

    def _greet(self) -> None:
        try:
            hello = self.receive(START_SECONDS)
        except RefusedError as error:
            raise NoWorkerError(str(error)) from None
        except PdfiumError:
            raise NoWorkerError("the process that reads it does not start") from None
        if "missing" in hello.header:
            raise LibraryMissingError("pypdfium2 is not installed")
        self.is_idle = True

    def is_alive(self) -> bool:
        return self.end.alive and self.process.poll() is None

    def is_small(self) -> bool:
        held = process_memory(self.process.pid)
        return held is None or held.anonymous <= MOST_LEFT + self._kept

    def ask(self, header: dict[str, Any], body: bytes) -> None:
        """A request; until it has the document, it waits for a file, as anyone would. Raises as `receive` does."""
        self._requests += 1
        self.is_idle = False
        raw = json.dumps(header).encode()
        self._send(FRAME.pack(len(raw), len(body)) + raw)
        if "wanted" in self.receive(None).header:
            self._send(body)
            self.receive(None)

    def _send(self, raw: bytes) -> None:
        left = memoryview(raw)
        try:
            while left:
                left = left[self._stdin.write(left) :]
        except BrokenPipeError:
            raise self._failed() from None

    def receive(self, seconds: float | None) -> Reply:
        """The next reply, within so many seconds. Raises RefusedError and PdfiumError."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            header_bytes, body_bytes = FRAME.unpack(self._next(FRAME.size, deadline))
            header = json.loads(self._next(header_bytes, deadline))
            if body_bytes > MOST_TEXT:
                raise PdfiumError(f"cannot be read (more than {human_bytes(MOST_TEXT)} of text)")
            body = self._next(body_bytes, deadline)
        except TimeoutError:
            raise PdfiumError(f"cannot be read within {seconds:g} s") from None
        self.is_idle = "last" in header
        self._kept = header.get("kept", self._kept)
        if "error" in header:
            raise RefusedError(header["error"])
        return Reply(header, body)

    def _next(self, count: int, deadline: float | None) -> bytearray:
        """Exactly so many bytes. Raises TimeoutError and PdfiumError."""
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

    def _failed(self) -> PdfiumError:
        return PdfiumError("cannot be read (pdfium ran out of memory or crashed)", try_again=self._requests > 1)


_one_at_a_time = threading.Lock()
_worker: _Worker | None = None


def _started() -> _Worker:
    """The running process, or a fresh one. Raises NoWorkerError."""
    global _worker
    if _worker is None or not _worker.is_alive():
        if _worker is not None:
            _worker.end()
        _worker = _Worker()
    return _worker


def _end(process: subprocess.Popen[bytes]) -> None:
    """Now: it has nothing to lose."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
