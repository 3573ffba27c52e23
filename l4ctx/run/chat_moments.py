"""What has been said in a conversation, and the moments that it can be gone back to."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.prompt.builder import encode_question
from l4ctx.prompt.turns import ASSISTANT, SYSTEM, USER, Turns

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache
    from l4ctx.prompt.builder import Prompt
    from l4ctx.spans import Span
    from l4ctx.vision.prompter import PlacedImage


LAST_TURN = "the last turn"


@dataclass(frozen=True)
class Said:
    """A conversation at one time: its token ids behind those that a saved context holds, and what they stand for."""

    turns: Turns
    ids: array[int]  # never changed; a longer conversation has another array
    spans: Sequence[Span] = ()
    images: Sequence[PlacedImage] = ()
    is_empty: bool = False  # nothing but perhaps a system prompt

    @classmethod
    def by_system(cls, turns: Turns, text: str) -> Said:
        """A conversation of which only the system prompt is known. Raises PromptError and TokenizerError."""
        turns = Turns.begin(turns.tokenizer, turns.template, has_system_prompt=True)
        opened = replace(turns, roles=(SYSTEM,), texts=turns.texts[:1])
        return replace(cls(opened, opened.opening()).with_text(text).then(USER), is_empty=True)

    def then(self, role: str) -> Said:
        """With a message of this role begun. Raises PromptError and TokenizerError."""
        ids, turns = self.turns.then(role)
        return replace(self, turns=turns, ids=self.ids + ids, is_empty=False)

    def with_documents(self, prompt: Prompt, start: int) -> Said:
        """With the documents of `prompt`, which holds nothing else, in the open message, from position `start` on."""
        spans = [replace(span, start=span.start + start, stop=span.stop + start) for span in prompt.spans]
        images = [image.moved(start) for image in prompt.images]
        return replace(
            self,
            ids=self.ids + prompt.ids,
            spans=[*self.spans, *spans],
            images=[*self.images, *images],
            is_empty=False,
        )

    def with_text(self, text: str) -> Said:
        """With the text in the open message, encoded as data. Raises TokenizerError."""
        ids = array("i")
        if self.turns.role == ASSISTANT:
            self.turns.tokenizer.encode_data(text, into=ids, user="an answer")
        else:
            encode_question(self.turns.tokenizer, text, ids)
        return replace(self, ids=self.ids + ids, is_empty=False)

    @property
    def for_user(self) -> Said:
        """With a message of the user open."""
        return self if self.turns.role == USER else self.then(USER)


@dataclass
class Moment:
    """What can be gone back to. `kept` is a copy of the cache, where what follows leaves the attention chunk."""

    said: Said
    offset: int  # tokens of it that the cache held, or may hold
    what: str  # that followed; "" for what nobody asked for
    kept: HybridKVCache | None = None
    question: str | None = None  # that was answered then


class Moments:
    """The cache of a conversation, and its earlier states: one copy, and what the cache itself still holds."""

    def __init__(self, cache: HybridKVCache) -> None:
        self.cache = cache
        self.all: list[Moment] = []

    @property
    def has_copy(self) -> bool:
        return any(moment.kept is not None for moment in self.all)

    def leaves_chunk(self, stop: int) -> bool:
        """Whether tokens up to `stop` end the attention chunk, whose window is lost then."""
        return not self._is_same_chunk(self.cache.offset, stop)

    @property
    def last(self) -> Moment | None:
        return self.all[-1] if self.all else None

    def mark(self, said: Said, stop: int, what: str, question: str | None = None) -> None:
        """Now, before the cache gets tokens up to `stop`. A copy takes the place of the one before."""
        kept = None
        if self.leaves_chunk(stop):
            for earlier in self.all:
                earlier.kept = None
            kept = self.cache.fork()
        self.all.append(Moment(said, self.cache.offset, what, kept, question))

    def back(self) -> Moment:
        """Goes back to the last moment, and forgets it. Raises RequestError, and then nothing changes."""
        if not self.all:
            raise RequestError("there is nothing to undo")
        moment, offset = self.all[-1], self.cache.offset
        if moment.kept is not None:
            self.cache = moment.kept
        elif offset > moment.offset:
            if not self._is_same_chunk(moment.offset, offset):
                raise RequestError(
                    "what came before is no longer held: an attention chunk has ended since, and the state before it "
                    "was kept for the last time that this happened only"
                )
            self.cache.rewind(moment.offset)
        return self.all.pop()

    def _is_same_chunk(self, one: int, other: int) -> bool:
        size = self.cache.config.attention_chunk_size
        return one // size == other // size
