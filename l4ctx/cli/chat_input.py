"""Where the lines of a conversation come from: a terminal, with or without prompt_toolkit, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from l4ctx.cli.console import is_screen
from l4ctx.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit.document import Document

PROMPT = "> "
MAX_SAID_BYTES = 2**21
"""Of what is said at once: some 500,000 tokens."""

NOT_TEXT = "what was typed is not UTF-8 text"
HINT = "pip install 'l4ctx[chat]' adds history, editing of several lines, and completion"
PATH_COMMANDS = ("/add", "/save")


def too_long(what: str) -> InputError:
    return InputError(f"{what}: longer than {MAX_SAID_BYTES >> 20} MiB; put it in a file and read that with /add")


class Lines(Protocol):
    """What a person says, a line or several at a time."""

    is_interactive: bool

    def working(self) -> AbstractContextManager[None]:
        """While the program does not read: where lines are edited, keys are not echoed into what it shows."""

    def read(self) -> str | None:
        """The next one; None at the end. Raises KeyboardInterrupt, and InputError for what is no text."""


class PipedLines:
    """One turn a line."""

    is_interactive = False
    working = nullcontext

    def __init__(self) -> None:
        self._number = 0

    def read(self) -> str | None:
        if sys.stdin is None:
            return None
        line = sys.stdin.buffer.readline(MAX_SAID_BYTES + 1)
        self._number += 1
        if not line:
            return None
        if len(line) > MAX_SAID_BYTES:
            raise too_long(f"standard input, line {self._number}")
        try:
            text = line.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise InputError(f"standard input, line {self._number}: not UTF-8 text")
        return text


class PlainLines:
    """A terminal as it is; with Python's own editing of lines where it has that."""

    is_interactive = True
    working = nullcontext

    def __init__(self) -> None:
        if is_screen(sys.stdout):
            with suppress(ImportError):
                import readline  # noqa: F401 (changes what `input` does)

    def read(self) -> str | None:
        try:
            if sys.stdout.isatty():
                return input(PROMPT)
            sys.stderr.write(PROMPT)
            sys.stderr.flush()
            return input()
        except UnicodeDecodeError:
            raise InputError(NOT_TEXT) from None
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            raise


class EditedLines:
    """A terminal with prompt_toolkit: Enter sends, Alt-Enter begins another line, Ctrl-X Ctrl-E opens the editor."""

    is_interactive = True

    def __init__(self, commands: Iterable[str], earlier: Iterable[str]) -> None:
        """`earlier`: what the history begins with."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import ColorDepth, create_output

        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(list(earlier)),
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
            key_bindings=_bindings(),
            completer=_completer(list(commands)),
            complete_while_typing=False,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read(self) -> str | None:
        try:
            return self._session.prompt(PROMPT)
        except EOFError:
            return None

    @contextmanager
    def working(self) -> Iterator[None]:
        import termios

        before = termios.tcgetattr(sys.stdin)
        silent = before[:]
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def lines(commands: Iterable[str], earlier: Iterable[str], note: Callable[[str], None]) -> Lines:
    """Those of standard input. `note` is told once what would make a terminal more convenient."""
    if sys.stdin is None or not sys.stdin.isatty():
        return PipedLines()
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    if not is_screen(screen):
        return PlainLines()
    if find_spec("prompt_toolkit") is None:
        note(HINT)
        return PlainLines()
    return EditedLines(commands, earlier)


def _bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # what was chosen stays; the next Enter sends
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _completer(commands: list[str]) -> Any:
    """Completes commands, and the paths that follow some of them."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                yield from (Completion(name, -len(text)) for name in commands if name.startswith(text))
            elif command in PATH_COMMANDS:
                word = last_word(rest)
                paths = PathCompleter(expanduser=True, only_directories=command == "/save")
                for found in paths.get_completions(Document(word, len(word)), complete_event):
                    shown = found.text.replace("\\", "\\\\").replace(" ", "\\ ")
                    yield Completion(shown, 0, display=found.display)

    return Commands()


def last_word(text: str) -> str:
    """What a shell would take for the last word of `text`, which may be unfinished: without its backslashes."""
    word, is_escaped = "", False
    for character in text:
        if is_escaped:
            word, is_escaped = word + character, False
        elif character == "\\":
            is_escaped = True
        else:
            word = "" if character == " " else word + character
    return word
