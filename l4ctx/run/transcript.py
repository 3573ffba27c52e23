"""A conversation as JSON lines: one for its beginning, one for each message, and one for what was read or taken back.

Lines are only ever appended. A process that is killed leaves whole lines and perhaps the beginning of one more, which
is cut off when the conversation goes on.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from l4ctx.errors import InputError, OutputError
from l4ctx.formatting import printable

MAX_LINE_BYTES = 16 * 2**20
MAX_BYTES = 2**28
ROLES = ("system", "user", "assistant")


class TranscriptError(InputError):
    """A file that is no transcript, or cannot be written as one; the message names file and line."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    cite: bool = False  # of a question whose answer was to name sources


@dataclass(frozen=True)
class Reading:
    """Documents that were read within the conversation."""

    paths: Sequence[str]


Step = tuple[Message | Reading, ...]
"""What one command did, and `/undo` takes back: a question with its answer, a system message, documents."""


@dataclass
class Told:
    """The last conversation of a transcript: what it began with, and what was done since."""

    begin: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return list(self.begin["paths"])

    @property
    def context(self) -> Path | None:
        return None if self.begin["context"] is None else Path(self.begin["context"])

    @property
    def system(self) -> str | None:
        return self.begin["system"]


class Transcript:
    """Open for appending; close it. Each step is one write."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it, readable for its owner alone. Raises TranscriptError."""
        self._name = printable(str(path))
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TranscriptError(f"{self._name}: cannot be written: {error.strerror}") from None
        self._file: BinaryIO = open(descriptor, "a+b", buffering=0)  # noqa: SIM115 (until it is closed)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self.close()
            raise TranscriptError(f"{self._name}: not a regular file")

    def told(self) -> Told:
        """What it holds; an unfinished last line is cut off. Raises TranscriptError."""
        told: Told | None = None
        for number, begin, line in self._lines():
            if not line.endswith(b"\n"):
                self._cut(number, begin, line)
                break
            told = self._with(told, number, line)
        if told is None:
            raise TranscriptError(f"{self._name}: no conversation of l4ctx chat")
        return told

    def begin(self, paths: Sequence[str], context: Path | None, system: str | None, model: Path) -> None:
        """A new conversation. Raises OutputError."""
        folder = None if context is None else str(context)
        self._append({"begin": "l4ctx chat", "paths": list(paths), "context": folder, "system": system,
                      "model": str(model)})  # fmt: skip

    def append(self, step: Step, **details: object) -> None:
        """`details` are of its last message. Raises OutputError."""
        lines: list[dict[str, Any]] = []
        for part in step:
            if isinstance(part, Message):
                lines.append({"role": part.role, "content": part.content} | ({"cite": True} if part.cite else {}))
            else:
                lines.append({"add": list(part.paths)})
        lines[-1] |= details
        self._append(*lines)

    def undo(self) -> None:
        """The last step was taken back. Raises OutputError."""
        self._append({"undo": 1})

    def close(self) -> None:
        self._file.close()

    def _append(self, *lines: dict[str, Any]) -> None:
        left = memoryview("".join(f"{json.dumps(line)}\n" for line in lines).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(f"{self._name}: the conversation cannot be written: {error.strerror}") from None

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

    def _cut(self, number: int, begin: int, line: bytes) -> None:
        """Of a last line that was not finished: only one that this program has begun is cut off."""
        if not any(line.startswith(start[: len(line)]) for start in (b'{"role": ', b'{"add": ', b'{"undo": ')):
            raise self._refused(number, "no line of l4ctx chat")
        os.ftruncate(self._file.fileno(), begin)

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
            steps.append((Reading(content["add"]),))
        elif role == "assistant" and isinstance(text, str) and steps and _is_question(steps[-1]):
            steps[-1] = (*steps[-1], Message(role, text))
        elif role in ("user", "system") and isinstance(text, str) and text.strip():
            steps.append((Message(role, text, role == "user" and content.get("cite") is True),))
        else:
            raise self._refused(number, "no line of a conversation")
        return told

    def _refused(self, number: int, why: str) -> TranscriptError:
        return TranscriptError(f"{self._name}, line {number}: {why}")


def _is_question(step: Step) -> bool:
    return len(step) == 1 and isinstance(step[0], Message) and step[0].role == "user"


def _is_beginning(content: dict[str, Any]) -> bool:
    texts = (content.get("context"), content.get("system"))
    return _are_texts(content.get("paths")) and all(text is None or isinstance(text, str) for text in texts)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
