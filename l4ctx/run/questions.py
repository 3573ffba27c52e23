"""Many questions about the same documents: reads and checks their file. Encoding them is left to `l4ctx.run.asking`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from l4ctx.errors import InputError
from l4ctx.formatting import printable

MAX_LINE_BYTES = 16 * 2**20
MAX_QUESTIONS = 1_000_000
MAX_BYTES = 2**28
"""Of the lines together, which are held in memory."""

QuestionId = int | str


class QuestionsError(InputError):
    """A file of questions that cannot be used; the message names the file and the line."""


class Settings(NamedTuple):
    """What one question has of its own; None: as the others."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


NO_SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Question:
    """`line` is its number in the file, from 1, and its id unless it has one."""

    line: int
    id: QuestionId
    text: str
    settings: Settings = NO_SETTINGS


@dataclass(frozen=True)
class QuestionsOptions:
    """Questions to be answered from the same documents."""

    name: str  # of their file
    questions: Sequence[Question]
    batch: int | None = None  # answers at a time; None: as many as fit
    answers: Path | None = None  # --resume-answers
    in_order: bool = False
    taken: int = 0  # answers that --resume-answers holds already; their questions are not among these


def read_questions(file: BinaryIO, name: str) -> list[Question]:
    """One question a line, or one JSON object a line if the first one begins with a brace.

    Lines end with a newline and nothing else: other line ends of Unicode are part of a question. Blank lines are
    skipped. Raises QuestionsError.
    """
    found: list[Question] = []
    lines: dict[QuestionId, int] = {}
    is_json = None
    for line, text in _lines(file, name):
        if is_json is None:
            is_json = text.startswith("{")
        question = _from_json(line, text, name) if is_json else Question(line, line, text)
        if question.id in lines:
            raise QuestionsError(
                f"{name}, line {line}: the id {shown(question.id)} is that of line {lines[question.id]}, too"
            )
        if len(found) == MAX_QUESTIONS:
            raise QuestionsError(f"{name}: more than {MAX_QUESTIONS:,} questions; split the file")
        lines[question.id] = line
        found.append(question)
    if not found:
        raise QuestionsError(f"{name}: there is no question in it")
    return found


def shown(question_id: QuestionId) -> str:
    """In messages: as JSON, on one line."""
    return json.dumps(question_id)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers, without white space around them."""
    line = size = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        size += len(content)
        if len(content) > MAX_LINE_BYTES:
            raise QuestionsError(f"{name}, line {line}: longer than {MAX_LINE_BYTES // 2**20} MiB")
        if size > MAX_BYTES:
            raise QuestionsError(f"{name}, line {line}: more than {MAX_BYTES // 2**20} MiB up to here; split the file")
        try:
            text = content.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise QuestionsError(f"{name}, line {line}: not UTF-8 text")
        if text := text.strip():
            yield line, text


def _from_json(line: int, text: str, name: str) -> Question:
    """Raises QuestionsError."""

    def refuse(what: str) -> QuestionsError:
        return QuestionsError(f"{name}, line {line}: {what}")

    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = f" ({error.msg}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        raise refuse(f"not a JSON object, as the first question is{why}") from None
    if not isinstance(content, dict):
        raise refuse("not a JSON object, as the first question is")
    for key, value in content.items():
        known = _KEYS.get(key)
        if known is None:
            raise refuse(f"unknown key {shown(printable(key))}; known are {', '.join(_KEYS)}")
        what, is_right = known
        if not is_right(value):
            raise refuse(f"{key} is not {what}")
    if "question" not in content:
        raise refuse('no "question" in it')
    question, question_id = content.pop("question").strip(), content.pop("id", line)
    return Question(line, question_id, question, Settings(**content) if content else NO_SETTINGS)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id": ("a text or a whole number", lambda value: isinstance(value, str) or _is_count(value, -(2**63), 2**63 - 1)),
    "question": ("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip())),
    "max_new_tokens": ("a whole number from 1 on", lambda value: _is_count(value, 1, 2**63 - 1)),
    "temperature": ("a number from 0 on", lambda value: _is_number(value, sys.float_info.max)),
    "top_p": ("a number from 0 to 1", lambda value: _is_number(value, 1.0)),
    "top_k": ("a whole number from 0 on", lambda value: _is_count(value, 0, 2**63 - 1)),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda value: _is_count(value, 0, 2**63 - 1)),
}
