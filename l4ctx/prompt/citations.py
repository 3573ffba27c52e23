"""The sources of an answer: what it quotes, looked up literally, and where the model looked while it answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.prompt.attended import Answered, Attended, AttentionLog, attended
from l4ctx.prompt.quotations import Quotation, find_quotations
from l4ctx.prompt.texts import Place, PromptTexts


@dataclass(frozen=True)
class Citations:
    """`texts` of the places: their lines, in the order of `attended`."""

    quoted: Sequence[Quotation]
    attended: Sequence[Attended]
    texts: Sequence[str]
    is_observed: bool  # whether the model has layers that see all documents

    @property
    def why_none(self) -> str | None:
        """Why no place is named where the model looked."""
        if self.attended:
            return None
        if not self.is_observed:
            return "the model has no layer that sees all documents, so there is no attention to tell of"
        return "attention was spread over the documents, or on none of them: it names no place"

    def as_dict(self) -> dict[str, Any]:
        """Characters are counted in the document's text or in the answer, tokens in the prompt."""
        return {
            "quoted": [
                {
                    "quotation": one.text,
                    "answer_characters": [one.start, one.stop],
                    "is_found": bool(one.places),
                    "places": [_place(place) for place in one.places],
                }
                for one in self.quoted
            ],
            "attended": [
                {
                    **_place(one.place),
                    "share": round(one.share, 4),
                    "answer_characters": [one.statement.start, one.statement.stop],
                    "text": text,
                }
                for one, text in zip(self.attended, self.texts, strict=True)
            ],
            "why_none_attended": self.why_none,
        }


class Citing:
    """Finds the sources of answers about the same documents."""

    def __init__(self, tokenizer: Tokenizer, texts: PromptTexts) -> None:
        self._tokenizer, self._texts = tokenizer, texts

    def log(self) -> AttentionLog:
        """A new observer, for one answer."""
        return AttentionLog(self._texts.within)

    def cite(self, ids: Sequence[int], question: str, log: AttentionLog, first_query: int) -> Citations:
        """The sources of an answer of these tokens, the first of which the query at `first_query` has chosen."""
        answer = Answered.of(self._tokenizer, ids)
        found = attended(log, answer, question, first_query, self._texts)
        return Citations(
            find_quotations(answer.text, self._texts),
            found,
            [self._texts.text(one.place) for one in found],
            bool(log.seen),
        )


def _place(place: Place) -> dict[str, Any]:
    return {
        "path": place.source,
        **({} if place.page is None else {"page": place.page}),
        **({"lines": [place.first, place.last]} if place.first else {"image": True}),
        "characters": [place.start, place.stop],
        "tokens": [place.tokens.start, place.tokens.stop],
    }
