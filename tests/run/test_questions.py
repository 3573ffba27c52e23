"""Files of questions, and of their answers: what is read, what is refused, and what a killed run leaves."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from l4ctx.errors import OutputError
from l4ctx.run import answers_file, questions
from l4ctx.run.answers_file import AnswersFile, AnswersFileError
from l4ctx.run.questions import Question, QuestionsError, Settings, read_questions


def read(content: str | bytes) -> list[Question]:
    raw = content.encode() if isinstance(content, str) else content
    return read_questions(io.BytesIO(raw), "q.txt")


def test_one_question_a_line() -> None:
    """Only newlines end a line; blank lines count, but are no questions."""
    found = read("\ufeffWho?\r\n\n  \t\n  Where to\u2028and\x0bwhy\x85? \nSame\nSame\n{braces} are text\n")
    assert [(one.line, one.id, one.text) for one in found] == [
        (1, 1, "Who?"),
        (4, 4, "Where to\u2028and\x0bwhy\x85?"),
        (5, 5, "Same"),
        (6, 6, "Same"),
        (7, 7, "{braces} are text"),
    ]
    assert all(one.settings == Settings() for one in found)
    assert [one.text for one in read("no newline at the end")] == ["no newline at the end"]


def test_one_object_a_line() -> None:
    found = read(
        '\n{"question": " Who? "}\n'
        '{"id": "a b", "question": "Where\\nto?", "max_new_tokens": 7, "temperature": 0.5, "top_p": 1, "top_k": 0}\n'
        '{"id": -3, "question": "\\ud800?", "seed": 9223372036854775807, "temperature": 0}'
    )
    assert found == [
        Question(2, 2, "Who?"),
        Question(3, "a b", "Where\nto?", Settings(max_new_tokens=7, temperature=0.5, top_p=1, top_k=0)),
        Question(4, -3, "\ud800?", Settings(seed=2**63 - 1, temperature=0)),
    ]


REFUSED: list[tuple[str | bytes, str]] = [
    ("", "there is no question"),
    ("\n \n\t\r\n", "there is no question"),
    (b"Who?\nWo liegt K\xf6ln?\n", "line 2: not UTF-8"),
    (b"Who?\n\nWhat\0?\n", "line 3: not UTF-8"),
    ('{"question": "a"}\nplain\n', r"line 2: not a JSON object, as the first question is \(Expecting value, column 1"),
    ('{"question": "a"}\n[1]\n', "line 2: not a JSON object"),
    ('{"question": "a"}\n"text"\n', "line 2: not a JSON object"),
    ('{"question": "a"', "line 1: not a JSON object"),
    ('{"question": "a"}\n' + "[" * 100_000, "line 2: not a JSON object"),
    ('{"question": "a", "top_k": ' + "9" * 5000 + "}", "line 1: not a JSON object"),
    ('{"question": "a", "temprature": 1}', 'line 1: unknown key "temprature"; known are id, question'),
    ('{"question": "a", "system": "x"}', 'unknown key "system"'),
    ('{"question": "a", "question": "b"}', "line 1.*a key occurs twice"),
    ('{"id": 7}', 'no "question" in it'),
    ('{"question": "  "}', "question is not a text that is not empty"),
    ('{"question": ["a"]}', "question is not a text"),
    ('{"question": null}', "question is not a text"),
    ('{"question": "a", "id": 1.0}', "id is not"),
    ('{"question": "a", "id": true}', "id is not"),
    ('{"question": "a", "id": null}', "id is not"),
    ('{"question": "a", "max_new_tokens": 0}', "max_new_tokens is not a whole number from 1 on"),
    ('{"question": "a", "max_new_tokens": "5"}', "max_new_tokens is not"),
    ('{"question": "a", "temperature": -0.1}', "temperature is not a number from 0 on"),
    ('{"question": "a", "temperature": NaN}', "NaN is not a number in JSON"),
    ('{"question": "a", "temperature": 1e999}', "temperature is not"),
    (f'{{"question": "a", "temperature": {10**400}}}', "temperature is not"),
    ('{"question": "a", "temperature": true}', "temperature is not"),
    ('{"question": "a", "top_p": 1.01}', "top_p is not a number from 0 to 1"),
    ('{"question": "a", "top_k": 2.0}', "top_k is not"),
    ('{"question": "a", "seed": 9223372036854775808}', "seed is not"),
    ('{"question": "a", "id": "x"}\n\n{"question": "b", "id": "x"}', 'line 3: the id "x" is that of line 1, too'),
    ('{"question": "a", "id": 2}\n{"question": "b"}', "line 2: the id 2 is that of line 1"),
]


@pytest.mark.parametrize(("content", "why"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_is_refused_is_named_with_its_line(content: str | bytes, why: str) -> None:
    with pytest.raises(QuestionsError, match=rf"^q\.txt.*{why}") as error:
        read(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MAX_LINE_BYTES", 10)
    assert len(read("123456789\n1234567890")) == 2
    with pytest.raises(QuestionsError, match="line 2: longer than"):
        read("Who?\n12345678901\n")
    monkeypatch.setattr(questions, "MAX_QUESTIONS", 3)
    with pytest.raises(QuestionsError, match="more than 3 questions"):
        read("a\nb\nc\nd\n")


QUESTIONS = [Question(1, 1, "Who?"), Question(2, "b", "Where\u2028to?"), Question(3, 3, "Why?")]


def answer(question: Question, text: str = "So.") -> dict[str, Any]:
    return {"id": question.id, "question": question.text, "answer": text, "stop_reason": "stop"}


def line(question: Question, text: str = "So.") -> bytes:
    return json.dumps(answer(question, text)).encode() + b"\n"


def opened(path: Path) -> AnswersFile:
    return AnswersFile(path, QUESTIONS)


def test_answers_are_there_at_once_and_known_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = opened(path)
    assert file.answered == frozenset()
    for number, question in enumerate(QUESTIONS[:2], 1):
        file.append(answer(question, "A\u2028\nB \ud83d\ude00"))
        assert len(path.read_bytes().split(b"\n")) == number + 1  # before it is closed
    file.close()
    file.close()
    file = opened(path)
    assert file.answered == {1, "b"}
    file.append(answer(QUESTIONS[2]))
    file.close()
    assert [json.loads(text)["id"] for text in path.read_text().splitlines()] == [1, "b", 3]


def test_a_run_that_was_killed_anywhere_loses_no_whole_line(tmp_path: Path) -> None:
    """Cut after every byte: whole lines stay, the beginning of another one goes."""
    path, whole = tmp_path / "out.jsonl", [line(question, "é\n") for question in QUESTIONS]
    content = b"".join(whole)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        file = opened(path)
        number = content[:size].count(b"\n")
        assert file.answered == {question.id for question in QUESTIONS[:number]}
        for question in QUESTIONS:
            if question.id not in file.answered:
                file.append(answer(question, "é\n"))
        file.close()
        assert path.read_bytes() == content


OTHERS = [
    (b"My notes\nof today", "line 1: no answer"),
    (b"of today", "line 1: no answer"),
    (line(QUESTIONS[0]) + b"of today", "line 2: no answer"),
    (line(QUESTIONS[0]) + b"\n", "line 2: no answer"),
    (b'{"id": 1, "question": "Who?"}\n', "line 1: no answer"),
    (b'{"id": 1, "question": "Who?"}', "line 1: no answer"),  # a whole one, though not ended
    (b'{"id": 1.5, "question": "Who?", "answer": ""}\n', "line 1: no answer"),
    (b'{"id": true, "question": "Who?", "answer": ""}\n', "line 1: no answer"),
    (b'{"id": 1, "question": "Who?", "answer": null}\n', "line 1: no answer"),
    (b"[" * 100_000 + b"\n", "line 1: no answer"),
    (b"\xff\n", "line 1: no answer"),
    (line(QUESTIONS[0]) + line(Question(9, 3, "Who?")), "line 2: another question has the id 3"),
]


@pytest.mark.parametrize(("content", "why"), OTHERS, ids=[str(number) for number in range(len(OTHERS))])
def test_other_files_are_refused_and_left_alone(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(AnswersFileError, match=f"{why}.*--resume-answers") as error:
        opened(path)
    assert str(path) in str(error.value) and path.read_bytes() == content


def test_answers_to_other_questions_stay(tmp_path: Path) -> None:
    """Those that the file no longer has, or that have an id of another type."""
    path = tmp_path / "out.jsonl"
    content = line(Question(1, "1", "Other?")) + line(Question(7, 7, "Gone?")) + line(QUESTIONS[1])
    path.write_bytes(content)
    file = opened(path)
    file.close()
    assert file.answered == {"b"} and path.read_bytes() == content


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = opened(path)
    with pytest.raises(AnswersFileError, match="another run is writing to it"):
        opened(path)
    file.close()
    opened(path).close()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AnswersFileError, match="cannot be written: Is a directory"):
        opened(tmp_path)
    with pytest.raises(AnswersFileError, match="cannot be written: No such file"):
        opened(tmp_path / "no" / "out.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    file = opened(tmp_path / "out.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._file.fileno())
    os.close(full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        file.append(answer(QUESTIONS[0]))
    file.close()


def test_long_lines_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_file, "MAX_LINE_BYTES", 20)
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(QUESTIONS[0]))
    with pytest.raises(AnswersFileError, match="line 1: no answer"):
        opened(path)
    assert path.read_bytes() == line(QUESTIONS[0])
