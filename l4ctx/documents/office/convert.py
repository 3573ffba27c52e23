"""Office documents and web pages as text, by pandoc and openpyxl (the extra `l4ctx[office]`); emails, by Python.

All of it runs in confined processes. What is lost on the way is noted: pictures, charts, comments and the like, and
words of the document that its text lacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from l4ctx.confinement.process import (
    ENDED,
    LARGE,
    SLOW,
    ChildFailedError,
    Confined,
    ConfinementError,
    Limits,
    NoChildError,
    RefusedError,
    Reply,
)
from l4ctx.confinement.program import Output, run_program
from l4ctx.documents.office.bounds import MOST_CONVERTED
from l4ctx.documents.office.mail import attached, marker
from l4ctx.documents.office.missing import restored
from l4ctx.formatting import counted, human_bytes

NAMES = {
    "docx": "a Word document (DOCX)",
    "pptx": "a PowerPoint presentation (PPTX)",
    "xlsx": "an Excel workbook (XLSX)",
    "ooxml": "an Office document (DOCX, XLSX or PPTX)",
    "odt": "an OpenDocument text (ODT)",
    "epub": "an EPUB book",
    "rtf": "an RTF document",
    "html": "an HTML page",
    "eml": "an email",
}
SECONDS = 120.0  # for a document, of processor time
HEAP = 1 << 30  # bytes that pandoc may fill
MOST_TEXT = 2**27  # bytes in UTF-8: more than any model reads
CHILD = Confined("l4ctx.documents.office.worker")

_LOOK = Limits(3 << 30, 2 * SECONDS, SECONDS, MOST_TEXT)
_PANDOC = Limits(2 * HEAP, 2 * SECONDS, SECONDS, MOST_TEXT)
_FILTER = Path(__file__).with_name("plain.lua")
_ZIPPED = ("docx", "pptx", "odt", "epub")
_COUNT = re.compile(r"^l4ctx (\w+) (\d+)$", re.MULTILINE)
_WITHOUT_FORM = (
    "read paragraph by paragraph, without headings, lists and rows of tables, as it has {:,} elements; "
    "split it to have them"
)
_HEAP_EXHAUSTED = 251  # exit code of programs made by GHC


class OfficeError(Exception):
    """A document cannot be read; the message is the reason in one line, without the document's name."""


class OfficeSupportMissing(OfficeError):
    """What reads the format is not installed."""

    def __init__(self, format: str) -> None:
        super().__init__(f'{NAMES[format]}; pip install "l4ctx[office]" adds what reads it')


def has_support() -> bool:
    return (
        all(importlib.util.find_spec(name) is not None for name in ("pypandoc", "openpyxl"))
        and pandoc_path() is not None
    )


def check_support(format: str) -> None:
    """Raises OfficeSupportMissing."""
    if not has_support():
        raise OfficeSupportMissing(format)


def read_office(format: str, raw: bytes) -> tuple[str, list[str]]:
    """The text of a document in a format of NAMES, and notes on what it lacks (one line each). Raises OfficeError.

    Slides are wrapped in `<slide number="1">` and `</slide>`, sheets in `<sheet name="…">` and `</sheet>`, on lines of
    their own.
    """
    try:
        if format == "eml":
            text, notes = _mail(raw)
        else:
            check_support(format)
            text, notes = _office(format, raw)
    except RefusedError as error:
        raise _failed(format, str(error)) from None
    except NoChildError as error:
        raise OfficeError(f"{NAMES[format]}; the process that reads it {error}") from None
    except ChildFailedError as error:
        raise _failed(format, _failure(error)) from None
    if not text.strip():
        raise OfficeError("; ".join([NAMES[format], "without text", *notes]))
    return text, notes


def _failed(format: str, reason: str) -> OfficeError:
    return OfficeError(f"{NAMES[format]}; {reason} (save it as PDF or text)")


def _failure(error: ChildFailedError) -> str:
    if error.why == SLOW:
        return f"it cannot be read within {SECONDS:g} s"
    if error.why == LARGE:
        return f"it has more than {human_bytes(MOST_TEXT)} of text"
    return "it cannot be read: too much memory is needed, or what reads it crashed"


def _office(format: str, raw: bytes) -> tuple[str, list[str]]:
    losses, body, elements = list[str](), list[tuple[int, str]](), 0
    if format in (*_ZIPPED, "ooxml"):
        looked = _ask("look", raw)
        format, losses, elements = (looked.header[name] for name in ("format", "losses", "elements"))
        body, apart = json.loads(looked.body)
        if body and elements > MOST_CONVERTED:
            return _by_paragraph([*body, *apart]), [*_left_out(losses), _WITHOUT_FORM.format(elements)]
    if format == "xlsx":
        read = _ask("sheets", raw)
        return read.body.decode(), [*_left_out(read.header["losses"]), *read.header["notes"]]
    if format == "rtf":
        raw = bytes(_ask("recode", raw).body)
    elif format == "html":
        raw = bytes(_ask("page", raw).body)
    text, counts = _converted(format, raw)
    losses = ([counted(pictures, "picture")] if (pictures := counts.get("pictures", 0)) else []) + losses
    if deleted := counts.get("deletions", 0):
        losses.append(f"{counted(deleted, 'tracked deletion')}")
    text, notes = restored(text, body)
    return text, [*_left_out(losses), *notes]


def _by_paragraph(body: Sequence[tuple[int, str]]) -> str:
    """The text of a document that is too large to be converted; `body` as in `restored`."""
    parts, current = list[str](), 0
    for slide, text in body:
        if slide != current:
            parts += ["</slide>\n\n" if current else "", f'<slide number="{slide}">\n\n' if slide else ""]
            current = slide
        parts.append(f"{' '.join(text.split())}\n\n")
    return "".join([*parts, "</slide>\n" if current else ""])


def _left_out(losses: Sequence[str]) -> list[str]:
    return [f"not read: {', '.join(losses)}"] if losses else []


def _converted(format: str, raw: bytes) -> tuple[str, dict[str, int]]:
    """pandoc's text, and what its filter counted. Raises OfficeError and ConfinementError."""
    program = pandoc_path()
    if program is None:
        raise OfficeSupportMissing(format)
    options = ["--track-changes=all"] if format == "docx" else []
    output = run_program(
        [program, "+RTS", f"-M{HEAP}", "-RTS", "--sandbox", "--from", format, "--to", "plain", "--wrap=none", *options,
         f"--lua-filter={_FILTER}", f"--metadata=l4ctx-format={format}"],
        raw,
        _PANDOC,
        readable=[str(_FILTER)],
    )  # fmt: skip
    messages = output.messages.decode("utf-8", "replace")
    if output.code:
        raise _failed(format, _reason(output, messages))
    counts = {name: int(number) for name, number in _COUNT.findall(messages)}
    return output.text.decode("utf-8", "replace"), counts


def _reason(output: Output, messages: str) -> str:
    if output.code == _HEAP_EXHAUSTED:
        return f"pandoc needs more than {human_bytes(HEAP)} of memory for it"
    said = [line.strip() for line in messages.splitlines() if line.strip() and not _COUNT.match(line)]
    return f"pandoc cannot read it: {' '.join(said)[:200] or f'exit code {output.code}'}"


def pandoc_path() -> str | None:
    """The path of the program in pypandoc_binary; it is linked statically, which one of the system may not be."""
    spec = importlib.util.find_spec("pypandoc")
    if spec is None or spec.origin is None:
        return None
    program = os.path.join(os.path.dirname(spec.origin), "files", "pandoc")
    return program if os.access(program, os.X_OK) else None


def _mail(raw: bytes) -> tuple[str, list[str]]:
    reply = _ask("mail", raw)
    text, pages = json.loads(reply.body)
    notes = [f"not read: {attached(names)}"] if (names := reply.header["attachments"]) else []
    for index, page in enumerate(pages):
        text = text.replace(marker(index), _page(page, notes), 1)
    return text, notes


def _page(page: str, notes: list[str]) -> str:
    """The text of an email's HTML; its source where the extra is missing or it cannot be converted, which is noted."""
    try:
        if has_support():
            return _converted("html", bytes(_ask("page", page.encode()).body))[0]
        reason = 'pip install "l4ctx[office]" adds what reads it'
    except (OfficeError, ConfinementError) as error:
        reason = str(error)
    notes.append(f"its HTML is read as its source; {reason}")
    return page


def _ask(what: str, raw: bytes) -> Reply:
    """Raises NoChildError, RefusedError and ChildFailedError."""
    for is_last in (False, True):
        try:
            with CHILD.request({"do": what}, _LOOK, raw) as receive:
                return receive()
        except ChildFailedError as error:
            if is_last or not error.try_again:
                raise
    raise ChildFailedError(ENDED)
