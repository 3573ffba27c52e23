"""A conversation: documents are read once, and each turn reads only what is new. Prints nothing and asks nobody.

A turn is a `Session`, see `l4ctx.run.chat_turns`. The conversation is its token ids; the cache holds the first of them,
and what it lacks, the next turn reads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from l4ctx.prompt.instruction import instructed
from l4ctx.prompt.turns import ASSISTANT, SYSTEM, USER, Turns
from l4ctx.run.chat_moments import Moment, Moments, Said
from l4ctx.run.chat_turns import Turn, answer_length
from l4ctx.run.session import Answer, Session

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache
    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.drafting import DraftSource
    from l4ctx.run.images import ImageReading
    from l4ctx.run.memory_report import MemoryReport


class Chat:
    """Goes on from a session whose documents have been read. One turn at a time:

    `begin` returns a session to `prefill` and `decode`; then `end` takes its answer into the conversation, or `drop`
    forgets the turn. What is refused changes nothing.
    """

    def __init__(self, session: Session, turns: Turns) -> None:
        inputs = session.sized.inputs
        prompt = inputs.prompt
        self.session = replace(session, features=None)
        self.moments = Moments(session.undivided_cache)
        self._first = inputs.prompt_tokens - len(prompt.ids)  # the position of its first own token
        is_empty = not self._first and not prompt.spans
        self.said = Said(turns, prompt.ids, prompt.spans, prompt.images, is_empty)
        self.cites = inputs.request.answer.cites  # may be changed between turns
        self._turn: Session | None = None
        self._last = session
        self._drafts: DraftSource | None = session.draft_source()
        self._indexed = len(prompt.ids)

    @property
    def cache(self) -> HybridKVCache:
        return self.moments.cache

    @property
    def tokens(self) -> int:
        return self._first + len(self.said.ids)

    def begin(self, question: str) -> Session:
        """The turn that answers. Raises PromptError, TokenizerError, PromptLengthError, RequestError and
        MemoryPlanError."""
        text = instructed(question) if self.cites else question
        said = self.said.for_user.with_text(text).then(ASSISTANT)
        stop, options = self._first + len(said.ids), self.session.request.answer
        most = answer_length(options.max_new_tokens, stop, self.cache.config.max_position_embeddings)
        turn = Turn(said, stop, most, question, self.cites, self.session.sized.inputs.images)
        self._turn = replace(self._go_on(turn, "the last turn"), drafts=self._draft_source(said))
        return self._turn

    def end(self) -> Answer:
        """Takes the answer of the turn, or what there is of it, into the conversation."""
        assert self._turn is not None, "no turn"
        answer, self._turn = self._turn.answer, None
        self.said = replace(self.said, ids=self.said.ids + answer.ids)
        if self.cache.offset > self.tokens:  # interrupted before a draft was verified
            self.cache.rewind(self.tokens)
        return answer

    def begin_reading(self, prompt: Prompt, what: str, images: ImageReading | None = None) -> Session:
        """A session that reads the documents of `prompt`, which holds nothing else, into the user's next message, with
        nothing to decode; then call `end_reading`. Raises what `begin` raises."""
        before = self.said.for_user
        said = before.with_documents(prompt, self._first + len(before.ids))
        unread = said.images[len(before.images) :]
        return self._go_on(Turn(said, self._first + len(said.ids), images=images, unread=unread), what)

    def settle(self) -> Session:
        """Reads all that has been said, and begins a message of the user, which is what a saved context needs."""
        said = self.said.for_user
        return self._go_on(Turn(said, self._first + len(said.ids), images=self.session.sized.inputs.images), "")

    def end_reading(self) -> None:
        self._turn = None

    def tell_model(self, text: str) -> None:
        """Says something as the system: before everything where nothing has been said, else from here on.

        Raises TokenizerError, and PromptError where the template allows it only at the beginning.
        """
        if self.said.is_empty:
            said, offset = Said.by_system(self.said.turns, text), 0
            self.cache.rewind(0)
        else:
            said, offset = self.said.then(SYSTEM).with_text(text).then(USER), self.cache.offset
        self.moments.all.append(Moment(self.said, offset, "the system's message"))
        self.said = said

    def say(self, role: str, text: str, *, cites: bool = False) -> None:
        """What was said in another run, to be read later; `cites`: sources were asked for. Raises what `tell_model`
        raises."""
        if role == SYSTEM:
            self.tell_model(text)
        elif role == USER:
            said = self.said.for_user.with_text(instructed(text) if cites else text)
            self.moments.all.append(Moment(self.said, self.tokens, "the last turn"))
            self.said = said
        else:
            self.said = self.said.then(ASSISTANT).with_text(text)

    def undo(self) -> str:
        """Goes back to before the last thing that was done; returns what it was. Raises RequestError."""
        while not (what := self.drop()):
            pass  # what nobody asked for
        return what

    def drop(self) -> str:
        """Goes back to before what was begun last, as where it has failed."""
        moment = self.moments.back()
        self.said, self._turn = moment.said, None
        return moment.what

    def memory_report(self) -> MemoryReport:
        return replace(self._last, cache=self.cache).memory_report()

    def _go_on(self, turn: Turn, what: str) -> Session:
        """Afterwards what the turn says has been said. Raises what `Turn.plan` and `Turn.features` raise."""
        assert self._turn is None, "a turn is not over"
        plan = turn.plan(self.session, self.moments)
        features = turn.features(self.session)
        self.moments.mark(self.said, turn.end, what)
        self.said = turn.said
        self._turn = self._last = turn.session(self.session, plan, self.moments, features)
        return self._turn

    def _draft_source(self, said: Said) -> DraftSource | None:
        """What was indexed, and behind it all that has been said since."""
        from l4ctx.drafts.drafter import DraftCounts

        if self._drafts is None:
            return None
        return replace(self._drafts, end=self._drafts.end + said.ids[self._indexed :], counts=DraftCounts())
