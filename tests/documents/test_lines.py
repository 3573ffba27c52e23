"""Ranges and numbers of lines: what sed and grep make of the same file."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from l4ctx.documents.document import Document, DocumentError, DocumentSet
from l4ctx.documents.lines import LineRange, LinesError, numbered, split_range, with_range
from l4ctx.documents.reader import read_documents
from l4ctx.documents.selection import Selection

TEXTS = {
    "ended": "one\ntwo\n\nfour\n",
    "not ended": "one\ntwo\nthree",
    "one": "alone",
    "other ends": "a\r\nb\rc\x0bd\u2028e\x85f\ng\r\n",
    "blank": "\n\n \n\n",
}
needs_tools = pytest.mark.skipif(not (shutil.which("sed") and shutil.which("grep")), reason="no sed or no grep here")


def read(*paths: str | Path, **selection: bool) -> DocumentSet:
    return read_documents(paths, stdin=None, selection=Selection(**selection))


def only(*paths: str | Path, **selection: bool) -> Document:
    (document,) = read(*paths, **selection).documents
    return document


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, check=False, env={"LC_ALL": "C"}).stdout.decode()


@needs_tools
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ranges_are_what_sed_prints(text: str, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(text, newline="")
    lines = int(output("sed", "-n", "$=", file))
    for first in range(1, lines + 1):
        for last in range(first, lines + 1):
            printed = output("sed", "-n", f"{first},{last}p", file)
            document = only(f"{file}:{first}-{last}") if printed.strip() else None
            assert document is None or document.text == printed
            assert document is None or (document.first_line, document.source[-2 - len(f"{last}") :][0]) != (0, "")
    assert LineRange(lines, None).of(text, "t") == output("sed", "-n", "$p", file)


@needs_tools
@pytest.mark.parametrize("text", [text for text in TEXTS.values() if text.strip()])
def test_numbers_are_those_of_grep(text: str, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(text, newline="")
    printed = output("grep", "-an", "", file)
    shown = only(file, line_numbers=True).text
    assert (shown if text.endswith("\n") else f"{shown}\n") == printed
    assert only(file, line_numbers=True).reading == "numbered" and only(file).reading == ""
    if "\n" in text:
        assert only(f"{file}:2-2", line_numbers=True).text == printed.splitlines(keepends=True)[1] or "\r" in text


@needs_tools
@pytest.mark.slow
def test_ranges_of_a_long_file_are_what_sed_prints(tmp_path: Path) -> None:
    rng = random.Random(1)
    file = tmp_path / "long.txt"
    file.write_text("".join(rng.choice(["", "a", "words of a line", "é" * 30]) + "\n" for _ in range(5000)))
    for _ in range(20):
        first = rng.randrange(1, 5001)
        last = rng.randrange(first, 5001)
        printed = output("sed", "-n", f"{first},{last}p", file)
        if printed.strip():
            assert only(f"{file}:{first}-{last}").text == printed


@pytest.mark.parametrize(
    ("range_", "reason"),
    [
        ("3-5", r"t.txt:3-5 has 4 lines, and 3-5 was asked for"),
        ("5", "has 4 lines, and 5 was asked for"),
        ("5-", "has 4 lines, and 5- was asked for"),
        ("0-2", "lines count from 1"),
        ("3-2", "lines count from 1, and the first one comes first"),
        ("999999999999999999", "has 4 lines"),
    ],
)
def test_lines_that_are_not_there_are_refused(range_: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXTS["ended"])
    with pytest.raises(LinesError, match=reason):
        read(f"{tmp_path / 't.txt'}:{range_}")


def test_a_file_with_such_a_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXTS["ended"])
    (tmp_path / "t.txt:2-3").write_text("of its own")
    assert only(tmp_path / "t.txt:2-3").text == "of its own"
    assert only(tmp_path / "t.txt:2-3:1").text == "of its own"
    assert only(tmp_path / "t.txt:1-2").text == "one\ntwo\n"
    assert split_range(str(tmp_path / "t.txt:1-2")) == (str(tmp_path / "t.txt"), LineRange(1, 2))


@pytest.mark.parametrize("path", ["a", "a:", "a:b", "a:-3", ":3", "a/:3", "a:1-2-3", "a:1,2", "-", "a:1 "])
def test_what_is_no_range(path: str) -> None:
    assert with_range(path) == (path, None)


def test_each_range_is_a_document_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(TEXTS["ended"])
    found = read(f"{file}:1-2", f"{file}:4", f"{file}:1-2", file, f"{file}:3-")
    assert [document.text for document in found.documents] == ["one\ntwo\n", "four\n", TEXTS["ended"], "\nfour\n"]
    assert [document.first_line for document in found.documents] == [1, 4, 1, 3]
    assert [document.source.rpartition("t.txt")[2] for document in found.documents] == [":1-2", ":4", "", ":3-"]
    assert [entry.reason.rpartition("/")[2] for entry in found.skipped] == ["t.txt:1-2"]
    before = [document.sha256 for document in found.documents]
    file.write_text(TEXTS["ended"] + "more\n")
    after = [document.sha256 for document in read(f"{file}:1-2", f"{file}:4", file, f"{file}:3-").documents]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, False]


def test_what_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a\x01\0\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;")
    with pytest.raises(LinesError, match="only text has lines"):
        read(tmp_path / "a.gif:1")
    with pytest.raises(DocumentError, match="is no file, and has no lines"):
        read(f"{tmp_path}:1")


def test_notebooks_have_cells_in_place_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "n.ipynb"
    cells = [{"cell_type": "code", "source": "x = 1\ny", "metadata": {}, "outputs": []}]
    file.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}, indent=1))
    assert only(file, line_numbers=True) == only(file)
    with pytest.raises(LinesError, match="--keep-payload reads the file's lines"):
        read(f"{file}:1-2")
    (document,) = read_documents([f"{file}:1-2"], stdin=None, keep_payload=True).documents
    assert document.text == '{\n "cells": [\n'


def test_numbers_are_the_file_s_behind_what_is_left_out(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.encodebytes(random.Random(2).randbytes(600)).decode().rstrip("\n")
    text = f"first\n<img src='{uri}'>\nlast\n"
    (tmp_path / "a.html").write_text(text)
    shown = only(tmp_path / "a.html", line_numbers=True)
    assert shown.payload is not None and "left out]" in shown.text and len(shown.text) < 200
    assert shown.text.endswith(f"\n{text.count(chr(10))}:last\n")
    assert [line.split(":")[0] for line in shown.text.splitlines()] == [
        str(number) for number in range(1, text.count("\n") + 1)
    ]


def test_numbering() -> None:
    assert numbered("") == "" and numbered("a\n\nb", 9) == "9:a\n10:\n11:b"
