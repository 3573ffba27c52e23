"""The process in which pdfium runs, confined: what it may take for a document, and what its failures are called.

The code that it runs is `l4ctx.documents.pdf_worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from l4ctx.confinement.process import (
    LARGE,
    SLOW,
    Body,
    ChildFailedError,
    Confined,
    Limits,
    NoChildError,
    Reply,
)
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import available_memory

PAGE_SECONDS = 60.0  # for one page, and for opening the document
MOST_MEMORY = 4 << 30  # bytes of address space of the process, beside what the document takes
LEAST_MEMORY = 1 << 30  # the same where hardly any memory is free: below it, sound pages would fail
MOST_LEFT = 64 << 20  # bytes that it may still hold after a request, beside a document that it keeps; else it is ended
MOST_TEXT = 2**27  # bytes of text in UTF-8: more than any model reads

CHILD = Confined("l4ctx.documents.pdf_worker")


class PdfiumError(Exception):
    """pdfium failed or was too slow, and its process is ended; the message is to follow what was read.

    `try_again`: the process had read another document, which may have caused it, or was killed; a fresh one may
    succeed.
    """

    def __init__(self, message: str, *, try_again: bool = False) -> None:
        super().__init__(message)
        self.try_again = try_again


def memory_limit(document_bytes: int) -> int:
    """Bytes of address space that the process may have for a request about a document of that size.

    At most about half of the memory that is free now, and never less than LEAST_MEMORY beside the document. To be asked
    before every request: models, keys and values take memory after documents are read and before pages are drawn.
    """
    most, free = MOST_MEMORY + 2 * document_bytes, available_memory()
    return most if free is None else min(most, max(free // 2, LEAST_MEMORY + document_bytes))


@contextmanager
def request(header: dict[str, Any], body: Body, size: int) -> Iterator[Callable[[], Reply]]:
    """Asks the process about a document of that many bytes; yields a function that awaits the next reply.

    `header` says what to "do" ("read" or "draw"), and what else the task needs, see `l4ctx.documents.pdf_worker`; the
    document is `body`. Raises l4ctx.confinement.process.NoChildError; RefusedError and PdfiumError, as does the
    function, which waits for PAGE_SECONDS; and OSError where the document cannot be read any more.
    """
    seconds = PAGE_SECONDS
    limits = Limits(memory_limit(size), seconds, processor_seconds=seconds, reply=MOST_TEXT, left=MOST_LEFT)
    try:
        with CHILD.request(header, limits, body) as receive:
            yield receive
    except ChildFailedError as error:
        raise _as_pdfium_error(error, seconds) from None


def _as_pdfium_error(error: ChildFailedError, seconds: float) -> PdfiumError:
    if error.why == SLOW:
        return PdfiumError(f"cannot be read within {seconds:g} s")
    if error.why == LARGE:
        return PdfiumError(f"cannot be read (more than {human_bytes(MOST_TEXT)} of text)")
    return PdfiumError("cannot be read (pdfium ran out of memory or crashed)", try_again=error.try_again)


def no_process(error: NoChildError) -> str:
    """Why there is no process to read it."""
    return f"the process that reads it {error}"
