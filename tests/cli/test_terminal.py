"""What streams show: no animation but on a screen, tables and help of any width, answers as they come."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import termios
import time
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console

from l4ctx.cli import activity as activity_module
from l4ctx.cli import answer
from l4ctx.cli import console as console_module
from l4ctx.cli.activity import Activity
from l4ctx.cli.exits import Interruption
from l4ctx.cli.tables.inspection import listing
from l4ctx.cli.tables.layout import FigureTable, TextTable
from l4ctx.cli.wrapping import cells
from l4ctx.engine.loop_guard import LONGEST_PERIOD, Loop
from support.cli_runner import ANSWER, QUESTION, TINY, closed_pipe, run_here, run_process, text_file
from support.generating import Generating

COLOURS = (
    {"FORCE_COLOR": "1"},
    {"FORCE_COLOR": "3", "CLICOLOR_FORCE": "1"},
    {"TTY_COMPATIBLE": "1"},
    {"TTY_INTERACTIVE": "1"},
    {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"},
)
CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-HJKhlsu]|\r")  # moves or hides it, or erases; colour is none of it


# Animation


@pytest.mark.parametrize("variables", COLOURS, ids=repr)
@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_no_variable_animates_a_file(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], term: str) -> None:
    for name, value in {**variables, "TERM": term}.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = console_module.stderr_console()
    with Activity(console) as activity:
        activity.tell("loading weights")
        time.sleep(0.3)
    assert not console.is_interactive and stream.getvalue() == ""


def test_a_run_with_forced_colour_writes_a_plain_log(tmp_path: Path) -> None:
    text_file(tmp_path / "a.md", ANSWER)
    result = run_process(
        "ask",
        QUESTION,
        "a.md",
        "--memory-report",
        "--model",
        str(TINY),
        folder=tmp_path,
        FORCE_COLOR="1",
        CLICOLOR_FORCE="1",
        TTY_COMPATIBLE="1",
        TTY_INTERACTIVE="1",
    )
    assert (result.code, result.stdout) == (0, ANSWER)
    assert not CURSOR.search(result.stderr) and "memory" in result.stderr


@pytest.mark.parametrize(
    ("term", "variables", "is_animated"),
    [
        ("xterm", {}, True),
        ("xterm", {"NO_COLOR": "1"}, True),
        ("dumb", {}, False),
        ("unknown", {}, False),
        ("dumb", {"FORCE_COLOR": "1"}, False),
        ("DUMB", {"TTY_INTERACTIVE": "1"}, False),
        ("xterm", {"TTY_INTERACTIVE": "0"}, False),
        ("xterm", {"TTY_COMPATIBLE": "0"}, False),
    ],
)
def test_terminals(monkeypatch: pytest.MonkeyPatch, term: str, variables: dict[str, str], is_animated: bool) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "TERM": term}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (24, 47))
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            console = console_module.stderr_console()
            with Activity(console) as activity:
                activity.tell("loading weights")
                time.sleep(0.1)
            console_module.notes(console, quiet=False)("the end")
            shown = ""
            while "the end\r\n" not in shown:
                shown += os.read(ours, 65536).decode()
            monkeypatch.delenv("COLUMNS", raising=False)
            assert console_module.columns(stream) == 47
            monkeypatch.setenv("COLUMNS", "33")
            assert console_module.columns(stream) == 33
    finally:
        os.close(ours)
    assert console.is_interactive == is_animated == ("loading weights" in shown) == ("\x1b[" in shown)
    assert shown.endswith("l4ctx: the end\r\n")


def test_a_heartbeat_goes_on_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no screen, lines come though nothing is told."""
    monkeypatch.setattr(activity_module, "PLAIN_LINE_SECONDS", 0.05)
    stream = io.StringIO()
    with Activity(Console(file=stream, force_interactive=False)) as activity:
        activity.tell("reading files: 3 documents")
        time.sleep(0.4)
        activity.tell("reading files: 4 \x1b[2Jdocuments")
        time.sleep(0.4)
    lines = stream.getvalue().splitlines()
    assert "l4ctx: reading files: 3 documents" in lines and any("4 \ufffd[2Jdocuments" in line for line in lines)
    time.sleep(0.2)
    assert stream.getvalue().splitlines() == lines  # and end with it


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity_module, "PLAIN_LINE_SECONDS", 0.0)
    stream = io.StringIO()
    with Activity(Console(file=stream, force_interactive=True), is_shown=False) as activity:
        activity.tell("loading weights")
        activity.beat()
        time.sleep(0.1)
    assert stream.getvalue() == ""


# Help


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("ask", "-h")])
def test_help_to_streams_that_fail(arguments: tuple[str, ...]) -> None:
    full = run_process(*arguments, shell="> /dev/full")
    assert (full.code, full.stdout) == (1, "")
    assert re.fullmatch(r"l4ctx: the (help|version) cannot be written: No space left on device\n", full.stderr)
    closed = run_process(*arguments, shell=">&-")
    assert (closed.code, closed.stdout, closed.stderr) == (0, "", "")
    with closed_pipe() as pipe:
        result = run_process(*arguments, stdout=pipe)
    assert (result.code, result.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [(), ("--no-such",), ("ask", "--top-k", "x"), ("nothing",)])
@pytest.mark.parametrize("shell", ["2> /dev/full", "2>&-"])
def test_usage_errors_to_a_stderr_that_fails(arguments: tuple[str, ...], shell: str) -> None:
    result = run_process(*arguments, shell=shell)
    assert (result.code, result.stdout, result.stderr) == (2, "", "")


@pytest.mark.parametrize("columns", [24, 40, 63, 80, 100, 300])
def test_help_follows_the_width_and_cuts_nothing(columns: int) -> None:
    shown = run_process("--help", COLUMNS=str(columns)).stdout
    assert all(len(line) <= min(columns, 120) for line in shown.splitlines())
    assert "..." not in shown.partition("Commands:")[2]
    words = " ".join(shown.split())
    for summary in (
        "Read documents and answer a question about them.",
        "141 the output was closed.",
        "time to first token and memory, of l4ctx and of other engines.",
    ):
        assert summary in words


def test_help_of_a_command_in_a_narrow_terminal() -> None:
    shown = run_process("ask", "--help", COLUMNS="40").stdout
    assert all(len(line) <= 40 for line in shown.splitlines())
    assert "--kv-dtype auto|float32|bfloat16|float16|fp8|int8" in re.sub(r"\|\s+", "|", " ".join(shown.split()))
    assert "--no-loop-guard" in shown


# Tables


def printed(content: Any, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(content)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def figures() -> FigureTable:
    table = FigureTable("memory", ("predicted", "at most", "held", "peak"))
    table.add_row("NoPE keys and values, host memory", "1,234.5 GiB", "1,300.0 GiB", "1,200.1 GiB")
    table.add_row("activations", "", "12.3 MiB")
    table.add_row("  an unbounded cache would take", "99.9 TiB")
    return table


def test_columns_where_they_fit() -> None:
    lines = printed(figures(), 100)
    assert lines[1].split() == ["predicted", "at", "most", "held", "peak"] and len(lines) == 5
    assert lines[2].split()[-6:] == ["1,234.5", "GiB", "1,300.0", "GiB", "1,200.1", "GiB"]


@pytest.mark.parametrize("width", [14, 20, 33, 40, 60])
def test_labels_stand_above_their_figures_where_columns_do_not_fit(width: int) -> None:
    lines = printed(figures(), width)
    text = " ".join(" ".join(lines).split())
    assert text == (
        "memory NoPE keys and values, host memory predicted 1,234.5 GiB, at most 1,300.0 GiB, held 1,200.1 "
        "GiB activations at most 12.3 MiB an unbounded cache would take predicted 99.9 TiB"
    )
    assert all(len(line) <= width for line in lines)
    if width >= 33:
        assert "NoPE keys and values, host memory" in lines


def test_a_long_name_takes_what_is_left() -> None:
    table = FigureTable("documents", ("tokens", "share"))
    name = "a folder/" + "x" * 100 + "/文件.md"
    table.add_row(name, "1,234,567,890", "100%")
    for width in (20, 40, 80, 160):
        lines = printed(table, width)
        assert re.sub(r"\s", "", name) in re.sub(r"\s|tokens|share|1,234,567,890|100%", "", "".join(lines))
        assert sum("1,234,567,890" in line for line in lines) == 1


@pytest.mark.parametrize("width", [20, 40, 53, 54, 100])
def test_texts_beside_or_below_their_labels(width: int) -> None:
    table = TextTable("run")
    table.add_row("tokens", "500,000 and 1,024 of the answer; the model has 10,485,760 positions")
    table.add_row("what helps", "--kv-dtype int8, --kv-dir DIR")
    table.add_row("", "fewer documents")
    lines = printed(table, width)
    assert all(cells(line) <= width for line in lines)
    assert ("tokens" in lines) == (width < len("what helps") + 2 + 40)
    assert "500,000 and 1,024" in " ".join(" ".join(lines).split())


def test_a_listing_is_broken_at_words() -> None:
    report = {
        "path": "c",
        "kind": "context",
        "damage": [],
        "verified": False,
        "states": [],
        "made_with": None,
        "bytes": {"blocks": 5, "tails": 2**40},
    }
    whole = listing(report)
    for width in (20, 40, 60, 100, 200):
        shown = listing(report, width)
        assert shown.split() == whole.split() and all(len(line) <= width for line in shown.splitlines())
    assert listing(report, 200) == whole
    assert "\non disk\n  1.0 TiB: blocks 5 B, tails 1.0\n" in listing(report, 33)


# Answers


def answered(
    session: Any, monkeypatch: pytest.MonkeyPatch, columns: int | None = None
) -> tuple[str, list[str], Interruption]:
    stream: IO[str] = io.StringIO()
    if columns is not None:
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", stream)
    notes: list[str] = []
    interruption = Interruption()
    try:
        answer.show_answer(session, notes.append, interruption, json=False)
    except (KeyboardInterrupt, ValueError):
        notes.append("ended")
    return stream.getvalue(), notes, interruption


PIECES = ["The", " access", " code", " of the am", "ber falcon is", " 48213", "."]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (None, "The access code of the amber falcon is 48213.\n"),
        (80, "The access code of the amber falcon is 48213.\n"),
        (20, "The access code of\nthe amber falcon is\n48213.\n"),
    ],
)
def test_an_answer_is_broken_at_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, columns: int | None, shown: str
) -> None:
    assert answered(Generating(PIECES), monkeypatch, columns)[:2] == (shown, [])
    assert answered(Generating([*PIECES, "\n"]), monkeypatch, columns)[0] == shown
    assert answered(Generating([]), monkeypatch, columns)[:2] == ("\n", ["the model ended its answer at once"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("logits")])
@pytest.mark.parametrize("columns", [None, 80])
@pytest.mark.parametrize(
    ("pieces", "shown"),
    [(PIECES[:4], "The access code of the am\n"), ([], ""), (["A line.\n"], "A line.\n"), (["A line. "], "A line. \n")],
)
def test_an_answer_that_is_cut_off_ends_its_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, columns: int | None, pieces: list[str], shown: str
) -> None:
    text, notes, interruption = answered(Generating(pieces, error), monkeypatch, columns)
    assert (text, notes) == (shown, ["ended"])
    count = len(pieces)
    assert interruption.when() == (f" after {count} token{'s' * (count != 1)} of the answer" if count else "")


def test_a_loop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for loop, told in ((Loop(1, 304), "the same token, 304 times"), (Loop(5, 64), "the same 5 tokens, 64 times")):
        _, notes, _ = answered(Generating(["x"], "repetition", loop), monkeypatch)
        assert len(notes) == 1 and told in notes[0] and "--no-loop-guard" in notes[0]


def test_the_guard_ends_an_answer_and_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only ever says one thing."""
    text_file(tmp_path / "a.md", ANSWER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setattr("l4ctx.engine.row.choose", lambda *_: 40)
    monkeypatch.setattr("l4ctx.engine.loop_guard.LOOP_TOKENS", 20)
    result = run_here("ask", QUESTION, "a.md", "--max-new-tokens", "60")
    assert result.code == 0 and "--no-loop-guard" in result.stderr and "24 times in a row" in result.stderr
    assert '"stop_reason": "repetition"' in run_here("ask", QUESTION, "a.md", "--max-new-tokens", "60", "--json").stdout
    result = run_here("ask", QUESTION, "a.md", "--max-new-tokens", "60", "--no-loop-guard")
    assert "the answer was cut at 60 tokens" in result.stderr and LONGEST_PERIOD > 60
