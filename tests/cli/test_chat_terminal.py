"""`l4ctx chat` on a terminal: what a person types, and each screen as a person then sees it."""

from __future__ import annotations

import json
import re
import sys
from array import array
from contextlib import closing
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from wcwidth import wcswidth

from l4ctx.contexts.reader import ContextReader
from l4ctx.engine.prefill import as_batch
from l4ctx.prompt.instruction import instructed
from support.chats import chatting, document_text, rendered
from support.cli_runner import FILLER, answer, question, text_file
from support.places import TINY
from support.terminals import (
    CLEAR,
    Emulated,
    Terminal,
    Tmux,
    say,
    screen_of,
    shown,
    wait_for,
    wait_for_prompt,
    wait_until,
)

SLOW_CHAT = Path(__file__).parent.parent / "support" / "slow_chat.py"
WIDE = "日本語の文書について教えてください。アクセスコードは何ですか?とても長い質問です。"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two documents."""
    text_file(tmp_path / "a.md", "Some words.\n" + answer("a"))
    text_file(tmp_path / "b c.md", "More words.\n" + answer("b"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", str(SLOW_CHAT), "chat", *arguments]


A_NARROW_SCREEN = """\
> What is the access code
  for the amber falcon?
The access code for the amber falcon is
48213.

>
"""
WIDE_CHARACTERS = """\
> 日本語の文書について教えてください。ア
  クセスコードは何ですか?とても長い質問
  です。
"""
HALF_A_LINE = """\
> half a line
>
l4ctx: to leave, press Ctrl-D or say
/quit
>
"""
HELP = """\
> /help
/add PATH...
    read more documents
/save CONTEXT
    keep the conversation in a folder,
    for --context
/retry
    answer the last question again, in
    place of its answer
/undo
    take back the last turn, documents
    or system message
/cite
    name the sources of answers, or no
    longer
/system TEXT
    instruct the model from here on
/memory
    show where every byte went, and how
    many tokens are left
/help
    list the commands
/quit
    leave, as /exit and Ctrl-D do
>
"""
AN_UNDO = """\
> /undo
l4ctx: the last turn was taken back; the conversation has 76
tokens
>
"""
AN_ADDED_DOCUMENT = """\
> /add b\\ c.md
l4ctx: 1 document, 35 tokens
>
"""
NO_SUCH_COMMAND = """\
> /nosuch
l4ctx: /nosuch: no such command; /help lists them, // begins
a line that is none
>
"""


def test_a_conversation_on_a_narrow_terminal(folder: Path) -> None:
    """Several lines in one turn, wide characters, Ctrl-C at the prompt, completion, another width, and Ctrl-D."""
    terminal = Emulated(command("a.md"), 40, 32, NO_COLOR="1")
    with closing(terminal):
        wait_for_prompt(terminal)
        assert shown(terminal).endswith(
            "l4ctx: tiny has room for 10,485,719 more\ntokens\n"
            "l4ctx: /help lists the commands, Ctrl-C\nstops an answer, Ctrl-D leaves\n>\n"
        )
        assert say(terminal, question("a").replace(" for ", "\x1b\rfor ")) == A_NARROW_SCREEN
        assert say(terminal, WIDE).startswith(WIDE_CHARACTERS)
        assert say(terminal, "/help") == HELP
        assert screen_of(terminal, "half a line\x03\x03", "say /quit") == HALF_A_LINE
        terminal.resize(60)
        assert say(terminal, "/un\t", "/undo") == AN_UNDO
        assert say(terminal, "/add b\t", "/add b\\ c.md") == AN_ADDED_DOCUMENT
        assert say(terminal, "/nosuch") == NO_SUCH_COMMAND
        terminal.type("\x04")
        assert terminal.end() == 0
    styles = {style for found in re.findall(r"\x1b\[([0-9;]*)m", terminal.written) for style in found.split(";")}
    assert not {style for style in styles if style[:1] in ("3", "4") and len(style) == 2}  # colours


# Twenty turns


STOPPED = """\
> What is the access code for the quiet owl?
The access ...
l4ctx: stopped; what was said so far stays, and /undo takes it back

>
"""
NOT_BEGUN = """\
> /add long.md
l4ctx: 1 document, 1,574 tokens
l4ctx: stopped; the conversation is as it was before
>
"""
SOURCES = """\
> What is the access code for the blue o
  tter?
The access code for the blue otter is
10932.

Attended:
[1] b c.md, line 2 (NN%)
    The access code for the blue otter
    is 10932.

>
"""
PASTED = """\
> What is the access code ^[[31m^[[2J
  for the amber falcon?
"""
SAVED = """\
> /save kept
l4ctx: NNN tokens are kept in kept; go on with: l4ctx chat
--context kept
>
"""


class Talked:
    """Turns on a terminal; the screens are compared as they go by."""

    def __init__(self, terminal: Terminal, transcript: Path) -> None:
        self.terminal, self._transcript = terminal, transcript
        self.turns = 0

    def ask(self, text: str, columns: int) -> str:
        """A turn, whose answer is shown whole: in lines that fit, of words that are not cut. Returns the screen."""
        screen = say(self.terminal, text)
        self.turns += 1
        words = [word for line in screen.splitlines() for word in line.split()]
        said = told(self._transcript)[-1]["content"].split()
        assert any(words[start : start + len(said)] == said for start in range(len(words))), screen
        assert all(wcswidth(line) <= columns for line in screen.splitlines()), screen
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", screen)
        return screen

    def interrupt(self, line: str, shows: str) -> str:
        """Says something, and presses Ctrl-C once this is shown, while every step of the model takes a while."""
        Path("slow").touch()
        self.terminal.type(CLEAR)
        wait_until(lambda: self.terminal.screen() == [">"], self.terminal.screen)
        self.terminal.type(f"{line}\r")
        wait_for(self.terminal, shows)
        self.terminal.type("\x03")
        wait_for_prompt(self.terminal)
        Path("slow").unlink()
        return shown(self.terminal)

    def leave(self) -> None:
        self.terminal.type("\x04")
        assert self.terminal.end() == 0


def told(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def messages_of(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was said and not taken back, as the messages of one prompt; documents belong to what the user says next."""
    steps: list[list[dict[str, Any]]] = []
    for line in lines:
        if "undo" in line:
            steps.pop()
        elif line.get("role") == "assistant":
            steps[-1].append(line)
        elif "begin" not in line:
            steps.append([line])
    documents, messages = [document_text(Path("a.md"), "a.md")], []
    read = 1
    for line in (line for step in steps for line in step):
        if "add" in line:
            read += 1
            documents.append(document_text(Path(line["add"][0]), line["add"][0], read))
        elif line["role"] == "user":
            text = instructed(line["content"]) if line.get("cite") else line["content"]
            messages.append(("user", "".join([*documents, text])))
            documents = []
        else:
            messages.append((line["role"], line["content"]))
    return messages


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["emulated", "tmux"])
def test_twenty_turns_are_one_prompt(folder: Path, kind: str) -> None:
    """Interrupts, undo, documents, sources, three widths, a paste; gone on with from a transcript, then a context."""
    if kind == "tmux" and which("tmux") is None:
        pytest.skip("tmux is not installed")
    text_file(folder / "long.md", FILLER * 40)
    text_file(folder / "日本.md", "日本語の文書。\n" + answer("c"))

    def start(columns: int, *arguments: str) -> Terminal:
        if kind == "tmux":
            return Tmux(command(*arguments), columns, 40, folder=folder)
        return Emulated(command(*arguments), columns, 40)

    first, second = folder / "t.jsonl", folder / "u.jsonl"
    turns = 0
    with closing(start(100, "a.md", "--transcript", "t.jsonl")) as terminal:
        wait_for_prompt(terminal)
        talked = Talked(terminal, first)
        talked.ask(question("a"), 100)
        say(terminal, "/add b\t", "/add b\\ c.md")
        talked.ask(question("b"), 100)
        assert talked.interrupt("/add long.md", "reading") == NOT_BEGUN
        stopped = talked.interrupt(question("c"), "The access ")
        assert re.sub("^The access .*", "The access ...", stopped, flags=re.MULTILINE) == STOPPED
        talked.turns += 1
        talked.ask(question("a"), 100)
        before = told(first)
        talked.ask("Who painted the wall?", 100)
        say(terminal, "/undo")
        assert told(first)[len(before) + 2 :] == [{"undo": 1}]
        talked.turns -= 1
        terminal.resize(80)
        talked.ask(question("b"), 80)
        say(terminal, "/system Be brief.")
        talked.ask(question("a"), 80)
        terminal.resize(40)
        say(terminal, "/cite")
        assert re.sub(r"\(\d+%\)", "(NN%)", talked.ask(question("b"), 40)) == SOURCES
        say(terminal, "/cite")
        talked.ask(WIDE, 40)
        terminal.type(CLEAR)
        terminal.paste("What is the access code \x1b[31m\x1b[2J\nfor the amber falcon?")
        wait_for(terminal, "amber falcon?")
        terminal.type("\r")
        wait_for_prompt(terminal)
        assert shown(terminal).startswith(PASTED)
        talked.turns += 1
        assert max(map(wcswidth, say(terminal, "/memory").splitlines())) <= 40
        turns += talked.turns
        talked.leave()
    with closing(start(40, "--continue", "t.jsonl")) as terminal:
        wait_for_prompt(terminal)
        talked = Talked(terminal, first)
        say(terminal, "/add 日\t", "/add 日本.md")
        talked.ask(question("c").replace(" for ", "\x1b\rfor "), 40)
        terminal.resize(80)
        for name in "ba":
            talked.ask(question(name), 80)
        terminal.resize(60)
        assert re.sub(r"\d+ tokens", "NNN tokens", say(terminal, "/save kept")) == SAVED
        turns += talked.turns
        talked.leave()
    with closing(start(100, "--context", "kept", "--transcript", "u.jsonl")) as terminal:
        wait_for_prompt(terminal)
        talked = Talked(terminal, second)
        for columns in (100, 80, 40, 100):
            terminal.resize(columns)
            talked.ask(question("b"), columns)
            talked.ask(question("c"), columns)
        say(terminal, "/undo")
        talked.ask(question("a"), 100)
        say(terminal, "/save kept")
        turns += talked.turns - 1
        talked.leave()
    assert turns == 20
    messages = messages_of([*told(first), *told(second)])
    assert sum(role == "user" for role, _ in messages) == 20
    reader = ContextReader(Path("kept"))
    ids = reader.context.ids(reader.state).tolist()
    assert ids == rendered([*messages, ("user", "More?")])[: len(ids)] and len(ids) > len(rendered(messages))
    check_answers(messages, ids)


def check_answers(messages: list[tuple[str, str]], ids: list[int]) -> None:
    """Those about facts against one plain forward of all."""
    with chatting(TINY) as chat:
        logits = chat.session.model(as_batch(array("i", ids), torch.device("cpu")))
    assert logits is not None
    best = logits[0].argmax(-1).tolist()
    checked = 0
    for number, (role, text) in enumerate(messages):
        if role == "assistant" and f"{text}\n" in map(answer, "abc"):
            start, stop = len(rendered(messages[:number])), len(rendered(messages[: number + 1]))
            assert best[start - 1 : stop - 1] == ids[start:stop]  # and then the token that ends a message
            checked += 1
    assert checked >= 16
