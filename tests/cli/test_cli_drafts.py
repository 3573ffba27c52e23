"""Drafts as a person meets them: the same answers, fewer steps, and --draft-tokens."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import l4ctx.drafts.order
from l4ctx.drafts.order import text_order
from support.cli_runner import (
    ANSWER,
    DOCUMENT,
    QUESTION,
    TINY,
    answer,
    ask,
    check_refused,
    prefill,
    run_here,
    text_file,
)

pytestmark = pytest.mark.usefixtures("small_rows")
WORDS = "The harbor wall was painted again in spring, and nobody knew why.\n" * 60


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    text_file(Path("docs/a.md"), f"{WORDS}{DOCUMENT}{WORDS}")
    text_file(Path("docs/b.md"), answer("b"))


def told(*arguments: str, name: str = "a") -> dict[str, Any]:
    report: dict[str, Any] = json.loads(ask(name, *arguments, "--json", "--quiet").stdout)
    return report


def check_drafted(report: dict[str, Any], name: str = "a") -> None:
    """Most of the answer was copied, and no token of it is another."""
    drafts = report["drafts"]
    assert report["answer"] + "\n" == answer(name)
    assert drafts["proposed"] >= drafts["accepted"] >= report["generated_tokens"] / 2
    assert drafts["drafts"] <= drafts["steps"] == report["generated_tokens"] + 1 - drafts["accepted"]


def test_an_answer_is_copied_from_the_documents() -> None:
    plain = told("docs", "--draft-tokens", "0")
    assert plain["drafts"] is None and plain["answer"] + "\n" == ANSWER
    assert plain["memory"]["draft_index"] == plain["memory"]["predicted"]["draft_index"] == 0
    report = told("docs")
    check_drafted(report)
    assert report["generated_tokens"] == plain["generated_tokens"]
    assert report["memory"]["draft_index"] == 4 * report["prompt_tokens"]
    few = told("docs", "--draft-tokens", "1")["drafts"]
    assert few["proposed"] == few["drafts"] and few["steps"] > report["drafts"]["steps"]


@pytest.mark.parametrize("options", [(), ("--temperature", "0.8", "--seed", "5")], ids=str)
def test_answers_are_the_same(options: tuple[str, ...]) -> None:
    for question in (QUESTION, "Tell me a long story."):
        texts = {
            run_here(
                "ask",
                question,
                "docs",
                "--max-new-tokens",
                "60",
                "--dtype",
                "float32",
                *options,
                "--draft-tokens",
                most,
            ).stdout
            for most in ("0", "2", "40")
        }
        assert len(texts) == 1


@pytest.mark.parametrize("where", [("--kv-dtype", "int8"), ("--kv-dtype", "fp8", "--kv-host-memory", "1K")], ids=str)
def test_answers_from_a_context_are_copied_from_it(where: tuple[str, ...]) -> None:
    assert prefill("docs/a.md", *where[:2]).code == 0
    report = told("--context", "c", *(where[2:] and (*where[2:], "--kv-dir", ".")))
    check_drafted(report)
    kept, question = report["reused_tokens"], report["prompt_tokens"] - report["reused_tokens"]
    assert report["memory"]["draft_index"] == 8 * kept + 4 * question
    check_drafted(told("--add", "docs/b.md", "--context", "c", name="b"), "b")


def test_what_a_context_has_indexed_is_not_indexed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are read into a context, or compared with it: only the question behind them is."""
    made = []

    def counting(ids: array[int]) -> array[int]:
        made.append(len(ids))
        return text_order(ids)

    monkeypatch.setattr(l4ctx.drafts.order, "text_order", counting)
    for arguments in (("--save-context", "c"), ("--context", "c"), ("--save-context", "c")):
        report = told("docs/a.md", *arguments)
        check_drafted(report)
        assert 0 < made.pop() < 40 < report["prompt_tokens"] and not made
        assert 4 * report["prompt_tokens"] <= report["memory"]["draft_index"] <= 4 * report["prompt_tokens"] + 160
    check_drafted(told("docs", "--save-context", "c"))
    made.clear()
    report = told("docs/a.md", "--context", "c")  # which holds more
    check_drafted(report)
    assert made == [report["prompt_tokens"]]


def test_images_among_the_documents() -> None:
    for number in range(2):
        Image.new("RGB", (60, 40), (number, 128, 128)).save(f"docs/{number}.png")
    plain = told("docs", "--draft-tokens", "0")
    report = told("docs")
    check_drafted(report)
    assert plain["answer"] == report["answer"] and len(report["images"]) == 2
    assert prefill("docs").code == 0
    check_drafted(told("--context", "c"))


def test_what_is_no_number_of_tokens_is_refused() -> None:
    for wrong in ("-1", "65", "x"):
        check_refused(ask("a", "docs", "--draft-tokens", wrong), 2, "--draft-tokens")
