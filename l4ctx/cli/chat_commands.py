"""The commands of a conversation: what a line that begins with a slash does."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l4ctx.cli.chat_room import Room
from l4ctx.cli.wrapping import wrapped
from l4ctx.errors import UsageError
from l4ctx.formatting import printable
from l4ctx.run.transcript import Message, Reading, digests_of

MOST_INDENT = 4
"""Of what a command means, below it on a narrow terminal."""


@dataclass(frozen=True)
class Command:
    """How it is written, what it does, and the function that does it with what stands behind its name."""

    usage: str
    meaning: str
    run: Callable[[Room, str], None]

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]


def command(line: str) -> tuple[Command | None, str]:
    """The command of a line, and what stands behind its name; None where there is no such command."""
    name, _, rest = line.partition(" ")
    return _BY_NAME.get(name), rest.strip()


def _add(room: Room, rest: str) -> None:
    from l4ctx.cli.named_paths import meant_paths
    from l4ctx.run.chat_documents import begin_reading, encoded_documents

    paths = meant_paths(_words(rest, "/add PATH..."), room.note)
    with room.activity:
        prompt, images = encoded_documents(room.chat, paths, room.monitor)
    room.read(begin_reading(room.chat, prompt, f"/add {printable(rest)}", images))
    room.record((Reading(paths, digests_of(prompt.spans)),))


def _save(room: Room, rest: str) -> None:
    from l4ctx.run.chat_saving import save

    words = _words(rest, "/save CONTEXT")
    if len(words) != 1:
        raise UsageError("/save CONTEXT: name one folder; quote a name with spaces")
    folder = Path(words[0]).expanduser()
    room.settle()
    with room.activity:
        room.activity.tell(f"saving {room.chat.tokens:,} tokens")
        tokens = save(room.chat, folder)
    room.memory.saved(folder)
    room.note(f"{tokens:,} tokens are kept in {words[0]}; go on with: l4ctx chat --context {shlex.quote(words[0])}")


def _memory(room: Room, rest: str) -> None:
    from l4ctx.cli.tables.memory import memory_table

    tokens, positions = room.chat.tokens, room.chat.cache.config.max_position_embeddings
    room.console.print(memory_table(room.chat.memory_report()))
    room.note(f"{tokens:,} tokens of the model's {positions:,} positions; {positions - tokens:,} are left")


def _undo(room: Room, rest: str) -> None:
    what = room.undo()
    room.note(f"{what} was taken back; the conversation has {room.chat.tokens:,} tokens")


def _retry(room: Room, rest: str) -> None:
    question = room.last_question
    if question is None:
        raise UsageError("/retry: there is no answer to replace; /undo takes back what was done after it")
    if not room.chat.session.sized.inputs.checked.sampling.temperature:
        room.note("the most likely answer is the same again; --sample draws others")
    room.chat.draws += 1
    room.retry(question)


def _cite(room: Room, rest: str) -> None:
    room.cites = not room.cites
    room.note(f"sources of answers are {'named from now on' if room.cites else 'no longer named'}")


def _system(room: Room, rest: str) -> None:
    instruct(room, rest)


def instruct(room: Room, text: str) -> None:
    """Tells the model something as the system. Raises UsageError, and what `tell_model` raises."""
    from l4ctx.run.chat_saying import tell_model

    if not text:
        raise UsageError("/system TEXT: say what the model should know or do")
    tell_model(room.chat, text)
    room.record((Message("system", text),))


def _help(room: Room, rest: str) -> None:
    """Each command with its meaning behind it, or below it where the terminal is narrow."""
    column = max(len(known.usage) for known in COMMANDS) + 2
    width, is_narrow = room.console.width, room.console.width < column + 40
    for known in COMMANDS:
        if is_narrow:
            lines = [known.usage, *wrapped(known.meaning, width, min(MOST_INDENT, width // 4))]
        else:
            lines = [f"{known.usage:{column}}{known.meaning}"]
        room.console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _quit(room: Room, rest: str) -> None:
    raise EOFError


COMMANDS = (
    Command("/add PATH...", "read more documents", _add),
    Command("/save CONTEXT", "keep the conversation in a folder, for --context", _save),
    Command("/retry", "answer the last question again, in place of its answer", _retry),
    Command("/undo", "take back the last turn, documents or system message", _undo),
    Command("/cite", "name the sources of answers, or no longer", _cite),
    Command("/system TEXT", "instruct the model from here on", _system),
    Command("/memory", "show where every byte went, and how many tokens are left", _memory),
    Command("/help", "list the commands", _help),
    Command("/quit", "leave, as /exit and Ctrl-D do", _quit),
)
"""In the order in which they are listed. Two slashes begin a line that is none."""

_BY_NAME = {known.name: known for known in (*COMMANDS, Command("/exit", "leave", _quit))}


def _words(text: str, usage: str) -> list[str]:
    """As a shell splits them. Raises UsageError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{usage}: {error}") from None
    if not words:
        raise UsageError(f"{usage}: nothing is named")
    return words
