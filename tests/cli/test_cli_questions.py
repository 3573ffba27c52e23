"""Many questions about the same documents as a person asks them: `l4ctx ask --questions`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import l4ctx.run.answering
from support.cli_runner import (
    COMMAND,
    TINY,
    Result,
    answer,
    check_refused,
    closed_pipe,
    fact_document,
    prefill,
    question,
    run_here,
    text_file,
)

NAMES = "abcd"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder of documents that state FACTS, and of questions about them."""
    for name in NAMES:
        text_file(tmp_path / "docs" / f"{name}.md", fact_document(name))
    text_file(tmp_path / "q.txt", "".join(f"{question(name)}\n" for name in NAMES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


def questions(*entries: dict[str, Any], name: str = "q.jsonl") -> str:
    text_file(Path(name), "".join(json.dumps(entry) + "\n" for entry in entries))
    return name


def answers(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result
    return [json.loads(line) for line in result.stdout.splitlines()]


def asked(*arguments: str, file: str = "q.txt", **options: Any) -> list[dict[str, Any]]:
    return answers(run_here("ask", "--questions", file, *arguments, "--quiet", **options))


RIGHT = [
    {
        "id": number,
        "question": question(name),
        "answer": answer(name).strip(),
        "stop_reason": "stop",
    }
    for number, name in enumerate(NAMES, 1)
]


def without_counts(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert all(entry.pop("generated_tokens") > 5 for entry in found)
    return found


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_each_answer_is_a_line(place: Path, batch: int | None) -> None:
    options = () if batch is None else ("--batch", str(batch))
    found = asked("docs", *options)
    assert all(list(entry)[:5] == ["id", "question", "answer", "stop_reason", "generated_tokens"] for entry in found)
    assert without_counts(sorted(found, key=lambda entry: entry["id"])) == RIGHT


def test_what_is_read_may_be_anything_that_one_question_may_read(place: Path) -> None:
    """A context, one that is added to, one that is kept, and a pipe; with the questions from standard input, too."""
    assert prefill(paths=("docs/a.md", "docs/b.md"), context="c").code == 0
    assert without_counts(asked("--context", "c", "--in-order"))[:2] == RIGHT[:2]
    assert without_counts(asked("--context", "c", "--add", "docs/c.md", "--add", "docs/d.md", "--in-order")) == RIGHT
    assert without_counts(asked("docs", "--save-context", "new", "--in-order")) == RIGHT
    piped = "".join(fact_document(name) for name in NAMES).encode()
    assert without_counts(asked("--in-order", stdin=piped)) == RIGHT
    asking = (place / "q.txt").read_bytes()
    assert without_counts(asked("--in-order", "--context", "new", file="-", stdin=asking)) == RIGHT
    refused = run_here("ask", "--questions", "-", "-", stdin=asking)
    check_refused(refused, 2, "- (standard input) cannot be both the questions and a document")
    assert len(asked("--no-documents", "--max-new-tokens", "3")) == 4


def test_each_question_may_have_settings_of_its_own(place: Path) -> None:
    """They come before those of all, and an answer is what the same options give to one question alone."""
    file = questions(
        {"id": "short", "question": question("a"), "max_new_tokens": 3},
        {"id": 7, "question": question("b"), "temperature": 0.9, "seed": 3, "top_k": 50, "top_p": 0.99},
        {"question": f" {question('c')}\n", "temperature": 0},
        {"id": "all", "question": question("d")},
    )
    found = asked("docs", "--temperature", "2", "--seed", "5", "--max-new-tokens", "20", "--in-order", file=file)
    options = [
        ("--temperature", "2", "--seed", "5", "--max-new-tokens", "3"),
        ("--temperature", "0.9", "--seed", "3", "--top-k", "50", "--top-p", "0.99", "--max-new-tokens", "20"),
        (),
        ("--temperature", "2", "--seed", "5", "--max-new-tokens", "20"),
    ]
    for entry, name, given in zip(found, NAMES, options, strict=True):
        alone = json.loads(run_here("ask", question(name), "docs", *given, "--json", "--quiet").stdout)
        assert {key: alone[key] for key in ("answer", "stop_reason", "generated_tokens")}.items() <= entry.items()
    assert [entry["id"] for entry in found] == ["short", 7, 3, "all"]
    assert found[0]["stop_reason"] == "length" and found[2]["question"] == question("c")


def test_drafts_change_no_answer(place: Path) -> None:
    """They are on unless they are asked not to be, and are counted over all answers."""
    for options in ((), ("--draft-tokens", "5"), ("--draft-tokens", "0")):
        *found, report = asked("docs", "--in-order", "--batch", "2", "--json", *options)
        tokens, counts = sum(entry["generated_tokens"] for entry in found), report["drafts"]
        if options == ("--draft-tokens", "0"):
            assert counts is None and report["memory"]["draft_index"] == 0
        else:
            assert counts["accepted"] > tokens / 4 and counts["steps"] + counts["accepted"] == tokens + len(found)
            assert report["memory"]["draft_index"] == report["memory"]["predicted"]["draft_index"] > 0
        assert without_counts(found) == RIGHT


def test_answers_are_printed_as_they_are_ready_or_in_order(place: Path) -> None:
    file = questions(
        *(
            {"question": question(name), "max_new_tokens": tokens}
            for name, tokens in zip(NAMES, (15, 2, 8, 2), strict=True)
        )
    )
    one_by_one = ("docs", "--batch", "2", "--draft-tokens", "0")  # tokens: the longest answer is the last
    assert [entry["id"] for entry in asked(*one_by_one, file=file)] == [2, 3, 4, 1]
    assert [entry["id"] for entry in asked("docs", "--batch", "2", "--in-order", file=file)] == [1, 2, 3, 4]


def test_the_report_is_the_last_line(place: Path) -> None:
    *found, report = answers(run_here("ask", "--questions", "q.txt", "docs", "--json", "--batch", "2"))
    assert len(found) == 4 and all("memory" not in entry for entry in found)
    assert report["answers"] == 4 and report["taken_answers"] == 0 and "answer" not in report
    assert len(report["documents"]) == 4 and report["timings"]["decode"]["tokens_per_second"] > 0
    predicted = report["memory"]["predicted"]
    assert predicted["answers_at_a_time"] == 2 and predicted["row_bytes"] > 0


def test_what_is_told(place: Path) -> None:
    told = run_here("ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl").stderr
    assert re.search(r"^l4ctx: 4 answers in [\d.:]+ s \([\d.,]+ tokens/s\)$", told, re.M), told
    Path("out.jsonl").write_text("".join(Path("out.jsonl").read_text().splitlines(True)[:3]))
    told = run_here("ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl").stderr
    assert "l4ctx: 3 of 4 answers are in out.jsonl already\n" in told and "l4ctx: 1 answer in " in told
    report = run_here("ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl", "--json")
    assert report == Result(
        0, '{"answers": 0, "taken_answers": 4}\n', "l4ctx: 4 of 4 answers are in out.jsonl already\n"
    )


def test_only_what_is_missing_is_asked_again(place: Path) -> None:
    """After a run that was killed anywhere, as within a line."""
    out = Path("out.jsonl")
    assert without_counts(asked("docs", "--resume-answers", "out.jsonl", "--batch", "1")) == RIGHT
    content = out.read_bytes()
    lines = content.splitlines(keepends=True)
    for whole in (0, 3):
        for part in (b"", lines[whole][:1], lines[whole][:40], lines[whole][:-1]):
            out.write_bytes(b"".join(lines[:whole]) + part)
            found = asked("docs", "--resume-answers", "out.jsonl", "--batch", "1")
            assert without_counts(found) == RIGHT[whole:] and out.read_bytes() == content
    other = content.replace(b"amber falcon?", b"amber heron?")
    out.write_bytes(other)
    refused = run_here("ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl")
    check_refused(
        refused, 2, "out.jsonl, line 1: another question has the id 1; name another file for --resume-answers"
    )
    refused = run_here("ask", "--questions", "q.txt", "docs", "--resume-answers", "q.txt")
    check_refused(refused, 2, "q.txt, line 1: no answer of l4ctx")
    assert out.read_bytes() == other and question("d") in Path("q.txt").read_text()


def test_a_killed_run_goes_on(place: Path) -> None:
    """Killed after its first answers, with standard output lost; in the end each answer is in the file once."""
    many = [question(NAMES[number % 4]) for number in range(24)]
    text_file(Path("q.txt"), "\n".join(many))
    arguments = ("ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl", "--quiet", "--batch", "2")
    out = Path("out.jsonl")
    process = subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    kept = out.read_bytes()
    number = kept.count(b"\n")
    found = answers(run_here(*arguments))
    assert len(found) == 24 - number
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(entry["id"] for entry in entries) == list(range(1, 25))
    assert all(entry["answer"] == answer(NAMES[(entry["id"] - 1) % 4]).strip() for entry in entries)


def test_ctrl_c_leaves_what_was_answered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = l4ctx.run.answering.answers

    def interrupted(session: Any) -> Any:
        done = 0
        for progress in original(session):
            yield progress
            done += len(progress.ready)
            if done == 2:
                signal.raise_signal(signal.SIGINT)

    arguments = ("ask", "--questions", "q.txt", "docs", "--batch", "1")
    with monkeypatch.context() as patch:
        patch.setattr(l4ctx.run.answering, "answers", interrupted)
        stopped = run_here(*arguments, "--quiet")
        assert stopped.code == 130
        assert stopped.stderr == "l4ctx: interrupted after 2 of 4 answers; they are printed\n"
        assert len(stopped.stdout.splitlines()) == 2
        stopped = run_here(*arguments, "--resume-answers", "out.jsonl", "--quiet")
    assert stopped.code == 130
    assert stopped.stderr == (
        "l4ctx: interrupted after 2 of 4 answers; out.jsonl holds them, and the same command asks the others\n"
    )
    assert [entry["id"] for entry in asked("docs", "--batch", "1", "--resume-answers", "out.jsonl")] == [3, 4]


def test_answers_that_cannot_be_written(place: Path) -> None:
    with closed_pipe() as pipe, os.fdopen(os.dup(pipe), "w") as stream:
        stopped = run_here(
            "ask", "--questions", "q.txt", "docs", "--resume-answers", "out.jsonl", "--batch", "1", stdout=stream
        )
    assert stopped.code == 141
    assert Path("out.jsonl").read_bytes().count(b"\n") == 1  # what was answered is not lost
    assert len(asked("docs", "--resume-answers", "out.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--questions q.txt --question-file q.txt docs", "--question-file holds one question, --questions many"),
        ("q docs --batch 2", "--batch is for --questions"),
        ("q docs --in-order", "--in-order is for --questions"),
        ("q docs --resume-answers out.jsonl", "--resume-answers is for --questions"),
        ("--questions q.txt --batch 0 docs", "--batch: "),
        ("--questions q.text docs", "q.text: the questions cannot be read: No such file or directory; did you mean"),
        ("--questions docs docs", "docs: the questions cannot be read: Is a directory"),
        ("--questions empty.txt docs", "empty.txt: there is no question in it"),
        ("--questions bad.jsonl docs", "bad.jsonl, line 2: top_k is not a whole number from 0 on"),
        ("--questions q.txt", "no documents: name files or folders"),
        ("--questions q.txt nothing.md", "nothing.md"),
        ("--questions q.txt docs --resume-answers docs", "docs: cannot be written: Is a directory"),
    ],
)
def test_what_is_refused(place: Path, arguments: str, said: str) -> None:
    text_file(Path("empty.txt"), " \n\n")
    questions({"question": "a"}, {"question": "b", "top_k": -1}, name="bad.jsonl")
    check_refused(run_here("ask", *arguments.split()), 2, said)
    assert not Path("out.jsonl").exists()


def test_a_question_that_does_not_fit_is_refused_before_anything_is_read(place: Path) -> None:
    """By its line. Shorter answers fit where nobody has chosen their length."""
    checkpoint = place / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4200
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = ("--model", str(checkpoint))
    tokens = json.loads(run_here("plan", "docs", "--json", *model).stdout)["prompt_tokens"]
    assert 3600 < tokens < 4000
    long = {"question": f"{question('a')} " + "And who was it? " * 400}
    file = questions({"question": question("a")}, long)
    refused = run_here("ask", "--questions", file, "docs", *model)
    check_refused(refused, 4, "q.jsonl, line 2: the question has ", "more than the documents leave", "shorten it")
    file = questions({"question": question("a")}, {"question": question("b"), "max_new_tokens": 1000})
    refused = run_here("ask", "--questions", file, "docs", *model)
    check_refused(refused, 2, "q.jsonl, line 2: an answer of 1,000 tokens does not fit: ")
    assert without_counts(asked("docs", *model, "--in-order")) == RIGHT


def test_more_rows_than_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that fits is named, or else taken."""
    arguments = ("ask", "--questions", "q.txt", "docs", "--json", "--prefill-chunk-size", "512")
    predicted = answers(run_here(*arguments, "--batch", "1"))[-1]["memory"]["predicted"]
    free = predicted["needed"] + 256 * 2**20 + 3 * predicted["row_bytes"] // 2
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: free)
    refused = run_here(*arguments[:-3], "--batch", "4", "--prefill-chunk-size", "512", "--quiet")
    check_refused(refused, 5, "--batch 4: 4 answers at a time take ", " fits")
    fitting = int(re.findall(r"--batch (\d) fits", refused.stderr)[0])
    report = answers(run_here(*arguments))[-1]
    assert fitting == report["memory"]["predicted"]["answers_at_a_time"] in (2, 3) and report["answers"] == 4
