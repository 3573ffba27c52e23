"""What a power loss leaves in the file of --resume-answers, and files that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from l4ctx.run.answers_file import AnswersFile, AnswersFileError
from l4ctx.run.questions import Question

FIRST, SECOND = (json.dumps({"id": n, "question": f"{n}?", "answer": "yes"}).encode() + b"\n" for n in (1, 2))


def answered(file: Path) -> frozenset[int | str]:
    answers = AnswersFile(file, [Question(1, 1, "1?"), Question(2, 2, "2?")])
    answers.close()
    return answers.answered


@pytest.mark.parametrize(
    "after",
    [
        bytes(70),
        bytes(70) + b"\n",
        SECOND[:30] + bytes(40),
        SECOND[:30] + bytes(9) + SECOND[39:],
        bytes(39) + SECOND[39:],
    ],
    ids=["zeros", "a line of zeros", "its end", "its middle", "its beginning"],
)
def test_what_a_power_loss_leaves_is_cut_off(tmp_path: Path, after: bytes) -> None:
    (file := tmp_path / "out").write_bytes(FIRST + after)
    assert answered(file) == {1} and file.read_bytes() == FIRST
    if not after.strip(b"\0"):  # nothing else is there
        file.write_bytes(after)
        assert answered(file) == set() and file.read_bytes() == b""


@pytest.mark.parametrize("content", [b"\0\0something else\n", b"x\0\n", FIRST + b"x\0" + SECOND], ids="abc")
def test_other_files_stay(tmp_path: Path, content: bytes) -> None:
    (file := tmp_path / "out").write_bytes(content)
    with pytest.raises(AnswersFileError, match="no answer of l4ctx"):
        answered(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    with pytest.raises(AnswersFileError, match="not a regular file"):
        answered(tmp_path / name)


def test_a_file_that_is_read_in_part_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "out").write_bytes(FIRST + SECOND)
    for lines in ([], [FIRST], [FIRST[:30]], [FIRST, SECOND[:30]]):
        monkeypatch.setattr(AnswersFile, "_lines", lambda self, lines=lines: iter(lines))
        with pytest.raises(AnswersFileError, match="bytes could be read"):
            answered(file)
        assert file.read_bytes() == FIRST + SECOND
