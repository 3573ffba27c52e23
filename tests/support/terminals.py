"""Terminals to hold a conversation on, whose screens are read as a person sees them: an emulated one, and tmux."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from support.cli_runner import TIMEOUT

PROMPT = ">"
CLEAR = "\x0c"
POLL_SECONDS = 0.05
KEYS = re.compile("[\x00-\x1f\x7f]+|[^\x00-\x1f\x7f]+")


def _inherited() -> dict[str, str]:
    """The environment, but for a size of another terminal: xdist's workers have one."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


class Terminal(Protocol):
    """A program on a terminal."""

    def type(self, keys: str) -> None: ...

    def paste(self, text: str) -> None:
        """As a terminal does for a program that has asked to be told."""

    def resize(self, columns: int) -> None: ...

    def screen(self) -> list[str]:
        """Its lines now, without blanks at their ends and blank lines below."""

    def end(self) -> int:
        """Waits for the program; returns its exit code."""

    def close(self) -> None: ...


class Emulated:
    """By pyte, over a pseudo-terminal. `written` is all that the program wrote to it."""

    def __init__(self, command: Sequence[str], columns: int, lines: int, **environment: str) -> None:
        import pyte

        self.written = ""
        self._lines: list[str] | None = None
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (lines, columns))
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**_inherited(), "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(theirs)
        self._screen: Any = pyte.Screen(columns, lines)
        self._screen.write_process_input = self.type  # answers to what the program asks of the terminal
        self._stream: Any = pyte.ByteStream(self._screen)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def paste(self, text: str) -> None:
        left = memoryview(f"\x1b[200~{text}\x1b[201~".encode())
        while left:
            left = left[os.write(self._ours, left[:2048]) :]
            self._show()

    def resize(self, columns: int) -> None:
        self._show()
        self._screen.resize(columns=columns)
        self._lines = None
        termios.tcsetwinsize(self._ours, (self._screen.lines, columns))  # the terminal tells the program

    def screen(self) -> list[str]:
        self._show()
        if self._lines is None:
            self._lines = _trimmed(self._screen.display)
        return self._lines

    def end(self) -> int:
        wait_until(lambda: (self._show(), self._process.poll())[1] is not None, self.screen)
        return self._process.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def _show(self) -> None:
        while select.select([self._ours], [], [], 0)[0]:
            try:
                piece = os.read(self._ours, 65536)
            except OSError:  # the program has ended
                return
            self.written += piece.decode(errors="replace")
            self._stream.feed(piece)
            self._lines = None


class Tmux:
    """In a server of its own."""

    def __init__(self, command: Sequence[str], columns: int, lines: int, *, folder: Path, **environment: str) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        environment = {**_inherited(), "LC_ALL": "C.UTF-8", **environment}
        environment.pop("TMUX", None)
        size = ["-x", str(columns), "-y", str(lines)]
        subprocess.run(
            [*self._tmux, "new-session", "-d", *size, shlex.join(command), ";", "set", "remain-on-exit", "on", ";",
             "set", "remain-on-exit-format", "", ";", "set", "status", "off"],
            env=environment, check=True, timeout=TIMEOUT,
        )  # fmt: skip
        self._lines = lines
        self.resize(columns)

    def type(self, keys: str) -> None:
        for part in KEYS.findall(keys):
            if part[0] < " ":
                self._run("send-keys", "-H", *(f"{ord(key):x}" for key in part))
            else:
                self._run("send-keys", "-l", "--", part)

    def paste(self, text: str) -> None:
        self._run("load-buffer", "-", text=text)
        self._run("paste-buffer", "-p", "-r")

    def resize(self, columns: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", str(self._lines))

    def screen(self) -> list[str]:
        return _trimmed(self._run("capture-pane", "-p").split("\n"))

    def end(self) -> int:
        wait_until(lambda: self._status() is not None, self.screen)
        code = self._status()
        assert code is not None
        return code

    def close(self) -> None:
        self._run("kill-server")

    def _status(self) -> int | None:
        status, sent = self._run("display", "-p", "#{pane_dead_status},#{pane_dead_signal}").strip().split(",")
        return int(status) if status else -int(sent) if sent else None

    def _run(self, *arguments: str, text: str = "") -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], input=text, capture_output=True, text=True, check=True, timeout=TIMEOUT
        )
        return done.stdout


def wait_until(is_so: Callable[[], bool], shown: Callable[[], list[str]]) -> None:
    stop_at = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < stop_at, "\n".join(shown())
        time.sleep(POLL_SECONDS)


def wait_for(terminal: Terminal, text: str) -> None:
    """Until it is on the screen, wherever lines end."""
    wanted = "".join(text.split())
    wait_until(lambda: wanted in "".join("".join(terminal.screen()).split()), terminal.screen)


def wait_for_prompt(terminal: Terminal) -> None:
    wait_until(lambda: terminal.screen()[-1:] == [PROMPT], terminal.screen)


def screen_of(terminal: Terminal, keys: str, shows: str) -> str:
    """The screen, which is cleared before, at the next prompt after these keys have shown this."""
    terminal.type(CLEAR)
    wait_until(lambda: terminal.screen() == [PROMPT], terminal.screen)
    terminal.type(keys)
    wait_for(terminal, shows)
    wait_for_prompt(terminal)
    return shown(terminal)


def say(terminal: Terminal, line: str, becomes: str | None = None) -> str:
    """Types a line at the prompt, which becomes another if keys complete it; the screen at the next prompt."""
    terminal.type(CLEAR)
    wait_until(lambda: terminal.screen() == [PROMPT], terminal.screen)
    terminal.type(line)
    wait_for(terminal, becomes or line.replace("\x1b\r", " "))
    terminal.type("\r")
    wait_for_prompt(terminal)
    return shown(terminal)


def shown(terminal: Terminal) -> str:
    return "".join(f"{line}\n" for line in terminal.screen())


def _trimmed(lines: Sequence[str]) -> list[str]:
    lines = [line.rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines
