"""What the commands of a conversation share: the conversation, where it is shown, and where it is written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.cli.activity import Activity
from l4ctx.cli.answer import show_answer
from l4ctx.cli.citations import show_citations
from l4ctx.cli.exits import Interruption, write
from l4ctx.cli.progress import read_shown
from l4ctx.errors import OutputError
from l4ctx.run.chat_moments import LAST_TURN
from l4ctx.run.chat_saying import settle
from l4ctx.run.monitor import Monitor
from l4ctx.run.transcript import Message, Step, Told, Transcript

if TYPE_CHECKING:
    from rich.console import Console

    from l4ctx.run.chat import Chat
    from l4ctx.run.remembering import Memory
    from l4ctx.run.session import Session


@dataclass(frozen=True)
class Talk:
    """How a conversation is held, beside what is asked of the model."""

    system: str | None = None
    told: Told | None = None  # what it goes on from
    transcript: Transcript | None = None
    is_kept_only: bool = False  # nobody asked for the transcript: what cannot be written is told once
    plain: bool = False  # Markdown as it is
    quiet: bool = False
    log: bool = True  # keep answers, and which contexts and models were used


@dataclass
class Room:
    """One conversation on a terminal or a pipe. `cites`: the answers that follow name their sources."""

    chat: Chat
    talk: Talk
    monitor: Monitor
    memory: Memory
    console: Console
    activity: Activity
    cites: bool = False
    is_interactive: bool = False
    has_told: bool = False  # that the conversation cannot be kept

    def note(self, text: str) -> None:
        self.monitor.note(text)

    def ask(self, question: str, *, is_again: bool = False) -> None:
        """A turn: reads the question, shows its answer, and writes both down. Raises what `Chat.begin` raises.

        `is_again`: the last turn was taken back for it, which is not written down yet.
        """
        turn = self.chat.begin(question, cites=self.cites)
        with self.dropped_on_error():
            with self.activity:
                read_shown(turn, self.activity)
            try:
                show_answer(turn, self.note, Interruption(), json=False, plain=self.talk.plain)
            except KeyboardInterrupt:
                if not self.is_interactive or not turn.answer.tokens:
                    raise
                turn.answer.stop_reason = "interrupted"
                self.note("stopped; what was said so far stays, and /undo takes it back")
        answer = self.chat.end()
        self.memory.answered(turn, question, answer.as_dict())
        if answer.citations is not None:
            show_citations(answer.citations)
        if self.is_interactive and sys.stdout.isatty():
            write("\n")
        if is_again:
            self.write_down(Transcript.undo)
        step = (Message("user", question, self.cites), Message("assistant", answer.text))
        sources = {} if answer.citations is None else {"citations": answer.citations.as_dict()}
        self.record(step, stop_reason=answer.stop_reason, generated_tokens=answer.tokens, **sources)

    def read(self, session: Session) -> None:
        """Reads what a session of the conversation has to read, which is then over."""
        with self.activity, self.dropped_on_error():
            read_shown(session, self.activity)
        self.chat.end()

    def settle(self) -> None:
        """Reads all that has been said. Raises what `Chat.read` raises."""
        self.read(settle(self.chat))

    def undo(self) -> str:
        """Takes back what was done last, and returns what it was. Raises RequestError."""
        what = self.chat.undo()
        self.write_down(Transcript.undo)
        return what

    def retry(self, question: str) -> None:
        """Answers the question of the last turn again; where that fails, the conversation is as it was."""
        chat, said = self.chat, self.chat.said
        chat.undo()
        before = chat.said
        try:
            self.ask(question, is_again=True)
        except BaseException:
            if chat.said is before:  # no other answer has taken the place of the first one
                chat.say(said, chat.tokens, LAST_TURN, question)
            raise

    def record(self, step: Step, **details: object) -> None:
        """Raises OutputError."""
        self.write_down(lambda transcript: transcript.append(step, **details))

    def write_down(self, write: Callable[[Transcript], None]) -> None:
        """Raises OutputError for a transcript that was asked for."""
        if self.talk.transcript is None:
            return
        try:
            write(self.talk.transcript)
        except OutputError as error:
            if not self.talk.is_kept_only:
                raise
            if not self.has_told:
                self.has_told = True
                self.note(f"{error}; --no-log keeps no conversation")

    @contextmanager
    def dropped_on_error(self) -> Iterator[None]:
        """Whatever ends what was begun: it is taken back, as if it had not been asked for."""
        try:
            yield
        except BaseException as error:
            self.chat.drop()
            if isinstance(error, KeyboardInterrupt) and self.is_interactive:
                self.note("stopped; the conversation is as it was before")
            raise

    @property
    def last_question(self) -> str | None:
        """That of the last turn; None where something else was done after it."""
        moment = self.chat.moments.last
        return moment.question if moment is not None and moment.what == LAST_TURN else None
