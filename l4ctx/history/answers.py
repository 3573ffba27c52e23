"""The log of answers: one JSON object a line, appended by any number of processes, in a file of bounded size.

When the file would grow beyond its limit it becomes the older of two, and the one that was that is deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from l4ctx.machine.places import state_folder
from l4ctx.machine.private import FOLDER_MODE, narrow, open_private

LARGEST_FILE = 2**24
"""Bytes of each of the two files."""

LONGEST_TEXT = 2**16
"""Characters of a question, and of an answer, that are kept."""

MOST_SOURCES = 100


class AnswerLog:
    """What was asked and answered. `file` is the newer of its two files."""

    def __init__(self, folder: Path | None = None) -> None:
        self.file = (folder or state_folder()) / "answers.jsonl"

    @property
    def older(self) -> Path:
        return self.file.with_suffix(".old.jsonl")

    def append(self, record: dict[str, Any]) -> None:
        """Raises OSError; a record is then not kept, or not whole, which reading passes over."""
        line = (json.dumps(_bounded(record)) + "\n").encode()
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        narrow(self.file.parent, follow=True)
        while True:
            descriptor = open_private(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not self._is_current(descriptor):  # another process has begun a new file meanwhile
                    continue
                size = os.fstat(descriptor).st_size
                if size and size + len(line) > LARGEST_FILE:
                    os.replace(self.file, self.older)
                    continue
                if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line that a full disk cut off
                    line = b"\n" + line
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                return
            finally:
                os.close(descriptor)

    def records(self) -> Iterator[dict[str, Any]]:
        """The oldest first. Lines that are none of ours are passed over. Raises OSError but for files not there."""
        for file in (self.older, self.file):
            with suppress(FileNotFoundError), os.fdopen(open_private(file, os.O_RDONLY), "rb") as stream:
                for line in stream:
                    record = _parsed(line)
                    if record is not None:
                        yield record

    def clear(self) -> int:
        """Deletes all; returns how many files there were. Raises OSError."""
        count = 0
        for file in (self.older, self.file):
            with suppress(FileNotFoundError):
                file.unlink()
                count += 1
        return count

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = os.stat(self.file, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == ((opened := os.fstat(descriptor)).st_dev, opened.st_ino)


def matches(record: dict[str, Any], words: Sequence[str]) -> bool:
    """Whether every word is in the question, the answer or the name of a source, in whatever case."""
    text = "\n".join([record["question"], record["answer"], *record["sources"]]).casefold()
    return all(word.casefold() in text for word in words)


def _bounded(record: dict[str, Any]) -> dict[str, Any]:
    shortened = {name: record[name][:LONGEST_TEXT] for name in ("question", "answer")}
    sources = record["sources"]
    more = {"more_sources": len(sources) - MOST_SOURCES} if len(sources) > MOST_SOURCES else {}
    return {**record, **shortened, "sources": sources[:MOST_SOURCES], **more}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        is_ours = (
            all(isinstance(record[name], str) for name in ("time", "question", "answer"))
            and isinstance(record["sources"], list)
            and all(isinstance(source, str) for source in record["sources"])
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if is_ours else None
