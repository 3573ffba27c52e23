"""Many questions behind a prompt of documents: their token ids, and how long they and their answers may be."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.planning.workload import Rows
from l4ctx.prompt.builder import PromptLengthError, encode_question
from l4ctx.prompt.instruction import instructed
from l4ctx.run.questions import Question, QuestionsOptions
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS, AnswerOptions

if TYPE_CHECKING:
    from l4ctx.checkpoint.tokenizer import Tokenizer

TOLD_EVERY = 1000
"""Questions."""


@dataclass(frozen=True)
class Asking:
    """How each question is encoded, and how long it and its answer may be."""

    options: QuestionsOptions
    answer: AnswerOptions  # of all of them
    tokenizer: Tokenizer
    suffix: array[int]  # token ids that follow the question
    left: int  # positions behind the documents

    def ids(self, question: Question) -> array[int]:
        """The question's part of the prompt."""
        ids = array("i")
        text = instructed(question.text) if self.answer.cites else question.text
        encode_question(self.tokenizer, text, ids)
        return ids + self.suffix

    def max_new_tokens(self, question: Question, tokens: int) -> int:
        """The longest answer to a question of so many tokens. Raises RequestError and PromptLengthError."""
        asked, left = question.settings.max_new_tokens or self.answer.max_new_tokens, self.left - tokens
        place = f"{self.options.name}, line {question.line}"
        if left < 1:
            raise PromptLengthError(
                f"{place}: the question has {tokens:,} tokens, {1 - left:,} more than the documents leave of the "
                "model's positions (max_position_embeddings); shorten it"
            )
        if asked is not None and asked > left:
            raise RequestError(
                f"{place}: an answer of {asked:,} tokens does not fit: documents and question leave {left:,} of the "
                "model's positions"
            )
        return asked or min(DEFAULT_MAX_NEW_TOKENS, left)

    def rows(self, tell: Callable[[str], None]) -> Rows:
        """As many as there are questions, each with room for the longest. Raises what `max_new_tokens` raises."""
        longest = room = 0
        questions = self.options.questions
        for number, question in enumerate(questions):
            if number % TOLD_EVERY == 0:
                tell(f"tokenizing: {number:,} of {len(questions):,} questions")
            tokens = len(self.ids(question))
            longest, room = max(longest, tokens), max(room, tokens + self.max_new_tokens(question, tokens))
        return Rows(min(self.options.batch or len(questions), len(questions)), longest, room)
