"""`l4ctx chat` as a person uses it: piped, on a terminal, with commands, and with transcripts."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from l4ctx.cli import conversation
from l4ctx.cli.chat_input import last_word
from l4ctx.engine.choose import choose
from l4ctx.run.transcript import Message, Reading, Transcript, TranscriptError
from support.chats import with_template
from support.cli_runner import CONTROLS, ON_TERMINAL, TIMEOUT, answer, question, run_here
from support.places import TINY


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two documents."""
    (tmp_path / "a.md").write_text("Some words.\n" + answer("a"))
    (tmp_path / "b c.md").write_text("More words.\n" + answer("b"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def told(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat(*arguments: str, says: str) -> Any:
    return run_here("chat", *arguments, stdin=says.encode())


def test_what_is_piped_in_is_one_turn_a_line(folder: Path) -> None:
    commands = f"/add 'b c.md'\n{question('b')}\n/undo\n\n/save context\n/memory\n/help\n/quit\n{question('a')}\n"
    result = chat("a.md", "--transcript", "t.jsonl", says=f"\ufeff{question('a')}\r\n{commands}")
    assert (result.code, result.stdout) == (0, answer("a") + answer("b"))
    assert not CONTROLS.search(result.stderr.replace("\n", "")) and ">" not in result.stdout
    for part in ("1 document, ", "the last turn was taken back", "l4ctx chat --context context", "RoPE windows",
                 "positions", "/system TEXT"):  # fmt: skip
        assert part in result.stderr, part
    first, *rest = told(folder / "t.jsonl")
    assert first["paths"] == ["a.md"] and first["context"] is None
    assert [line.get("role") or next(iter(line)) for line in rest] == [
        "user", "assistant", "add", "user", "assistant", "undo",
    ]  # fmt: skip
    assert rest[1]["content"] == answer("a").strip() and rest[1]["stop_reason"] == "stop"
    assert (folder / "t.jsonl").stat().st_mode & 0o077 == 0
    assert run_here("ask", question("b"), "--context", "context").stdout == answer("b")
    assert run_here("log", "--json").stdout.count(question("a")) == 1
    result = chat("--context", "context", "-q", "--no-log", "--system", "Be brief.", says=question("a"))
    assert (result.code, result.stdout, result.stderr) == (0, answer("a"), "")
    assert run_here("log", "--json").stdout.count(question("a")) == 1


def test_a_conversation_goes_on_from_its_transcript(folder: Path) -> None:
    says = f"{question('a')}\n/system Be brief.\n/add b\\ c.md\n{question('b')}\nOh?\n/undo\n"
    assert chat("a.md", "--transcript", "t.jsonl", "--max-new-tokens", "20", says=says).code == 0
    with (folder / "t.jsonl").open("ab") as file:
        file.write(b'{"role": "user", "con')  # killed there
    result = chat("--continue", "t.jsonl", says=f"{question('b')}\n")
    assert (result.code, result.stdout) == (0, answer("b"))
    assert "2 turns went before, " in result.stderr
    lines = told(folder / "t.jsonl")
    assert [line["content"] for line in lines[-2:]] == [question("b"), answer("b").strip()]
    result = chat("--continue", "t.jsonl", says="/undo\n/undo\n/undo\n")
    assert result.code == 0 and result.stderr.count("was taken back") == 3
    assert told(folder / "t.jsonl")[-3:] == [{"undo": 1}] * 3


@pytest.mark.parametrize(
    ("arguments", "says", "code", "why"),
    [
        (("-",), "", 2, "standard input is what you say"),
        (("nothing.md",), "", 2, "nothing.md"),
        (("a.md", "--continue", "t", "--transcript", "t"), "", 2, "leave --transcript out"),
        (("--continue", "t"), "", 2, "no such file"),
        (("--continue", "a.md"), "", 2, "a.md, line 1: no JSON object"),
        (("a.md", "--transcript", "."), "", 2, "cannot be written"),
        (("a.md",), "/nosuch x", 2, "/nosuch: no such command"),
        (("a.md",), "/add", 2, "nothing is named"),
        (("a.md",), "/add 'x", 2, "No closing quotation"),
        (("a.md",), "/add a.md", 2, "holds all of it already"),
        (("a.md",), "/add no.md", 2, "no.md"),
        (("a.md",), "/save x y", 2, "name one folder"),
        (("a.md",), "/system", 2, "/system TEXT"),
        (("a.md",), "/undo", 2, "nothing to undo"),
        (("a.md",), "a\0b", 2, "line 1: not UTF-8"),
    ],
)
def test_what_is_refused(folder: Path, arguments: tuple[str, ...], says: str, code: int, why: str) -> None:
    result = chat(*arguments, "-q", says=says)
    assert (result.code, result.stdout) == (code, "") and why in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("l4ctx: ")


class Scripted:
    """Lines as a person types them on a terminal."""

    is_interactive = True
    working = nullcontext

    def __init__(self, *said: str) -> None:
        self._said = list(said)

    def read(self) -> str | None:
        return self._said.pop(0) if self._said else None


def test_an_interrupt_ends_an_answer_and_an_error_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the third token of the second answer, and before the first of the third one."""
    chosen = 0

    def interrupted(*arguments: Any) -> int:
        nonlocal chosen
        chosen += 1
        if chosen in (19, 20):
            raise KeyboardInterrupt
        return choose(*arguments)

    monkeypatch.setattr("l4ctx.engine.row.choose", interrupted)
    script = Scripted(
        question("a"), question("b"), "/nosuch", question("b"), "/undo", "/add none.md", question("a"), "/quit"
    )
    monkeypatch.setattr(conversation, "lines", lambda *_: script)
    result = run_here("chat", "a.md", "--transcript", "t", "--draft-tokens", "0")
    assert (result.code, result.stdout) == (0, f"{answer('a')}The access\n{answer('a')}")
    notes = [line for line in result.stderr.splitlines() if "stopped" in line or "no such" in line or "back" in line]
    assert [note.partition("; ")[0] for note in notes] == [
        "l4ctx: stopped", "l4ctx: /nosuch: no such command", "l4ctx: stopped", "l4ctx: the last turn was taken back",
        "l4ctx: none.md: no such file or folder (check the spelling)",
    ]  # fmt: skip
    assert "as it was before" in notes[2] and "(/undo takes it back)" in notes[0]
    assert [line.get("stop_reason") for line in told(folder / "t") if line.get("role") == "assistant"] == [
        "stop", "interrupted", "stop",
    ]  # fmt: skip


def test_sources_of_answers(folder: Path) -> None:
    """Switched on for one turn, and what was asked for is said again when the conversation goes on."""
    says = f"/cite\n{question('a')}\n/cite\n{question('a')}\n"
    result = chat("a.md", "-q", "--transcript", "t", says=says)
    assert result.code == 0 and result.stdout.count("Attended:") == 1 and "a.md, line 2" in result.stdout
    asked, answered, again, _ = told(folder / "t")[1:]
    assert asked["cite"] is True and "cite" not in again and answered["citations"]["attended"]
    first = chat("a.md", "--cite", says=f"{question('a')}\n/help\n")
    assert "Attended:" in first.stdout
    assert "no documents to name" in chat("--cite", "-q", says="Who?\n").stderr


def test_a_line_that_looks_like_a_command(folder: Path) -> None:
    result = chat("-q", "--max-new-tokens", "1", says="//undo is not meant\n/etc/passwd is a file\n")
    assert result.code == 0 and len(result.stdout.splitlines()) == 2


def test_a_model_without_turns(folder: Path) -> None:
    model = with_template(folder / "model", None)
    result = chat("a.md", "-q", "--model", str(model), says="Who?")
    assert (result.code, result.stdout) == (2, "") and "no chat template" in result.stderr


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no conversation"),
        (b'{"role": "user", "content": "x"}\n', "line 1: no beginning"),
        (b'{"begin": 1, "paths": 3}\n', "line 1: no beginning"),
        (b'{"begin": 1, "paths": [], "context": 3}\n', "line 1: no beginning"),
        (b'{"begin": 1, "paths": []}\n{"undo": 1}\n', "line 2: no line of a conversation"),
        (b'{"begin": 1, "paths": []}\n{"role": "assistant", "content": "x"}\n', "line 2: no line"),
        (b'{"begin": 1, "paths": []}\n{"role": "tool", "content": "x"}\n', "line 2: no line"),
        (b'{"begin": 1, "paths": []}\n{"role": "user", "content": ["x"]}\n', "line 2: no line"),
        (b'{"begin": 1, "paths": []}\n{"add": "x"}\n', "line 2: no line"),
        (b'{"begin": 1, "paths": []}\n' + b"[" * 100_000 + b"\n", "line 2: no JSON object"),
        (b'{"begin": 1, "paths": []}\nmy notes', "line 2: no line of l4ctx chat"),
    ],
)
def test_transcripts_that_cannot_be_gone_on_with(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "t").write_bytes(content)
    file = Transcript(tmp_path / "t")
    with pytest.raises(TranscriptError, match=rf"t(, |: ).*{why.partition(': ')[2] or why}") as error:
        file.told()
    assert why in str(error.value)
    file.close()
    assert (tmp_path / "t").read_bytes() == content


def test_the_last_conversation_of_a_transcript_counts(tmp_path: Path) -> None:
    file = Transcript(tmp_path / "t")
    for name in ("one", "two"):
        file.begin([name], None, "Be brief.", TINY)
        file.append((Message("user", "x\u2028y"), Message("assistant", "\x1b[2J")), stop_reason="stop")
        file.append((Reading(["p"]),))
        file.append((Message("system", name),))
        file.undo()
    found = file.told()
    file.close()
    assert (found.paths, found.context, found.system) == (["two"], None, "Be brief.")
    assert found.steps == [(Message("user", "x\u2028y"), Message("assistant", "\x1b[2J")), (Reading(["p"]),)]
    assert not CONTROLS.search((tmp_path / "t").read_text())


def test_the_word_that_is_completed() -> None:
    assert [last_word(text) for text in ("", "a", "a b", "a b\\ c", "a\\", "x ")] == ["", "a", "b", "b c", "a", ""]


# A terminal


class Typing:
    """A conversation on a terminal of 40 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 40))
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self._process = subprocess.Popen(
            [*ON_TERMINAL, "chat", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.shown, self._seen = "", 0

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> str:
        """What is shown behind the text that was waited for before, up to this one; without escapes."""
        stop_at = time.monotonic() + TIMEOUT
        while text not in _plain(self.shown[self._seen :]):
            assert time.monotonic() < stop_at, self.shown
            if select.select([self._ours], [], [], 1)[0]:
                self.shown += os.read(self._ours, 65536).decode()
        start, ends = self._seen, range(self._seen, len(self.shown) + 1)
        self._seen = ends[bisect_left(ends, True, key=lambda end: text in _plain(self.shown[start:end]))]
        return _plain(self.shown[start : self._seen])

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self._ours, (24, columns))
        self._process.send_signal(signal.SIGWINCH)

    def end(self) -> int:
        return self._process.wait(TIMEOUT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


def _plain(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r|\x1b\][^\x07]*\x07", "", text)
    return " ".join(text.split())


@pytest.fixture
def typing(folder: Path) -> Iterator[Typing]:
    typing = Typing("a.md", "--max-new-tokens", "400", "--no-loop-guard", NO_COLOR="1")
    with closing(typing):
        yield typing


def test_a_conversation_on_a_narrow_terminal(typing: Typing) -> None:
    """Several lines in one turn, Ctrl-C at the prompt, an undo, and Ctrl-D."""
    typing.wait_for("Ctrl-D leaves")
    typing.wait_for(">")
    first, second = question("a").split(" for ")
    typing.type(f"{first}\x1b\rfor {second}\r")
    assert "48213." in typing.wait_for("48213.")
    typing.wait_for(">")
    typing.type("half a line\x03")
    typing.wait_for(">")
    typing.resize(60)
    typing.type("/un\t")
    typing.wait_for("undo")
    typing.type("\r")
    assert "taken back" in typing.wait_for(" tokens")
    typing.wait_for(">")
    typing.type("/nosuch\r")
    typing.wait_for("no such command")
    typing.wait_for(">")
    typing.type("\x04")
    assert typing.end() == 0
    styles = {style for found in re.findall(r"\x1b\[([0-9;]*)m", typing.shown) for style in found.split(";")}
    assert not {style for style in styles if style[:1] in ("3", "4") and len(style) == 2}  # colours
