"""Sources of answers as a person asks for them: `l4ctx ask --cite`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli_runner import (
    FACTS,
    TINY,
    answer,
    check_refused,
    fact_document,
    prefill,
    question,
    run_here,
    text_file,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder of documents that state FACTS."""
    for name in FACTS:
        text_file(tmp_path / "docs" / f"{name}.md", fact_document(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


def line_of(place: Path, name: str) -> int:
    return (place / "docs" / f"{name}.md").read_text().splitlines().index(answer(name).strip()) + 1


def test_an_answer_is_followed_by_its_source(place: Path) -> None:
    shown = run_here("ask", question("b"), "docs", "--cite", "--quiet")
    assert (shown.code, shown.stderr) == (0, "")
    where = f"docs/b.md, line {line_of(place, 'b')}"
    first, _, title, source, line = shown.stdout.splitlines()
    assert first == answer("b").strip() == line.strip() and title == "Attended:" and source.startswith(f"[1] {where} (")


def test_many_answers_from_a_saved_context_and_what_is_added_to_it(place: Path) -> None:
    (place / "docs" / "d.md").rename(place / "d.md")
    prefill("docs", "-o", "context")
    text_file(place / "q.txt", "".join(f"{question(name)}\n" for name in "abd"))
    found = run_here("ask", "--questions", "q.txt", "--context", "context", "--add", "d.md", "--cite", "--in-order")
    assert found.code == 0, found
    for name, text in zip("abd", found.stdout.splitlines(), strict=True):
        content = json.loads(text)
        assert content["answer"] == answer(name).strip() and content["question"] == question(name)
        path = Path("d.md" if name == "d" else f"docs/{name}.md")
        (first,) = content["citations"]["attended"]
        source = path.read_text()
        assert first["path"] == str(path) and first["text"] == source[slice(*first["characters"])].rstrip("\n")
        assert answer(name).strip() in first["text"] and 0.75 <= first["share"] <= 1
        assert content["citations"]["why_none_attended"] is None


def test_as_json_with_none_where_no_document_says_it(place: Path) -> None:
    shown = run_here("ask", "What is the access code for the wild gate?", "docs", "--cite", "--json")
    citations = json.loads(shown.stdout)["citations"]
    assert shown.code == 0 and citations["attended"] == [] and "names no place" in citations["why_none_attended"]
    assert "citations" not in json.loads(run_here("ask", question("a"), "docs", "--json").stdout)


def test_lines_of_a_part_of_a_file_are_those_of_the_file(place: Path) -> None:
    line = line_of(place, "c")
    prefill(paths=(f"docs/c.md:{line - 1}-{line + 1}",))
    shown = run_here("ask", question("c"), "--context", "c", "--cite", "--quiet")
    assert f"[1] docs/c.md:{line - 1}-{line + 1}, line {line} (" in shown.stdout


def test_without_documents_there_is_nothing_to_cite(place: Path) -> None:
    check_refused(run_here("ask", "What?", "--no-documents", "--cite"), 2, "--cite: there are no documents")
