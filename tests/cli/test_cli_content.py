"""What the commands say of payload, encodings and files that are no text; and what a saved context makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli_runner import TINY, changed_checkpoint, check_refused, run_here

SECRET = "The access code for the amber falcon is 48213."
QUESTION = "What is the access code for the amber falcon?"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    cells = [
        {"cell_type": "markdown", "source": SECRET},
        {"cell_type": "code", "source": "p()", "outputs": [{"data": {"image/png": "iVBOR" * 80}}]},
    ]
    Path("a.ipynb").write_text(json.dumps({"nbformat": 4, "cells": cells}))
    Path("koi.txt").write_bytes(f"{SECRET} Ключ".encode("koi8_r"))


def tokens(*arguments: str) -> int:
    return json.loads(run_here("plan", *arguments, "--json", "--quiet").stdout)["prompt_tokens"]


def test_payload_is_left_out_with_its_tokens_in_every_command() -> None:
    saved = tokens("a.ipynb", "--keep-payload") - tokens("a.ipynb")
    for command in (["ask", QUESTION], ["plan"], ["prefill", "-o", "kept"]):
        notes = [line for line in run_here(*command, "a.ipynb").stderr.splitlines() if "left out" in line]
        assert len(notes) == 1
        about = int(notes[0].partition("l4ctx: a.ipynb: 1 output of the notebook left out, about ")[2].split()[0])
        assert 0 < about < saved
    assert run_here("ask", QUESTION, "a.ipynb", "--quiet").stdout.strip() == SECRET


def test_a_context_is_of_the_text_that_was_read() -> None:
    for path, option in (("a.ipynb", ["--keep-payload"]), ("koi.txt", ["--encoding", "koi8-r"])):
        assert run_here("prefill", path, "-o", f"{path}.kept").code == 0
        same = run_here("ask", QUESTION, path, "--context", f"{path}.kept")
        assert same.code == 0 and "are taken from" in same.stderr
        other = run_here("ask", QUESTION, path, *option, "--context", f"{path}.kept")
        assert other.code != 0 or "are taken from" not in other.stderr


@pytest.mark.parametrize("command", [["ask", "q"], ["plan"], ["prefill", "-o", "kept"]])
@pytest.mark.parametrize("name", ["klingon", "base64", "a\x1b[31m"])
def test_an_encoding_that_there_is_not(command: list[str], name: str) -> None:
    check_refused(run_here(*command, "koi.txt", "--encoding", name), 2, "--encoding: ", "is not an encoding of text")


@pytest.mark.parametrize("option", [["--encoding", "gbk"], ["--keep-payload"]])
def test_options_that_are_part_of_a_context(option: list[str]) -> None:
    assert run_here("prefill", "a.ipynb", "-o", "kept").code == 0
    check_refused(run_here("ask", "q", "--context", "kept", *option), 2, option[0], "l4ctx prefill")


def test_a_file_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    with Path("huge.log").open("wb") as file:
        file.write(b"words\n" * 20_000)
        file.truncate(1 << 42)
    check_refused(run_here("ask", "q", "huge.log", "--encoding", "latin-1"), 5, "huge.log: 4.0 TiB")
    check_refused(run_here("plan", ".", "--encoding", "latin-1"), 5, "huge.log: 4.0 TiB")
    short = str(changed_checkpoint(tmp_path, max_position_embeddings=512))
    check_refused(
        run_here("plan", "huge.log", "--model", short), 4, "huge.log: 4.0 TiB of text", "more than 512 tokens"
    )
