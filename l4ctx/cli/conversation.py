"""A conversation on a terminal or a pipe: what each line does, and what is shown of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.cli.activity import Activity
from l4ctx.cli.answer import show_answer
from l4ctx.cli.chat_input import Lines, lines
from l4ctx.cli.citations import show_citations
from l4ctx.cli.console import notes, stderr_console
from l4ctx.cli.exits import Interruption, write
from l4ctx.cli.progress import read_shown, reading_summary
from l4ctx.errors import CHECKPOINT, UsageError, exit_code_of, one_line
from l4ctx.formatting import counted, printable
from l4ctx.run.monitor import Monitor
from l4ctx.run.transcript import Message, Reading, Step, Told, Transcript

if TYPE_CHECKING:
    from l4ctx.run.chat import Chat
    from l4ctx.run.remembering import Memory
    from l4ctx.run.request import Request
    from l4ctx.run.session import Session

HELP = {
    "/add PATH...": "read more documents",
    "/save CONTEXT": "keep the conversation in a folder, for --context",
    "/cite": "name the sources of answers, or no longer",
    "/memory": "show where every byte went",
    "/undo": "take back the last turn, documents or system message",
    "/system TEXT": "instruct the model from here on",
    "/help": "list the commands",
    "/quit": "leave, as Ctrl-D does",
}
"""Commands in the order in which they are listed. Two slashes begin a line that is none."""


@dataclass(frozen=True)
class Talk:
    """How a conversation is held, beside what is asked of the model."""

    system: str | None = None
    told: Told | None = None  # what it goes on from
    transcript: Transcript | None = None
    plain: bool = False  # Markdown as it is
    quiet: bool = False
    log: bool = True  # keep answers, and which contexts and models were used


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
        with activity:
            choices, sources = read_request(request, monitor)
            session = load(size(make_inputs(choices, sources, monitor), monitor), monitor)
            memory = Memory(note, is_on=talk.log)
            memory.saw(session)
            read_shown(session, activity)
            if (summary := reading_summary(session)) is not None:
                note(summary)
            chat = _begin(session)
        conversation = Conversation(chat, talk, monitor, memory, activity)
        conversation.begin()
        earlier = [part.content for part in _messages(talk.told) if part.role == "user"]
        source = lines([name.partition(" ")[0] for name in HELP], earlier, note)
        if source.is_interactive:
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        interruption.kept = lambda: "the conversation ends"
        conversation.go_on(source)


def _begin(session: Session) -> Chat:
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


class Conversation:
    """What the lines of a person do to a `Chat`."""

    def __init__(self, chat: Chat, talk: Talk, monitor: Monitor, memory: Memory, activity: Activity) -> None:
        self._chat, self._talk, self._monitor, self._log = chat, talk, monitor, memory
        self._console, self._activity = stderr_console(), activity
        self._is_interactive = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/add": self._add,
            "/save": self._save,
            "/memory": self._memory,
            "/undo": self._undo,
            "/cite": self._cite,
            "/system": self._system,
            "/help": self._help,
        }

    def begin(self) -> None:
        """Goes on from a transcript, or begins one."""
        request, talk = self._chat.session.request, self._talk
        if talk.told is not None:
            self._replay(talk.told.steps)
        elif talk.transcript is not None:
            talk.transcript.begin(request.sources.paths, request.context.folder, request.system, request.model)
        if talk.system and request.context.folder is not None:
            self._system(talk.system)

    def go_on(self, source: Lines) -> None:
        """Until the lines end. On a terminal an error is told, and the conversation goes on; else it ends it."""
        self._is_interactive = source.is_interactive
        while True:
            try:
                line = source.read()
                if line is None or line.split()[:1] in (["/quit"], ["/exit"]):
                    break
                if line.strip():
                    with source.working():
                        self._do(line.strip())
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
            except BaseException as error:
                if not self._is_interactive or exit_code_of(error) is None or isinstance(error, BrokenPipeError):
                    raise
                notes(self._console, quiet=False)(one_line(error))

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if line.startswith("//"):
            self._ask(line[1:])
        elif not line.startswith("/") or "/" in command[1:]:
            self._ask(line)
        elif (run := self._commands.get(command)) is not None:
            run(rest.strip())
        else:
            raise UsageError(f"{printable(command)}: no such command; /help lists them, // begins a line that is none")

    def _ask(self, question: str) -> None:
        turn = self._chat.begin(question)
        with self._dropped_on_error():
            with self._activity:
                read_shown(turn, self._activity)
            try:
                show_answer(turn, self._monitor.note, Interruption(), json=False, plain=self._talk.plain)
            except KeyboardInterrupt:
                if not self._is_interactive or not turn.answer.tokens:
                    raise
                turn.answer.stop_reason = "interrupted"
                self._monitor.note("stopped; what was said so far belongs to the conversation (/undo takes it back)")
        answer = self._chat.end()
        self._log.answered(turn, question, answer.as_dict())
        if answer.citations is not None:
            show_citations(answer.citations)
        if self._is_interactive and sys.stdout.isatty():
            write("\n")
        step = (Message("user", question, self._chat.cites), Message("assistant", answer.text))
        sources = {} if answer.citations is None else {"citations": answer.citations.as_dict()}
        self._record(step, stop_reason=answer.stop_reason, generated_tokens=answer.tokens, **sources)

    def _add(self, rest: str) -> None:
        from l4ctx.cli.named_paths import meant_paths
        from l4ctx.run.chat_documents import encoded_documents

        paths = meant_paths(_words(rest, "/add PATH..."), self._monitor.note)
        with self._activity:
            prompt, images = encoded_documents(self._chat, paths, self._monitor)
            session = self._chat.begin_reading(prompt, f"/add {printable(rest)}", images)
            with self._dropped_on_error():
                read_shown(session, self._activity)
            self._chat.end_reading()
        self._record((Reading(paths),))

    def _save(self, rest: str) -> None:
        from l4ctx.run.chat_saving import save

        words = _words(rest, "/save CONTEXT")
        if len(words) != 1:
            raise UsageError("/save CONTEXT: name one folder; quote a name with spaces")
        session = self._chat.settle()
        with self._activity:
            with self._dropped_on_error():
                read_shown(session, self._activity)
            self._chat.end_reading()
            self._activity.tell(f"saving {self._chat.tokens:,} tokens")
            tokens = save(self._chat, Path(words[0]).expanduser())
        self._monitor.note(
            f"{tokens:,} tokens are kept in {words[0]}; go on with: l4ctx chat --context {shlex.quote(words[0])}"
        )

    def _memory(self, rest: str) -> None:
        from l4ctx.cli.tables.memory import memory_table

        tokens, positions = self._chat.tokens, self._chat.cache.config.max_position_embeddings
        self._console.print(memory_table(self._chat.memory_report()))
        self._monitor.note(f"the conversation has {tokens:,} tokens; the model has {positions:,} positions")

    def _undo(self, rest: str) -> None:
        what = self._chat.undo()
        self._monitor.note(f"{what} was taken back; the conversation has {self._chat.tokens:,} tokens")
        if self._talk.transcript is not None:
            self._talk.transcript.undo()

    def _cite(self, rest: str) -> None:
        self._chat.cites = not self._chat.cites
        self._monitor.note(f"sources of answers are {'named from now on' if self._chat.cites else 'no longer named'}")

    def _system(self, rest: str) -> None:
        if not rest:
            raise UsageError("/system TEXT: say what the model should know or do")
        self._chat.tell_model(rest)
        self._record((Message("system", rest),))

    def _help(self, rest: str) -> None:
        width = max(map(len, HELP))
        narrow = self._console.width < width + 40
        for name, meaning in HELP.items():
            line = f"{name}\n    {meaning}" if narrow else f"{name:{width}}  {meaning}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _replay(self, steps: Sequence[Step]) -> None:
        """What a transcript tells, read and not answered again."""
        from l4ctx.run.chat_documents import encoded_documents

        with self._activity:
            for part in (part for step in steps for part in step):
                if isinstance(part, Reading):
                    prompt, images = encoded_documents(self._chat, part.paths, self._monitor)
                    read_shown(self._chat.begin_reading(prompt, "the documents", images), self._activity)
                    self._chat.end_reading()
                else:
                    self._chat.say(part.role, part.content, cites=part.cite)
            read_shown(self._chat.settle(), self._activity)
            self._chat.end_reading()
        turns = sum(1 for step in steps for part in step if isinstance(part, Message) and part.role == "user")
        self._monitor.note(f"{counted(turns, 'turn')} went before, {self._chat.tokens:,} tokens in all")

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """Whatever ends what was begun: it is taken back, as if it had not been asked for."""
        try:
            yield
        except BaseException as error:
            self._chat.drop()
            if isinstance(error, KeyboardInterrupt) and self._is_interactive:
                self._monitor.note("stopped; the conversation is as it was before")
            raise

    def _record(self, step: Step, **details: object) -> None:
        if self._talk.transcript is not None:
            self._talk.transcript.append(step, **details)


def _words(text: str, usage: str) -> list[str]:
    """As a shell splits them. Raises UsageError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{usage}: {error}") from None
    if not words:
        raise UsageError(f"{usage}: nothing is named")
    return words
