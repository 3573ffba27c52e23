"""The file that --resume-answers names: one JSON object a line for each answer, appended as it is ready.

A process that is killed leaves whole lines and perhaps the beginning of one more, which the next run cuts off. A power
loss may leave NULs, which no line has: the next run cuts them off with all that follows.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from l4ctx.errors import InputError, OutputError
from l4ctx.formatting import printable
from l4ctx.machine.files import sync_names
from l4ctx.run.questions import Question, QuestionId, shown
from model.folder import check_whole

BEGINNING = b'{"id": '
"""Of every line that is written here: what begins otherwise is no line of answers, and is not cut off."""

MAX_LINE_BYTES = 256 * 2**20


class AnswersFileError(InputError):
    """A file that cannot hold these answers; it was not changed."""


class AnswersFile:
    """Open for appending, locked against other runs. `answered` are the ids of questions that it holds. Close it."""

    def __init__(
        self,
        path: Path,
        questions: Sequence[Question],
        *,
        option: str = "--resume-answers",
        taken: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Opens or creates it, and cuts off an unfinished last line. Raises AnswersFileError.

        `option` names it in messages. `taken` is given each line that answers one of these questions.
        """
        self._name, self._option, self._taken = printable(str(path)), option, taken
        is_new = not os.path.lexists(path)
        try:
            self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (until it is closed)
        except OSError as error:
            raise AnswersFileError(f"{self._name}: cannot be written: {error.strerror}") from None
        if is_new:
            sync_names([path])
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise AnswersFileError(f"{self._name}: not a regular file; name another one for {option}")
            self._lock()
            self.answered = self._read(questions)
        except OSError as error:
            self.close()
            raise AnswersFileError(f"{self._name}: cannot be read: {error.strerror}") from None
        except AnswersFileError:
            self.close()
            raise

    def append(self, answer: dict[str, Any]) -> None:
        """Writes a line, whose first key has to be `id`. Raises OutputError."""
        line = json.dumps(answer).encode() + b"\n"
        assert line.startswith(BEGINNING), line
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(f"{self._name}: the answers cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """What was written is on the disk afterwards, where the system can tell."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise OutputError(f"{self._name}: the answers cannot be written: {error.strerror}") from None
        finally:
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnswersFileError(f"{self._name}: another run is writing to it; wait for its end") from None
        except OSError:  # a file system without locks
            return

    def _read(self, questions: Sequence[Question]) -> frozenset[QuestionId]:
        """The ids of these questions that are answered in it; then cuts off an unfinished last line."""
        texts, found, end = {question.id: question.text for question in questions}, set(), 0
        for number, line in enumerate(self._lines(), 1):
            if not line.endswith(b"\n") or b"\0" in line:
                self._check_unfinished(number, line)
                if b"\0" not in line:
                    self._check_read(end + len(line))
                os.ftruncate(self._file.fileno(), end)
                break
            end += len(line)
            question_id, text, content = self._parsed(number, line)
            if question_id not in texts:
                continue
            if texts[question_id] != text:
                raise self._refused(number, f"another question has the id {shown(question_id)}")
            if self._taken is not None and question_id not in found:
                self._taken(content)
            found.add(question_id)
        else:
            self._check_read(end)
        return frozenset(found)

    def _check_read(self, length: int) -> None:
        """Raises OSError if the file, of which `length` bytes were read, has more: none of them may be cut off."""
        check_whole(self._name, length, os.fstat(self._file.fileno()).st_size)

    def _lines(self) -> Iterator[bytes]:
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            while line := file.readline(MAX_LINE_BYTES):
                yield line

    def _check_unfinished(self, number: int, line: bytes) -> None:
        """Raises AnswersFileError for a last line that this program has not begun: it would be lost."""
        begun, *_ = line.split(b"\0", 1)
        is_ours = begun.startswith(BEGINNING) or BEGINNING.startswith(begun)
        is_another = not begun and number == 1 and bool(line.strip(b"\0"))  # a file that begins with a NUL
        if len(line) == MAX_LINE_BYTES or not is_ours or is_another:
            raise self._refused(number, "no answer of l4ctx")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return
        self._parsed(number, line)

    def _parsed(self, number: int, line: bytes) -> tuple[QuestionId, str, dict[str, Any]]:
        """The question's id and text, and all that the line holds."""
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and isinstance(content.get("answer"), str):
            question_id, text = content.get("id"), content.get("question")
            if isinstance(question_id, int | str) and not isinstance(question_id, bool) and isinstance(text, str):
                return question_id, text, content
        raise self._refused(number, "no answer of l4ctx")

    def _refused(self, number: int, why: str) -> AnswersFileError:
        return AnswersFileError(f"{self._name}, line {number}: {why}; name another file for {self._option}")
