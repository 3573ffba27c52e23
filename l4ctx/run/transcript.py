"""A conversation as JSON lines: one for its beginning, one for each message, and one for what was read or taken back.

Lines are only ever appended. A process that is killed leaves whole lines and perhaps the beginning of one more, which
is cut off when the conversation goes on. What a full disk does not take is written with the next step.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from l4ctx.errors import InputError, OutputError
from l4ctx.formatting import printable
from l4ctx.spans import Span

MAX_LINE_BYTES = 16 * 2**20
MAX_BYTES = 2**28
ROLES = ("system", "user", "assistant")


class TranscriptError(InputError):
    """A file that is no transcript, or cannot be written as one; the message names file and line."""


class InUseError(TranscriptError):
    """A file that another process writes to."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    cite: bool = False  # of a question whose answer was to name sources


@dataclass(frozen=True)
class Reading:
    """Documents that were read within the conversation."""

    paths: Sequence[str]
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each by its name


Step = tuple[Message | Reading, ...]
"""What one command did, and `/undo` takes back: a question with its answer, a system message, documents."""


@dataclass
class Told:
    """The last conversation of a transcript: what it began with, and what was done since."""

    begin: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)
    is_cut: bool = False  # its end was not finished, and was left out

    @property
    def paths(self) -> list[str]:
        return list(self.begin["paths"])

    @property
    def context(self) -> Path | None:
        return None if self.begin.get("context") is None else Path(self.begin["context"])

    @property
    def system(self) -> str | None:
        return self.begin.get("system")

    @property
    def folder(self) -> Path | None:
        """The one that relative paths are meant from."""
        return None if self.begin.get("folder") is None else Path(self.begin["folder"])

    @property
    def model(self) -> Path | None:
        return Path(self.begin["model"]) if isinstance(self.begin.get("model"), str) else None

    @property
    def all_paths(self) -> list[str]:
        """Those of documents, and of the context."""
        readings = (part.paths for step in self.steps for part in step if isinstance(part, Reading))
        context = [] if self.context is None else [str(self.context)]
        return [*self.paths, *context, *(path for paths in readings for path in paths)]

    @property
    def digests(self) -> Mapping[str, str]:
        return self.begin.get("sha256", {})


def digests_of(spans: Sequence[Span]) -> dict[str, str]:
    """SHA-256 of each document by its name."""
    return {span.source: span.sha256 for span in spans}


class Transcript:
    """Open for appending, by one process at a time; close it. Each step is one write."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it, readable for its owner alone. Raises TranscriptError."""
        self.path = path
        self._has_steps = False  # that were written by this process
        self._name = printable(str(path))
        self._unwritten = b""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TranscriptError(f"{self._name}: cannot be written: {error.strerror}") from None
        self._file: BinaryIO = open(descriptor, "a+b", buffering=0)  # noqa: SIM115 (until it is closed)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._file.close()
            raise TranscriptError(f"{self._name}: not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InUseError(f"{self._name}: another l4ctx chat writes to it") from None
        except OSError:
            pass  # a file system without locks

    def told(self) -> Told:
        """What it holds; an unfinished end, of a line or of a turn, is cut off. Raises TranscriptError."""
        told: Told | None = None
        end = sound = 0  # of the file, and of its last step that is whole
        for number, end_before, line in self._lines():
            if not line.endswith(b"\n"):
                self._check_ours(number, line)
                end = end_before + len(line)
                break
            told, end = self._with(told, number, line), end_before + len(line)
            if not _asks(told):
                sound = end
        if told is None:
            raise TranscriptError(f"{self._name}: no conversation of l4ctx chat")
        if sound < end:
            self._cut(sound)
            told.is_cut = True
            if _asks(told):
                told.steps.pop()
        return told

    def begin(
        self, paths: Sequence[str], context: Path | None, system: str | None, model: Path, digests: Mapping[str, str]
    ) -> None:
        """A new conversation; `digests`: SHA-256 of its documents by their names. Raises OutputError."""
        line = {"begin": "l4ctx chat", "paths": list(paths), "context": None if context is None else str(context)}
        line |= {"system": system, "model": os.path.abspath(model)}
        self._append(line | {"folder": os.path.abspath("."), "sha256": dict(digests)})

    def append(self, step: Step, **details: object) -> None:
        """`details` are of its last message. Raises OutputError."""
        lines: list[dict[str, Any]] = []
        for part in step:
            if isinstance(part, Message):
                lines.append({"role": part.role, "content": part.content} | ({"cite": True} if part.cite else {}))
            else:
                lines.append({"add": list(part.paths), "sha256": dict(part.digests)})
        lines[-1] |= details
        self._has_steps = True
        self._append(*lines)

    def undo(self) -> None:
        """The last step was taken back. Raises OutputError."""
        self._append({"undo": 1})

    def close(self) -> None:
        """Writes what could not be written before, if it now can."""
        with suppress(OutputError):
            self._append()
        self._file.close()

    def discard_if_empty(self) -> None:
        """Closes it, and deletes a file in which nothing was said."""
        if not self._has_steps:
            with suppress(OSError):
                self.path.unlink()
        self.close()

    def _append(self, *lines: dict[str, Any]) -> None:
        self._unwritten += "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        left = memoryview(self._unwritten)
        try:
            end = os.fstat(self._file.fileno()).st_size
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._cut(end)  # a part of a line would spoil what follows it
                raise
        except OSError as error:
            raise OutputError(
                f"{self._name}: the conversation cannot be written: {error.strerror}; what is missing is written with "
                "the next turn, if there is room then"
            ) from None
        self._unwritten = b""

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Each line with its number and the offset where it begins."""
        try:
            with open(self._file.fileno(), "rb", closefd=False) as file:
                file.seek(0)
                number = offset = 0
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(line) > MAX_LINE_BYTES or offset > MAX_BYTES:
                        raise self._refused(number, "too long for a transcript")
                    yield number, offset, line
                    offset += len(line)
        except OSError as error:
            raise TranscriptError(f"{self._name}: cannot be read: {error.strerror}") from None

    def _check_ours(self, number: int, line: bytes) -> None:
        """Of a last line that was not finished: only one that this program has begun is cut off."""
        if not any(line.startswith(start[: len(line)]) for start in (b'{"role": ', b'{"add": ', b'{"undo": ')):
            raise self._refused(number, "no line of l4ctx chat")

    def _cut(self, size: int) -> None:
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), size)

    def _with(self, told: Told | None, number: int, line: bytes) -> Told:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._refused(number, "no JSON object")
        if "begin" in content:
            if not _is_beginning(content):
                raise self._refused(number, "no beginning of a conversation")
            return Told(content)
        if told is None:
            raise self._refused(number, "no beginning of a conversation")
        role, text, steps = content.get("role"), content.get("content"), told.steps
        if "undo" in content and steps:
            steps.pop()
        elif "add" in content and _are_texts(content["add"]):
            digests: dict[str, str] = content.get("sha256", {})
            steps.append((Reading(content["add"], digests if _are_named_texts(digests) else {}),))
        elif role == "assistant" and isinstance(text, str) and steps and _is_question(steps[-1]):
            steps[-1] = (*steps[-1], Message(role, text))
        elif role in ("user", "system") and isinstance(text, str) and text.strip():
            steps.append((Message(role, text, role == "user" and content.get("cite") is True),))
        else:
            raise self._refused(number, "no line of a conversation")
        return told

    def _refused(self, number: int, why: str) -> TranscriptError:
        return TranscriptError(f"{self._name}, line {number}: {why}")


def _asks(told: Told) -> bool:
    """Whether it ends with a question that has no answer."""
    return bool(told.steps) and _is_question(told.steps[-1])


def _is_question(step: Step) -> bool:
    return len(step) == 1 and isinstance(step[0], Message) and step[0].role == "user"


def _is_beginning(content: dict[str, Any]) -> bool:
    texts = (content.get("context"), content.get("system"), content.get("folder"))
    are_sound = all(text is None or isinstance(text, str) for text in texts)
    return are_sound and _are_texts(content.get("paths")) and _are_named_texts(content.get("sha256", {}))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _are_named_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
