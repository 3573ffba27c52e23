"""An append-only journal: JSON objects, one per line, each chained to the line before, durable when `append` returns.

A line is 16 hex digits, a space and compact JSON text. The digits are the first of SHA-256 over the digits of the line
before (16 zeros before the first line) and the text. So a line that is changed, moved, repeated or missing before
another one is detected, and one that a crash left half written is dropped. Whole lines missing at the end are not
detected, nor is forgery: the digits are no signature. A file with hard links is not changed: the journal continues in a
copy. The caller holds the lock, and gives the records their meaning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from l4ctx.machine.files import replace_file, sync_folder
from l4ctx.machine.private import open_private
from model.folder import check_whole

MAX_BYTES = 2**24
"""Of a journal: 100,000 records, of which ten million tokens take some 1,300."""

_DIGITS = 16
_START = b"0" * _DIGITS


class JournalError(Exception):
    """A journal that is damaged; the message names the file, the line and what is wrong."""


class _Content(NamedTuple):
    """What the complete lines of a journal hold."""

    records: list[dict[str, Any]]
    length: int  # of the whole lines, in bytes
    digits: bytes  # of the last one


class Journal:
    """A journal open for its one writer; `records` are all that it holds. Use `open` to make one."""

    def __init__(self, file: Path, descriptor: int, content: _Content) -> None:
        self.records = content.records
        self._file = file
        self._descriptor = descriptor
        self._end = content.length, content.digits  # one attribute, so that an interrupt cannot come between the two
        self._is_clean = True  # no partial line lies behind the end

    @classmethod
    def read(cls, file: Path) -> list[dict[str, Any]]:
        """All complete records. A last line without a newline, or NULs there, as a crash leaves them, is dropped.

        Raises JournalError for any other damage, and OSError where the file cannot be read.
        """
        descriptor = open_private(file, os.O_RDONLY)
        try:
            return _checked(file, _read(file, descriptor)).records
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, file: Path) -> Journal:
        """Opens a journal for appending; creates it if there is none, and truncates what a crash left behind.

        Raises JournalError, with nothing changed, and OSError.
        """
        try:
            descriptor = open_private(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        except FileExistsError:
            descriptor = open_private(file, os.O_RDWR | os.O_APPEND)
        try:
            data = _read(file, descriptor)
            journal = cls(file, descriptor, _checked(file, data))
        except BaseException:
            os.close(descriptor)
            raise
        try:
            if not data:  # it is new, or the process that made it died right after
                sync_folder(file.parent, is_required=True)
            elif journal._end[0] < len(data):
                journal._cut_off()
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, which is durable when this returns.

        Raises OSError where it cannot be written: the journal is as before then, and a later call may succeed.
        """
        if not self._is_clean:
            self._cut_off()
        length, digits = self._end
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")
        copy = _parsed(text)  # what `read` will return
        digits = _chained(digits, text)
        line = digits + b" " + text + b"\n"
        if length + len(line) > MAX_BYTES:
            raise OSError(errno.EINVAL, f"its journal would be larger than {MAX_BYTES >> 20} MiB")
        self._make_own()
        self._is_clean = False
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"only {written} of a journal line's {len(line)} bytes could be written")
            os.fsync(self._descriptor)
        except BaseException:
            with suppress(OSError):  # the next call tries again, and raises what fails
                self._cut_off()
            raise
        self._end = length + len(line), digits
        self._is_clean = True
        self.records.append(copy)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _cut_off(self) -> None:
        """Truncates the file after its last complete line."""
        if not self._make_own():
            os.ftruncate(self._descriptor, self._end[0])
            os.fsync(self._descriptor)
        self._is_clean = True

    def _make_own(self) -> bool:
        """If the file has other hard links, continues in a copy of its complete lines; returns whether it had.

        Raises OSError.
        """
        mine, named = os.fstat(self._descriptor), os.lstat(self._file)
        if (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino):
            raise OSError(errno.ESTALE, f"{self._file.name} was replaced by another file")
        if mine.st_nlink < 2:
            return False
        with open(self._descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            content = stream.read(self._end[0])
        shared, self._descriptor = self._descriptor, replace_file(self._file, content, os.O_RDWR | os.O_APPEND)
        os.close(shared)
        sync_folder(self._file.parent, is_required=True)
        return True


def _read(file: Path, descriptor: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise JournalError(f"{file}: not a regular file")
    with open(descriptor, "rb", closefd=False) as stream:
        data = stream.read(min(status.st_size, MAX_BYTES) + 1) if status.st_size <= MAX_BYTES else None
    if data is None or len(data) > MAX_BYTES:
        raise JournalError(f"{file}: larger than {MAX_BYTES >> 20} MiB, which no journal is")
    # a writer may add a line, or cut off a torn one
    check_whole(file, len(data), min(status.st_size, os.fstat(descriptor).st_size))
    return data


def _checked(file: Path, data: bytes) -> _Content:
    """The content of a journal whose bytes are `data`. Raises JournalError."""
    lines = data.split(b"\n")
    torn = lines.pop()
    records = []
    digits = _START
    for number, line in enumerate(lines, start=1):
        text = line[_DIGITS + 1 :]
        digits = _chained(digits, text)
        if line[: _DIGITS + 1] != digits + b" ":
            raise JournalError(
                f"{file}: line {number}: damaged, or not the one that follows the line before it "
                "(its checksum does not match)"
            )
        try:
            records.append(_parsed(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise JournalError(f"{file}: line {number}: not a JSON object ({error})") from None
    return _Content(records, len(data) - len(torn), digits)


def _chained(digits: bytes, text: bytes) -> bytes:
    """A line's digits, from the digits of the line before and its own text."""
    return hashlib.sha256(digits + text).hexdigest()[:_DIGITS].encode("ascii")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _parsed(text: bytes) -> dict[str, Any]:
    """A record. Raises ValueError, TypeError and RecursionError."""
    record = _DECODER.decode(str(text, "utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f"it is a {type(record).__name__}")
    return record
