"""What the command says of contexts that are still being read, that were interrupted, and that cannot be used: the
true reason each time."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import l4ctx.engine.prefill
from l4ctx.contexts import locks
from l4ctx.contexts.difference import first_difference
from l4ctx.contexts.reader import Context
from l4ctx.spans import Span
from support.cli_runner import (
    Result,
    answer,
    ask,
    changed_checkpoint,
    check_answers,
    check_refused,
    fact_document,
    prefill,
    run_here,
    spans,
    text_file,
    told,
)

pytestmark = pytest.mark.usefixtures("small_rows")
CHUNK, ROW = 512, 1024


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder with `docs`, and with a model in the environment."""
    checkpoint = changed_checkpoint(tmp_path, attention_chunk_size=CHUNK)
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("L4CTX_MODEL", str(checkpoint))
    for name in "abc":
        text_file(Path("docs", f"{name}.md"), fact_document(name))
    return tmp_path / "place"


def while_reading(monkeypatch: pytest.MonkeyPatch, steps: int, act: Callable[[], object], *arguments: str) -> Result:
    """`prefill`; after so many steps `act` is called beside it, once what was sealed is in the journal."""

    def some(*given: Any, **options: Any) -> Iterator[Any]:
        for number, step in enumerate(read(*given, **options), 1):
            yield step
            if number == steps:
                given[1].rows.flush()  # the cache's writer
                with monkeypatch.context() as patch:
                    patch.setattr(l4ctx.engine.prefill, "prefill", read)
                    act()

    read = l4ctx.engine.prefill.prefill
    with monkeypatch.context() as patch:
        patch.setattr(l4ctx.engine.prefill, "prefill", some)
        return prefill("--quiet", *arguments)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_what_is_sealed_is_asked_while_the_rest_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    found: list[Any] = []

    def act() -> None:
        found.extend(
            [
                ask("a", "--context", "c"),
                told(),
                run_here("inspect", "c"),
                run_here("inspect", "c", "--json"),
                told("docs"),
                ask("c", "docs", "--context", "c"),
            ]
        )

    assert while_reading(monkeypatch, 3, act, "--kv-dtype", kv_dtype).code == 0
    asked, report, listed, inspected, beside, asked_beside = found
    kept = spans()
    done = f"{ROW:,} of {kept[-1]:,} tokens"
    assert kept[1] < ROW < kept[2]  # inside the second document
    assert (asked.code, asked.stdout) == (0, answer("a"))
    assert f"l4ctx: c is still being read: the answer is from the first {done}\n" in asked.stderr
    assert report["reused_tokens"] == ROW and report["context_is_partial"] == {"tokens": ROW, "of": kept[-1]}
    assert report["documents"] == [
        {"path": "docs/a.md", "tokens": kept[1] - kept[0]},
        {"path": "docs/b.md", "tokens": ROW - kept[1], "is_partial": True},
    ]
    assert listed.code == 0 and f"still being read, {done} so far" in listed.stdout
    assert json.loads(inspected.stdout)["is_being_written"] is True
    assert beside["reused_tokens"] == ROW and len(beside["documents"]) == 3
    assert (asked_beside.code, asked_beside.stdout) == (0, answer("c"))
    assert f"l4ctx: c is still being read: {done} are there so far\n" in asked_beside.stderr
    check_answers()
    report = told()
    assert "context_is_partial" not in report and not any("is_partial" in entry for entry in report["documents"])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_how_far_a_first_reading_is_said_truly(place: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Before the first block is sealed nothing is answered; and once the writer is gone, it was interrupted."""
    found: list[Result] = []

    def act() -> None:
        found.append(ask("a", "--context", "c"))
        raise KeyboardInterrupt

    assert while_reading(monkeypatch, steps, act).code == 130
    (state,) = Context.read(Path("c")).states
    done = len(state.blocks) * ROW
    if done:
        assert found[0].code == 0 and f"the first {done:,} of {state.tokens:,} tokens\n" in found[0].stderr
    else:
        check_refused(
            found[0], 7, f"c: it is still being read (0 of {state.tokens:,} tokens); nothing of it can be used"
        )
    check_refused(ask("a", "--context", "c"), 7, f"c: reading was interrupted after {done:,} of {state.tokens:,} tok")
    assert json.loads(run_here("inspect", "c", "--json").stdout)["is_being_written"] is False


def test_a_context_whose_documents_are_being_changed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is from the old ones, and that is said, whether the writer lives or not."""
    prefill("--quiet")
    old, found = spans()[-1], []
    text_file(Path("docs/c.md"), "A new line.\n" + fact_document("c"))

    def act() -> None:
        found.append(ask("c", "--context", "c"))
        raise KeyboardInterrupt

    assert while_reading(monkeypatch, 1, act).code == 130
    found.append(ask("c", "--context", "c"))
    for result, how in zip(found, ("are still being read (2,048 of ", "were read up to 2,048 of "), strict=True):
        assert (result.code, result.stdout) == (0, answer("c"))
        assert f"l4ctx: c: newer documents {how}" in result.stderr
        assert f"; the answer is from the {old:,} tokens of the previous ones\n" in result.stderr
    assert prefill("--quiet").code == 0
    assert ask("c", "--context", "c").stderr == ""


def test_a_writer_that_has_just_begun(place: Path) -> None:
    prefill("--quiet")
    os.truncate("c/journal", 0)
    Path("c/head.json").unlink()
    with open("c/writer.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(ask("a", "--context", "c"), 7, "c: it is still being read (it has just begun); nothing of it")
        assert "none yet: a writer has just begun" in run_here("inspect", "c").stdout
    check_refused(ask("a", "--context", "c"), 7, "c: nothing was read yet; ")


def test_who_keeps_readers_out_is_not_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill("--quiet")
    monkeypatch.setattr(locks, "READERS_WAIT", 0.6)
    with open("c/readers.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["ask", "q", "--context", "c", "-q"], ["inspect", "c"]):
            check_refused(run_here(*command), 7, "c/readers.lock: another process has held this lock for 1 seconds")
        assert "l4ctx: c/readers.lock: another process has locked it; waiting for" in ask("a", "--context", "c").stderr
    check_answers(names="a")


# Why what is kept cannot be used

REASONS: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "first block missing": (
        lambda: next(Path("c/blocks").glob("000000-*")).unlink(),
        [],
        "the documents are the same, but their first block is missing or damaged",
    ),
    "first block cut short": (
        lambda: os.truncate(next(Path("c/blocks").glob("000000-*")), 5000),
        [],
        "the documents are the same, but their first block is missing or damaged",
    ),
    "blocks folder missing": (
        lambda: shutil.rmtree("c/blocks"),
        [],
        "the documents are the same, but their first block is missing or damaged",
    ),
    "token ids missing": (
        lambda: next(Path("c").glob("tokens-*")).unlink(),
        [],
        "its list of tokens is missing or damaged",
    ),
    "system prompt": (
        lambda: None,
        ["--system", "Be brief.", "--replace"],
        "these documents start differently (what comes before the first document differs (--system))",
    ),
    "first changed": (
        lambda: text_file(Path("docs/a.md"), "New."),
        [],
        "these documents start differently (docs/a.md has changed)",
    ),
    "first removed": (
        lambda: Path("docs/a.md").unlink(),
        ["--replace"],
        "these documents start differently (docs/b.md is where docs/a.md was)",
    ),
    "renamed": (
        lambda: Path("docs/a.md").rename("docs/aa.md"),
        ["--replace"],
        "these documents start differently (docs/aa.md was docs/a.md before)",
    ),
}


@pytest.mark.parametrize("what", REASONS)
def test_the_true_reason_why_nothing_can_be_used(place: Path, what: str) -> None:
    act, options, reason = REASONS[what]
    prefill("--quiet")
    total = spans()[-1]
    act()
    result = prefill(*options)
    assert result.code == 0
    assert f"l4ctx: none of the {total:,} tokens in c can be used: {reason}\n" in result.stderr
    check_answers(names="c")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [("a", "ab", "docs/b.md is new"), ("ab", "aB", "docs/b.md has changed"), ("ab", "ac", "docs/c.md is where")],
)
def test_documents_that_are_too_short_to_go_on_from(place: Path, before: str, after: str, reason: str) -> None:
    for name in "abc":
        text_file(Path("docs", f"{name}.md"), answer(name))
    prefill("--quiet", paths=tuple(f"docs/{name}.md" for name in before))
    if after == "aB":
        text_file(Path("docs/b.md"), "New: " + answer("b"))
    result = prefill("--replace", paths=tuple(f"docs/{name.lower()}.md" for name in after))
    assert result.code == 0 and "tokens in c can be used: the first " in result.stderr
    assert f" tokens are the same, too few to continue from ({reason}" in result.stderr


def test_an_unreadable_block_is_no_damage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill("--quiet")
    block, opened = next(Path("c/blocks").glob("000001-*")), os.open

    def refused(path: Any, *arguments: Any, **others: Any) -> int:
        if Path(path) == block:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        for result in (prefill("--quiet"), ask("a", "--context", "c", "-q")):
            check_refused(
                result,
                7,
                f"{block}: cannot be opened: Permission denied; c was not changed: fix that "
                "and run the same command again, or read it again: l4ctx prefill with the same documents, the same -o ",
            )
    check_answers()


def span(source: str, start: int, stop: int, digest: str = "") -> Span:
    return Span(source, start, stop, digest or source)


@pytest.mark.parametrize(
    ("given", "same", "reason"),
    [
        ([span("a", 5, 20), span("b", 20, 50)], 3, "what comes before the first document differs (--system)"),
        ([span("a", 9, 24), span("b", 24, 54)], 5, "what comes before the first document differs (--system)"),
        ([span("a", 5, 20), span("b", 20, 55, "other")], 30, "b has changed"),
        ([span("a", 5, 20), span("x", 20, 55)], 22, "x is where b was"),
        ([span("a", 5, 20), span("x", 20, 55, "b")], 22, "x was b before"),
        (
            [span("a", 5, 20), span("b", 20, 45)],
            33,
            "b is read differently now (--encoding, --pdf, --no-images or --line-numbers)",
        ),
        ([span("a", 5, 20)], 20, "b is not among them"),
        ([span("a", 5, 20), span("b", 20, 50), span("c", 50, 70)], 50, "c is new"),
        ([span("a", 5, 20), span("b", 20, 50)], 50, "they end there"),
    ],
)
def test_the_first_difference(given: list[Span], same: int, reason: str) -> None:
    assert first_difference([span("a", 5, 20), span("b", 20, 50)], given, same) == reason


def test_the_first_difference_of_nothing() -> None:
    for saved, given in itertools.product(([], [span("a", 3, 9)]), repeat=2):
        assert first_difference(saved, given, 0).startswith("what comes before")
