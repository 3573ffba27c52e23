"""Which files and lines a person says are to be read: options that are the same for every command that reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from l4ctx.cli.app import app
from support.cli_runner import ANSWER, QUESTION, TINY, check_refused, prefill, run_here, text_file

OPTIONS = {"files_from", "null", "include", "exclude", "max_file_size", "line_numbers", "keep_duplicates", "git_ref"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    for name, text in {
        "docs/a.md": f"first\n{ANSWER}last\n",
        "docs/b.md": "other words\n",
        "docs/c.md": "other words\n",
        "docs/d.txt": "text\n",
    }.items():
        text_file(Path(name), text)
    return tmp_path


def planned(*arguments: str, stdin: bytes | None = None) -> dict[str, Any]:
    result = run_here("plan", *arguments, "--json", stdin=stdin)
    assert result.code == 0, result
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def paths(report: dict[str, Any]) -> list[str]:
    return [document["path"] for document in report["documents"]]


def test_every_command_that_reads_documents_has_the_same_options() -> None:
    for registered in app.registered_commands:
        callback = registered.callback
        assert callback is not None
        names = set(get_type_hints(callback))
        if "skip_unreadable" in names:
            assert names >= OPTIONS, callback.__name__


def test_lists_of_paths(place: Path) -> None:
    Path("list").write_bytes(b"docs/d.txt\r\n\ndocs/a.md:2\n")
    assert paths(planned("docs/b.md", "--files-from", "list")) == ["docs/b.md", "docs/d.txt", "docs/a.md:2"]
    assert paths(planned("--files-from", "-", "-0", stdin=b"docs/a.md\0docs/d.txt")) == ["docs/a.md", "docs/d.txt"]
    text_file(Path("-"), "a file of that name")
    assert paths(planned("--files-from", "-", stdin=b"-\n")) == ["-"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["plan", "docs", "-0"], None, ["--null (-0) is for --files-from"]),
        (["plan", "--files-from", "none"], None, ["none: the list of files cannot be read: No such file"]),
        (["plan", "--files-from", "-"], b"", ["standard input: the list of files is empty"]),
        (["plan", "--files-from", "-"], b"a\0b", ["NUL characters", "-0 says"]),
        (["plan", "--files-from", "-"], b"docs/none\n", ["docs/none: no such file or folder"]),
        (["plan", "-", "--files-from", "-"], b"x", ["both a document and the list of files"]),
        (["ask", "-", "--files-from", "-"], b"x", ["both the question and the list of files"]),
        (["plan", "docs", "--git-ref", "HEAD"], None, ["docs: is in no git work tree"]),
        (["plan", "docs", "--git-ref", "-x"], None, ["--git-ref: '-x' names no commit"]),
        (["plan", "docs", "--git-ref", "a", "--diff", "a..b"], None, ["give one of them"]),
        (["plan", "docs", "--line-numbers", "--diff", "a..b"], None, ["--line-numbers: a difference has"]),
        (["plan", "-", "--diff", "a..b"], b"x", ["- (standard input) is in no commit"]),
        (["ask", "docs", "--diff", "a..b"], None, ["docs: the name of a folder, and no question about it"]),
        (["plan", "docs/a.md:2-9"], None, ["docs/a.md:2-9 has 3 lines, and 2-9 was asked for"]),
        (["plan", "docs/x.md:2-9"], None, ["docs/x.md: no such file or folder; did you mean docs/"]),
        (["plan", "docs", "--include", "*.rst"], None, ["found nothing to read in docs", "not among --include"]),
        (["plan", "docs", "--exclude", ""], None, ["--exclude: a pattern is empty"]),
        (["plan", "docs/a.md", "--max-file-size", "8B"], None, ["docs/a.md: 58 B, more than --max-file-size 8 B"]),
    ],
)
def test_what_is_refused(place: Path, arguments: list[str], stdin: bytes | None, parts: list[str]) -> None:
    check_refused(run_here(*arguments, stdin=stdin), 2, *parts)


def test_what_is_left_out_is_said(place: Path) -> None:
    result = run_here("ask", QUESTION, "docs", "--exclude", "*.txt", "--max-new-tokens", "1")
    assert "l4ctx: skipped docs/c.md: the same content as docs/b.md\n" in result.stderr
    assert "l4ctx: skipped 1 as --include and --exclude say\n" in result.stderr
    skipped = planned("docs", "--exclude", "*.txt")["skipped"]
    assert [entry["path"] for entry in skipped] == ["docs/c.md", "docs/d.txt"]
    assert len(paths(planned("docs", "--keep-duplicates"))) == 4


def test_patterns_of_ranges(place: Path) -> None:
    assert paths(planned("docs/*.md:1-1")) == ["docs/a.md:1", "docs/b.md:1", "docs/c.md:1"]


def test_options_that_change_texts_are_part_of_what_is_compared(place: Path) -> None:
    assert prefill("--line-numbers").code == 0
    check_refused(prefill("--quiet"), 7, "read differently", "--line-numbers")
    assert "tokens are in c already" in prefill("--line-numbers").stderr
    check_refused(run_here("ask", "q", "--context", "c", "--line-numbers"), 2, "--line-numbers: what it is about")
    check_refused(run_here("ask", "q", "docs", "--context", "c", "--quiet"), 2, "start differently")
    add = ("ask", "q", "--context", "c", "--add", "docs/a.md", "--max-new-tokens", "1")
    assert "skipped docs/a.md: the context holds it already" in run_here(*add, "--line-numbers").stderr
    documents = json.loads(run_here(*add, "--json").stdout)["documents"]
    assert [document["path"] for document in documents][-1] == "docs/a.md (2)"
