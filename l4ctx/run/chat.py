"""A conversation: documents are read once, and each turn reads only what is new. Prints nothing and asks nobody.

The conversation is its token ids (`l4ctx.run.chat_moments.Said`); a cache holds the first of them, and what it lacks,
the next turn reads. `Chat` is the going on and back. Questions are its own; all else that is said is given to it as a
longer `Said`: by `chat_saying` (messages), `chat_documents` and `chat_saving`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from l4ctx.prompt.instruction import instructed
from l4ctx.prompt.turns import ASSISTANT, Turns
from l4ctx.run.chat_moments import LAST_TURN, Moment, Moments, Said
from l4ctx.run.chat_turns import Turn, answer_length
from l4ctx.run.drafting import GrownDrafts
from l4ctx.run.session import Answer, Session

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache
    from l4ctx.run.images import ImageReading
    from l4ctx.run.memory_report import MemoryReport


class Chat:
    """Goes on from a session whose documents have been read. One turn at a time:

    `begin` returns a session to `prefill` and `decode`, `read` one to `prefill`; then `end` takes what it said into the
    conversation, or `drop` forgets the turn. What is refused changes nothing.
    """

    def __init__(self, session: Session, turns: Turns) -> None:
        inputs = session.sized.inputs
        prompt = inputs.prompt
        self.session = replace(session, features=None)
        self.moments = Moments(session.undivided_cache)
        self.first = inputs.prompt_tokens - len(prompt.ids)  # the position of its first own token
        self.said = Said(turns, prompt.ids, prompt.spans, prompt.images, is_empty=not self.first and not prompt.spans)
        self.draws = 0  # answers that were asked for once more; a seed draws each of them anew
        self._turn: Session | None = None  # the one that is not over
        self._last = session
        self._drafts = GrownDrafts(session.draft_source(), len(prompt.ids))

    @property
    def cache(self) -> HybridKVCache:
        return self.moments.cache

    @property
    def tokens(self) -> int:
        return self.first + len(self.said.ids)

    def begin(self, question: str, *, cites: bool = False) -> Session:
        """The turn that answers; `cites`: it names its sources.

        Raises PromptError, TokenizerError, PromptLengthError, RequestError and MemoryPlanError.
        """
        said = self.said.for_user.with_text(instructed(question) if cites else question).then(ASSISTANT)
        stop, options = self.first + len(said.ids), self.session.request.answer
        most = answer_length(options.max_new_tokens, stop, self.cache.config.max_position_embeddings)
        turn = Turn(said, stop, most, question, cites, self.session.sized.inputs.images, draws=self.draws)
        self._turn = replace(self._go_on(turn, LAST_TURN), drafts=self._drafts.behind(said.ids))
        return self._turn

    def read(self, said: Said, what: str, images: ImageReading | None = None) -> Session:
        """The turn that reads a longer conversation, which answers nothing; `what` is it that `undo` then takes back.

        `images`: with how they are read, if there are new ones. Raises what `begin` raises.
        """
        unread = said.images[len(self.said.images) :]
        images = images or self.session.sized.inputs.images
        return self._go_on(Turn(said, self.first + len(said.ids), images=images, unread=unread), what)

    def end(self) -> Answer:
        """Ends the turn, and takes its answer, or what there is of it, into the conversation."""
        assert self._turn is not None, "no turn"
        answer, self._turn = self._turn.answer, None
        self.said = replace(self.said, ids=self.said.ids + answer.ids)
        if self.cache.offset > self.tokens:  # interrupted before a draft was verified
            self.cache.rewind(self.tokens)
        return answer

    def say(self, said: Said, offset: int, what: str, question: str | None = None) -> None:
        """Goes on without reading; the next turn reads it. `offset`: tokens that the cache then may hold."""
        self.moments.all.append(Moment(self.said, offset, what, question=question))
        self.said = said

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
        self.moments.mark(self.said, turn.end, what, turn.question)
        self.said = turn.said
        self._turn = self._last = turn.session(self.session, plan, self.moments, features)
        return self._turn
