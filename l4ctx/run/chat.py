"""A conversation: documents are read once, and each turn reads only what is new. Prints nothing and asks nobody.

A turn is a `Session` whose prompt is the whole conversation and whose cache holds most of it already. The conversation
is its token ids; the cache holds the first of them, and what it lacks, the next turn reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.machine.device import free_on_accelerator
from l4ctx.planning.growth import Growth, grown
from l4ctx.prompt.builder import Prompt, check_length, encode_question
from l4ctx.prompt.turns import ASSISTANT, SYSTEM, USER, Turns
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS
from l4ctx.run.session import Answer, Session
from l4ctx.run.sizing import capacity_here

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache
    from l4ctx.run.drafting import DraftSource
    from l4ctx.run.images import ImageReading
    from l4ctx.run.inputs import Checked
    from l4ctx.run.memory_report import MemoryReport
    from l4ctx.spans import Span
    from l4ctx.vision.prompter import PlacedImage


@dataclass(frozen=True)
class Said:
    """A conversation at one time: its token ids behind those that a saved context holds, and what they stand for."""

    turns: Turns
    ids: array[int]  # never changed; a longer conversation has another array
    spans: Sequence[Span] = ()
    images: Sequence[PlacedImage] = ()

    def then(self, role: str) -> Said:
        """With a message of this role begun. Raises PromptError and TokenizerError."""
        ids, turns = self.turns.then(role)
        return replace(self, turns=turns, ids=self.ids + ids)

    def with_text(self, text: str) -> Said:
        """With the text in the open message, encoded as data. Raises TokenizerError."""
        ids = array("i")
        if self.turns.role == ASSISTANT:
            self.turns.tokenizer.encode_data(text, into=ids, user="an answer")
        else:
            encode_question(self.turns.tokenizer, text, ids)
        return replace(self, ids=self.ids + ids)

    @property
    def for_user(self) -> Said:
        """With a message of the user open."""
        return self if self.turns.role == USER else self.then(USER)


@dataclass
class Moment:
    """What can be gone back to. `kept` is a copy of the cache, where what follows leaves the attention chunk."""

    said: Said
    offset: int  # tokens that the cache held
    what: str  # that followed
    kept: HybridKVCache | None = None


class Chat:
    """Goes on from a session whose documents have been read. One turn at a time:

    `begin` returns a session to `prefill` and `decode`; then `end` takes its answer into the conversation, or
    `undo` drops it. What is refused changes nothing.
    """

    def __init__(self, session: Session, turns: Turns) -> None:
        inputs = session.sized.inputs
        self.session, self.cache = replace(session, features=None), session.undivided_cache
        self.said = Said(turns, inputs.prompt.ids, inputs.prompt.spans, inputs.prompt.images)
        self.moments: list[Moment] = []
        self._first = inputs.prompt_tokens - len(inputs.prompt.ids)  # the position of its first own token
        self._beginning = self.said
        self._turn: Session | None = None
        self._last = session
        self._drafts: DraftSource | None = session.draft_source() if inputs.prompt.ids or inputs.context else None
        self._indexed = len(inputs.prompt.ids)

    @property
    def tokens(self) -> int:
        return self._first + len(self.said.ids)

    def begin(self, question: str) -> Session:
        """The turn that answers. Raises PromptError, TokenizerError, PromptLengthError, RequestError and
        MemoryPlanError."""
        asked = self.said.for_user.with_text(question).then(ASSISTANT)
        return self._go_on(asked, "the last turn", question, answer=True)

    def end(self) -> Answer:
        """Takes the answer of the turn, or what there is of it, into the conversation."""
        assert self._turn is not None, "no turn"
        answer, self._turn = self._turn.answer, None
        self.said = replace(self.said, ids=self.said.ids + answer.ids)
        if self.cache.offset > self.tokens:  # interrupted before a draft was verified
            self.cache.rewind(self.tokens)
        return answer

    def begin_reading(self, prompt: Prompt, what: str, images: ImageReading | None = None) -> Session:
        """A session that reads the documents of `prompt`, which has nothing else, into the user's next message; with
        nothing to decode. Raises what `begin` raises."""
        said = self.said.for_user
        by = self._first + len(said.ids)
        moved = [replace(span, start=span.start + by, stop=span.stop + by) for span in prompt.spans]
        placed = [image.moved(by) for image in prompt.images]
        said = replace(said, ids=said.ids + prompt.ids, spans=[*said.spans, *moved], images=[*said.images, *placed])
        return self._go_on(said, what, None, images=images, unread=placed)

    def end_reading(self) -> None:
        self._turn = None

    def tell_model(self, text: str) -> None:
        """Says something as the system: before everything where nothing has been said, else from here on.

        Raises TokenizerError, and PromptError where the template allows it only at the beginning.
        """
        offset = self.cache.offset
        if self._is_empty:
            turns = Turns.begin(self.said.turns.tokenizer, self.said.turns.template, has_system_prompt=True)
            opened = replace(turns, roles=(SYSTEM,), texts=turns.texts[:1])
            said, offset = Said(opened, opened.opening()).with_text(text).then(USER), 0
        else:
            said = self.said.then(SYSTEM).with_text(text).then(USER)
        self.moments.append(Moment(self.said, offset, "the system's message"))
        if self._is_empty:
            self.cache.rewind(0)
            self._beginning = said
        self.said = said

    def say(self, role: str, text: str) -> None:
        """What was said in another run, to be read later. Raises what `tell_model` raises."""
        if role == SYSTEM:
            self.tell_model(text)
        elif role == USER:
            said = self.said.for_user.with_text(text)
            self.moments.append(Moment(self.said, self.tokens, "the last turn"))
            self.said = said
        else:
            self.said = self.said.then(ASSISTANT).with_text(text)

    def undo(self) -> str:
        """Goes back to before the last thing that was done; returns what it was. Raises RequestError."""
        while not (what := self._go_back()):
            pass  # what a person has not asked for
        return what

    def settle(self) -> Session:
        """A session that reads all that has been said, and begins a message of the user: what a saved context needs."""
        return self._go_on(self.said.for_user, "", None)

    def _go_back(self) -> str:
        if not self.moments:
            raise RequestError("there is nothing to undo")
        moment = self.moments[-1]
        is_held = self.cache.offset <= moment.offset or self._is_same_chunk(moment.offset, self.cache.offset)
        if moment.kept is None and not is_held:
            raise RequestError(
                "what came before is no longer held: an attention chunk has ended since, and the state before it was "
                "kept for the last time that this happened only"
            )
        self.moments.pop()
        self._turn = None
        if moment.kept is not None:
            self.cache = moment.kept
        elif self.cache.offset > moment.offset:
            self.cache.rewind(moment.offset)
        self.said = moment.said
        return moment.what

    def drop(self) -> None:
        """Goes back to before what was begun last, which has failed."""
        self._go_back()

    def memory_report(self) -> MemoryReport:
        return replace(self._last, cache=self.cache).memory_report()

    @property
    def _is_empty(self) -> bool:
        return self._first == 0 and not self.said.spans and self.said.ids == self._beginning.ids

    def _go_on(
        self,
        said: Said,
        what: str,
        question: str | None,
        *,
        answer: bool = False,
        images: ImageReading | None = None,
        unread: Sequence[PlacedImage] = (),
    ) -> Session:
        """The session that reads what `said` has beyond the cache, and answers; afterwards it is what was said."""
        assert self._turn is None, "a turn is not over"
        base = self.session.sized
        begin, stop = self.cache.offset, self._first + len(said.ids)
        most = self._answer_length(stop) if answer else 0
        prompt = Prompt(said.ids, stop, list(said.spans), list(said.images))
        check_length(prompt, most, base.inputs.config.max_position_embeddings, stop)
        reading = images or base.inputs.images
        workload = replace(
            base.plan.workload,
            prompt_tokens=stop,
            max_new_tokens=most,
            new_tokens=len(said.ids),
            images=reading.workload(unread) if reading else None,
        )
        step = min(base.plan.prefill_chunk_size, max(1, stop - begin))
        plan = grown(base.plan, workload, step)
        leaves = not self._is_same_chunk(begin, stop + most)
        self._check_room(
            Growth.of(
                plan,
                self.cache.held(),
                begin,
                keeps_state=leaves and all(moment.kept is None for moment in self.moments),
                loads_tower=bool(unread),
            )
        )
        features = None
        if unread:
            assert reading is not None
            features = reading.load(
                unread,
                dtype=self.session.model.dtype,
                device=self.session.model.device,
                is_mapped=base.plan.weights_are_mapped,
            )
        self.moments.append(self._moment(what, leaves=leaves))
        inputs = replace(
            base.inputs,
            request=replace(base.inputs.request, question=question),
            prompt=prompt,
            prompt_tokens=stop,
            max_new_tokens=most,
            checked=self._checked(said),
            images=reading,
        )
        self.said = said
        self._turn = self._last = replace(
            self.session,
            sized=replace(base, inputs=inputs, plan=plan, reused=begin),
            cache=self.cache,
            features=features,
            answer=Answer(),
            drafts=self._draft_source(said) if answer else None,
        )
        return self._turn

    def _moment(self, what: str, *, leaves: bool) -> Moment:
        """Now. Where what follows leaves the attention chunk, the copies for earlier ones make room for that of now."""
        kept = None
        if leaves:
            for earlier in self.moments:
                earlier.kept = None
            kept = self.cache.fork()
        return Moment(self.said, self.cache.offset, what, kept)

    def _is_same_chunk(self, one: int, other: int) -> bool:
        size = self.cache.config.attention_chunk_size
        return one // size == other // size

    def _answer_length(self, tokens: int) -> int:
        """As `ask` has it. Raises RequestError."""
        asked, positions = self.session.request.answer.max_new_tokens, self.cache.config.max_position_embeddings
        left = positions - tokens
        if asked is not None and 0 < left < asked:
            raise RequestError(
                f"an answer of {asked:,} tokens does not fit: the conversation leaves {left:,} of the model's "
                f"{positions:,} positions"
            )
        return asked or max(1, min(DEFAULT_MAX_NEW_TOKENS, left))

    def _check_room(self, growth: Growth) -> None:
        request = self.session.request
        accelerator = free_on_accelerator(self.session.model.device)
        growth.check(capacity_here(request.kv, request.compute, accelerator, request.kv.folder))

    def _checked(self, said: Said) -> Checked:
        """With a seed for each turn: with the same one, all answers would be drawn alike."""
        checked = self.session.sized.inputs.checked
        seed, number = checked.sampling.seed, said.turns.answers
        if seed is None or number < 2:
            return checked
        return replace(checked, sampling=replace(checked.sampling, seed=(seed + number - 1) % 2**63))

    def _draft_source(self, said: Said) -> DraftSource | None:
        """What was indexed, and behind it all that has been said since."""
        from l4ctx.drafts.drafter import DraftCounts

        if self._drafts is None:
            return None
        return replace(self._drafts, end=self._drafts.end + said.ids[self._indexed :], counts=DraftCounts())
