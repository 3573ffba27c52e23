"""A conversation on a terminal or a pipe: it is begun, goes on line after line, and ends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.cli.activity import Activity
from l4ctx.cli.chat_commands import COMMANDS, command, instruct
from l4ctx.cli.chat_input import MAX_SAID_BYTES, Lines, lines, too_long
from l4ctx.cli.chat_room import Room, Talk
from l4ctx.cli.console import notes, stderr_console
from l4ctx.cli.exits import Interruption
from l4ctx.cli.progress import read_shown, reading_summary
from l4ctx.errors import CHECKPOINT, UsageError, exit_code_of, one_line
from l4ctx.formatting import counted, printable
from l4ctx.inspection.model_names import shown_name
from l4ctx.run.monitor import Monitor
from l4ctx.run.transcript import Message, Reading, Told, digests_of

if TYPE_CHECKING:
    from l4ctx.run.chat import Chat
    from l4ctx.run.request import Request
    from l4ctx.run.session import Session


def converse(request: Request, talk: Talk, interruption: Interruption) -> None:
    """Reads the documents, then answers line after line until they end."""
    from l4ctx.run.inputs import make_inputs, read_request
    from l4ctx.run.remembering import Memory
    from l4ctx.run.session import load
    from l4ctx.run.sizing import size

    console = stderr_console()
    note = notes(console, quiet=talk.quiet)
    activity = Activity(console, is_shown=not talk.quiet)
    interruption.owners.setdefault(request.model, CHECKPOINT)
    with Monitor(note, activity.tell) as monitor:
        interruption.kept = lambda: monitor.kept()
        earlier = [part.content for part in _messages(talk.told) if part.role == "user"]
        source = lines([known.name for known in COMMANDS], earlier, note)
        with source.working(), activity:
            choices, sources = read_request(request, monitor)
            session = load(size(make_inputs(choices, sources, monitor), monitor), monitor)
            memory = Memory(note, is_on=talk.log)
            memory.saw(session)
            read_shown(session, activity)
            if (summary := reading_summary(session)) is not None:
                note(summary)
            chat = _begun(session)
        room = Room(chat, talk, monitor, memory, console, activity, cites=request.answer.cites)
        with source.working():
            begin(room)
        if source.is_interactive:
            name, left = shown_name(request.model), chat.cache.config.max_position_embeddings - chat.tokens
            note(f"{printable(name)} has room for {left:,} more tokens")
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        interruption.kept = lambda: "the conversation ends"
        go_on(room, source)


def begin(room: Room) -> None:
    """Goes on from a transcript, or begins one."""
    request, talk = room.chat.session.request, room.talk
    digests = digests_of(room.chat.said.spans)
    if talk.told is not None:
        if talk.told.model not in (None, Path(os.path.abspath(request.model))):
            room.note(f"the conversation was held with {printable(str(talk.told.model))}")
        _tell_changed(room, talk.told.digests, digests)
        _replay(room, talk.told)
    else:
        context, system = request.context.folder, request.system
        room.write_down(lambda file: file.begin(request.sources.paths, context, system, request.model, digests))
    if talk.system and request.context.folder is not None:
        instruct(room, talk.system)


def go_on(room: Room, source: Lines) -> None:
    """Until the lines end. On a terminal an error is told, and the conversation goes on; else it ends it."""
    room.is_interactive = source.is_interactive
    interrupts = 0  # one after the other
    while True:
        try:
            line = source.read()
            interrupts = 0
            if line is None:
                break
            if line.strip():
                with source.working():
                    _do(room, line.strip())
        except EOFError:
            break
        except KeyboardInterrupt:
            if not room.is_interactive:
                raise
            interrupts += 1
            if interrupts > 1:
                room.note("to leave, press Ctrl-D or say /quit")
        except BaseException as error:
            if not room.is_interactive or exit_code_of(error) is None or isinstance(error, BrokenPipeError):
                raise
            notes(room.console, quiet=False)(one_line(error))


def _do(room: Room, line: str) -> None:
    """What a line says: a command, or something to be answered."""
    if len(line.encode("utf-8", "replace")) > MAX_SAID_BYTES:
        raise too_long("what you say")
    name = line.partition(" ")[0]
    if line.startswith("//"):
        room.ask(line[1:])
    elif not line.startswith("/") or "/" in name[1:]:
        room.ask(line)
    else:
        known, rest = command(line)
        if known is None:
            raise UsageError(f"{printable(name)}: no such command; /help lists them, // begins a line that is none")
        known.run(room, rest)


def _replay(room: Room, told: Told) -> None:
    """What a transcript tells, read and not answered again."""
    from l4ctx.run.chat_documents import begin_reading, encoded_documents
    from l4ctx.run.chat_saying import repeat

    if told.is_cut:
        room.note("the end of the transcript was not finished, and was left out")
    for part in (part for step in told.steps for part in step):
        if isinstance(part, Reading):
            with room.activity:
                prompt, images = encoded_documents(room.chat, part.paths, room.monitor)
            room.read(begin_reading(room.chat, prompt, "the documents", images))
            _tell_changed(room, part.digests, digests_of(prompt.spans))
        else:
            repeat(room.chat, part.role, part.content, cites=part.cite)
    room.settle()
    turns = sum(1 for part in _messages(told) if part.role == "user")
    room.note(f"{counted(turns, 'turn')} went before, {room.chat.tokens:,} tokens in all")


def _tell_changed(room: Room, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Documents that are not what they were when the answers that are repeated were given."""
    for name in before:
        if before[name] and before[name] != now.get(name):
            what = "has changed" if name in now else "is no longer read"
            room.note(f"{printable(name)} {what} since: earlier answers are about what it was")


def _begun(session: Session) -> Chat:
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.run.chat import Chat
    from l4ctx.run.conversing import turns_of

    inputs = session.sized.inputs
    template = ChatTemplate.from_folder(session.request.model, date=inputs.choices.date)
    has_system = inputs.context.reader.state.system if inputs.context is not None else None
    turns = turns_of(session.request, inputs.config, inputs.tokenizer, template, has_system_prompt=has_system)
    return Chat(session, turns)


def _messages(told: Told | None) -> Iterator[Message]:
    for step in told.steps if told else ():
        yield from (part for part in step if isinstance(part, Message))
