"""`l4ctx chat` as a person uses it: piped, on a terminal, with commands, and with transcripts."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from l4ctx.cli import chat_input, conversation
from l4ctx.cli.chat_input import PlainLines, last_word
from l4ctx.engine.choose import choose
from l4ctx.errors import InputError, OutputError
from l4ctx.run.transcript import InUseError, Message, Reading, Transcript, TranscriptError
from support.chats import with_template
from support.cli_runner import CONTROLS, answer, question, run_here, text_file
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
        (("a.md", "--continue", "t", "--transcript", "t"), "", 2, "leave the others out"),
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
    assert "as it was before" in notes[2] and "/undo takes it back" in notes[0]
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
        file.begin([name], None, "Be brief.", TINY, {})
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


def lines_of(paths: list[str], *rest: bytes, **begin: Any) -> bytes:
    return b"".join([json.dumps({"begin": 1, "paths": paths, **begin}).encode() + b"\n", *rest])


QUESTION = b'{"role": "user", "content": "x"}\n'
ANSWER = b'{"role": "assistant", "content": "y"}\n'


@pytest.mark.parametrize("tail", [QUESTION, QUESTION + ANSWER[:-1], QUESTION + b'{"ro', ANSWER[:0] + b'{"undo'])
def test_a_turn_that_was_not_finished_is_left_out(tmp_path: Path, tail: bytes) -> None:
    """As after a process was killed, between or within the two lines of a turn."""
    sound = lines_of([], QUESTION, ANSWER)
    (tmp_path / "t").write_bytes(sound + tail)
    with closing(Transcript(tmp_path / "t")) as file:
        told = file.told()
    assert told.is_cut and told.steps == [(Message("user", "x"), Message("assistant", "y"))]
    assert (tmp_path / "t").read_bytes() == sound


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._file.write(data[: self.room])
        self.room -= written
        return written


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path) -> None:
    """Never a part of a line; and at the latest when the conversation ends."""
    path = tmp_path / "t"
    file = Transcript(path)
    file.begin([], None, None, TINY, {})
    before = path.read_bytes()
    file._file = full = Full(file._file, 10)  # type: ignore[assignment]
    for text in ("one", "two"):
        with pytest.raises(OutputError, match="No space left on device; what is missing is written with the next turn"):
            file.append((Message("user", text), Message("assistant", text)))
        assert path.read_bytes() == before
        full.room = 10
    full.room = 2**20
    file.undo()
    assert [line.get("content", "undo") for line in told(path)[1:]] == ["one", "one", "two", "two", "undo"]
    full.room = 0
    with pytest.raises(OutputError):
        file.append((Message("system", "three"),))
    full.room = 2**20
    file.close()
    assert told(path)[-1] == {"role": "system", "content": "three"}


def test_nobody_asked_to_keep_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it goes on where it cannot be kept, and says so once; a transcript that was asked for ends it."""
    monkeypatch.setattr(Transcript, "_append", mock.Mock(side_effect=OutputError("no space")))
    result = chat("a.md", says=f"{question('a')}\n/undo\n")
    assert (result.code, result.stdout) == (0, answer("a"))
    assert result.stderr.count("no space; --no-log keeps no conversation") == 1
    result = chat("a.md", "--transcript", "t", says=question("a"))
    assert (result.code, result.stdout) == (1, "") and result.stderr.endswith("l4ctx: no space\n")


def test_a_document_that_changes_between_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing(Scripted):
        def read(self) -> str | None:
            text_file(folder / "a.md", "Other words.\n")
            return super().read()

    monkeypatch.setattr(conversation, "lines", lambda *_: Changing("/add a.md", "/add a.md"))
    notes = run_here("chat", "a.md").stderr.splitlines()
    assert "l4ctx: a.md is not what it was when it was read before; it is added as a.md (2)" in notes
    assert notes[-1] == "l4ctx: nothing was added: the conversation holds all of it already"


def test_one_process_writes_to_a_transcript(tmp_path: Path) -> None:
    with closing(Transcript(tmp_path / "t")), pytest.raises(InUseError, match="another l4ctx chat writes to it"):
        Transcript(tmp_path / "t")
    Transcript(tmp_path / "t").close()


def test_the_last_conversation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its files being named, unless nothing was said in it; and not where its paths mean something else."""
    assert "no conversation has been kept" in chat("--last", says="").stderr
    assert chat("a.md", says=f"/add 'b c.md'\n{question('a')}\n").code == 0
    assert chat("b c.md", says="/help\n").code == 0  # nothing was said
    assert chat("b c.md", "--no-log", says="Who?\n").code == 0
    text_file(folder / "b c.md", "Other words.\n")
    monkeypatch.delenv("L4CTX_MODEL")
    result = chat("--last", says=f"{question('a')}\n")
    assert (result.code, result.stdout) == (0, answer("a"))
    assert "1 turn went before" in result.stderr
    assert "b c.md has changed since: earlier answers are about what it was" in result.stderr
    assert "a.md has changed" not in result.stderr
    (file,) = (folder / "state" / "l4ctx" / "chats").iterdir()
    assert [line.get("role") for line in told(file)[2:]] == ["user", "assistant"] * 2
    assert "was held with" not in result.stderr
    model = with_template(folder / "model", (TINY / "chat_template.jinja").read_text())
    assert f"was held with {TINY}" in chat("--last", "--model", str(model), says="").stderr
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    result = chat("--last", says="")
    assert result.code == 2 and f"was held in {folder}, and its paths are meant from there" in result.stderr
    assert "1 conversation deleted" in run_here("log", "--clear", "--yes").stderr and not file.exists()


def test_an_answer_is_drawn_again(folder: Path) -> None:
    """In place of the first one: each has the next seed, and the conversation holds the last."""
    says = "Tell me more.\n/retry\n/retry\n"
    options = ("-q", "--sample", "--temperature", "1.5", "--max-new-tokens", "8", "--transcript", "t")
    result = chat("a.md", *options, "--seed", "5", says=f"{says}/undo\n/retry\n")
    assert result.code == 2 and "/retry: there is no answer to replace" in result.stderr
    answers = result.stdout.splitlines()
    assert len(set(answers)) == len(answers) == 3
    again = chat("a.md", *options, "--seed", "7", says="Tell me more.")
    assert again.stdout.splitlines() == answers[2:]
    kinds = [line.get("role", "undo") for line in told(folder / "t")[1:9]]
    assert kinds == ["user", "assistant", "undo", "user", "assistant", "undo", "user", "assistant"]
    greedy = chat("a.md", says=f"{question('a')}\n/retry\n")
    assert greedy.stdout == answer("a") * 2 and "--sample draws others" in greedy.stderr


def test_an_answer_stays_where_there_is_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the first token of the second one."""
    chosen = 0

    def interrupted(*arguments: Any) -> int:
        nonlocal chosen
        chosen += 1
        if chosen == 17:
            raise KeyboardInterrupt
        return choose(*arguments)

    monkeypatch.setattr("l4ctx.engine.row.choose", interrupted)
    script = Scripted(question("a"), "/retry", "/memory", "/retry", "/undo", "/undo")
    monkeypatch.setattr(conversation, "lines", lambda *_: script)
    result = run_here("chat", "a.md", "--transcript", "t", "--draft-tokens", "0")
    assert (result.code, result.stdout) == (0, answer("a") * 2)
    notes = [line for line in result.stderr.splitlines() if re.search("stopped|tokens of|taken back|to undo", line)]
    assert [note.removeprefix("l4ctx: ")[:31] for note in notes] == [
        "stopped; the conversation is as", "75 tokens of the model's 10,485", "the last turn was taken back; t",
        "there is nothing to undo",
    ]  # fmt: skip
    assert [line.get("role", "undo") for line in told(folder / "t")[1:]] == [
        "user", "assistant", "undo", "user", "assistant", "undo",
    ]  # fmt: skip


def test_a_saved_conversation_is_listed(folder: Path) -> None:
    assert chat("a.md", says="/save kept\n").code == 0
    assert str(folder / "kept") in run_here("list").stdout.replace("\n", "")


def test_what_is_too_long_to_be_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_input, "MAX_SAID_BYTES", 60)
    monkeypatch.setattr(conversation, "MAX_SAID_BYTES", 60)
    for says in ("x" * 70, "語" * 21):
        result = chat("-q", says=says)
        assert (
            result.code == 2 and "line 1: longer than 0 MiB; put it in a file and read that with /add" in result.stderr
        )
    monkeypatch.setattr(conversation, "lines", lambda *_: Scripted("語" * 21, "/quit"))
    assert "what you say: longer than" in run_here("chat").stderr


def test_lines_as_they_are_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without prompt_toolkit: the shell's prompt begins a line after Ctrl-D and Ctrl-C, and text has to be UTF-8."""
    ends: list[tuple[BaseException, Any]] = [
        (EOFError(), None), (KeyboardInterrupt(), KeyboardInterrupt),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), InputError),
    ]  # fmt: skip
    for error, raised in ends:
        monkeypatch.setattr("builtins.input", mock.Mock(side_effect=error))
        with pytest.raises(raised) if raised else nullcontext():
            assert PlainLines().read() is None
        assert capsys.readouterr().err in ("> \n", "> ")
