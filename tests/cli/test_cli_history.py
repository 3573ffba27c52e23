"""`l4ctx log`, `list` and `rm`: what is remembered of runs, how it is switched off, and what is deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from l4ctx.contexts.locks import readers_lock, writer_lock
from l4ctx.history.answers import AnswerLog
from support.cli_runner import ANSWER, FACTS, QUESTION, TINY, answer, check_refused, fact_document, question, run_here
from support.cli_runner import text_file as write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write(Path("docs/a.md"), fact_document("a"))
    write(Path("docs/b.md"), fact_document("b"))
    return tmp_path


@pytest.fixture
def context(place: Path) -> Path:
    assert run_here("prefill", "docs", "-o", "c", "--quiet").code == 0
    return place / "c"


def logged() -> list[str]:
    return [record["question"] for record in AnswerLog().records()]


def test_answers_are_logged_and_found_again(context: Path) -> None:
    assert run_here("ask", QUESTION, "--context", "c", "--quiet").stdout == ANSWER
    write(Path("q.txt"), f"{question('a')}\n{question('b')}\n")
    assert run_here("ask", "--questions", "q.txt", "--context", "c", "--quiet", "--in-order").code == 0
    assert run_here("ask", question("b"), "docs/b.md", "--json", "--quiet").code == 0
    assert sorted(logged()) == sorted([question("a"), question("a"), question("b"), question("b")])
    first, *_, last = (json.loads(line) for line in run_here("log", "--json").stdout.splitlines())
    assert (first["answer"] + "\n", first["sources"], first["context"]) == (
        ANSWER,
        ["docs/a.md", "docs/b.md"],
        str(context),
    )
    assert first["model"] == str(TINY) and first["generated_tokens"] > 5 and first["seconds"]["decode"] > 0
    assert (last["sources"], last["context"], last["stop_reason"]) == (["docs/b.md"], None, "stop")
    shown = run_here("log", "--last").stdout
    assert f"\n\n{question('b')}\n\n{answer('b')}" in shown and "about: docs/b.md\n" in shown
    assert run_here("log", "-n", "2").stdout.count("What is the access code") == 2
    assert run_here("log", FACTS["b"][1]).stdout.count(FACTS["b"][1]) == 2
    assert run_here("log", "nothing").stderr == "l4ctx: no such answer is in the log\n"
    assert run_here("log", "--path").stdout == f"{AnswerLog().file}\n"
    check_refused(run_here("log", "--last", "-n", "2"), 2, "--last shows one")
    check_refused(run_here("log", "--clear"), 2, "delete all answers", "add --yes")
    assert run_here("log", "--clear", "--yes").code == 0 and logged() == []


def test_it_can_be_switched_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("ask", QUESTION, "docs/a.md", "--quiet")
    assert run_here(*arguments, "--no-log").stdout == ANSWER
    monkeypatch.setenv("L4CTX_LOG", "0")
    assert run_here(*arguments).stdout == ANSWER
    monkeypatch.delenv("L4CTX_LOG")
    write(Path("config/l4ctx/config.toml"), "log = false\n")
    assert run_here(*arguments).stdout == ANSWER
    assert not Path("state").exists()


def test_a_log_that_cannot_be_written_costs_no_answer(place: Path) -> None:
    write(Path("state"), "a file where the folder should be")
    result = run_here("ask", QUESTION, "docs/a.md")
    assert (result.code, result.stdout) == (0, ANSWER)
    assert result.stderr.count("the log of answers cannot be written: ") == 1 and "--no-log" in result.stderr
    assert run_here("list").code == 0


def test_what_is_listed(context: Path) -> None:
    assert run_here("prefill", "docs/a.md", "-o", "gone", "--quiet").code == 0
    os.rename("gone", "moved")
    listed = json.loads(run_here("list", "--json").stdout)
    assert [(row["path"], row["state"]) for row in listed["contexts"]] == [
        (str(context.parent / "gone"), "missing"),
        (str(context), "complete"),
    ]
    row = listed["contexts"][1]
    said = json.loads(run_here("inspect", "c", "--json").stdout)
    assert row["tokens"] == said["states"][0]["tokens"] and row["model"] == str(TINY)
    assert row["bytes"] == sum(file.stat().st_size for file in context.rglob("*") if file.is_file())
    assert [(row["path"], row["state"]) for row in listed["models"]] == [(str(TINY), "here")]
    write(Path("config/l4ctx/config.toml"), f'[models]\nmine = "{TINY}"\nother = "/nowhere"\n')
    table = run_here("list").stdout
    for part in (str(context), "complete", "missing", "mine", "other", f"{row['tokens']:,}"):
        assert part in table
    lock = writer_lock(context)
    try:
        assert "being written" in run_here("list").stdout
    finally:
        lock.close()
    (context / "journal").write_bytes(b"0" * 99 + b"\n")
    assert "damaged" in run_here("list", "--prune").stdout and "gone" not in run_here("list").stdout


def test_a_context_is_deleted_and_nothing_else(context: Path) -> None:
    write(context / "mine.txt", "a person's own file")
    write(context / "blocks" / "mine.txt", "another")
    (context / "tail-0123456789ab.safetensors").symlink_to(write(Path("target"), "stays"))
    check_refused(run_here("rm", "c"), 2, "delete c (", " tokens, ", "add --yes")
    assert run_here("rm", "c", "--yes").stderr.endswith("; other files are in the folder, and stay\n")
    assert sorted(file.relative_to(context).as_posix() for file in context.rglob("*")) == [
        "blocks",
        "blocks/mine.txt",
        "mine.txt",
    ]
    assert Path("target").read_text() == "stays"
    assert json.loads(run_here("list", "--json").stdout)["contexts"] == []
    check_refused(run_here("rm", "c", "--yes"), 7, "c: not a saved context; nothing was deleted")
    check_refused(run_here("rm", "none", "--yes"), 7, "none: no such folder")


def test_a_context_goes_with_its_folder(context: Path) -> None:
    Path("link").symlink_to("c")
    check_refused(run_here("rm", "link", "--yes"), 7, "link: a symbolic link; name the folder itself")
    check_refused(run_here("rm", "c", "docs", "--yes"), 7, "docs: not a saved context")
    for lock, told in ((writer_lock(context), "writing to it"), (readers_lock(context), "reading it")):
        assert lock is not None
        try:
            check_refused(run_here("rm", "c", "--yes"), 7, f"another process is {told}")
        finally:
            lock.close()
    assert run_here("ask", QUESTION, "--context", "c", "--quiet").stdout == ANSWER
    result = run_here("rm", "c", "--yes", "--json", "--quiet")
    assert (result.code, result.stderr) == (0, "") and not context.exists()
    assert json.loads(result.stdout)["removed"][0]["path"] == "c"
