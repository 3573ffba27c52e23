"""Drafts of one answer: finds where its newest tokens occurred before, and proposes what followed there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from l4ctx.drafts.acceptance import Acceptance
from l4ctx.drafts.growing import GrowingText
from l4ctx.drafts.index import IndexedText, Text

MOST_TOKENS = 7
"""Of a draft by default: with the token before it, the 8 rows that model.simd multiplies at once."""


@dataclass
class DraftCounts:
    """Tokens that were proposed, and how many of them the model chose, too; forwards that had a draft."""

    proposed: int = 0
    accepted: int = 0
    drafts: int = 0
    steps: int = 0  # all forwards of the answer

    def as_dict(self) -> dict[str, int]:
        return {"proposed": self.proposed, "accepted": self.accepted, "drafts": self.drafts, "steps": self.steps}


class Drafter:
    """For each step of an answer: `propose` before its forward, and `observe` with the tokens that it made certain.

    What an answer's drafts were decides the next ones, and nothing else does.
    """

    def __init__(
        self,
        texts: Sequence[IndexedText],
        prompt: array[int],
        *,
        most: int = MOST_TOKENS,
        row_cost: float = 0.1,
        never: int | None = None,
        counts: DraftCounts | None = None,
    ) -> None:
        """`texts`, oldest first, hold the prompt but for what only `prompt` holds: its last DEPTH tokens or more.

        A draft has at most `most` tokens: as many as pay where each takes `row_cost` of the time that a forward of one
        token takes. It ends before the token `never`. `counts` may be those of several answers.
        """
        self.counts = counts or DraftCounts()
        self._answer = GrowingText(prompt)
        self._texts: list[Text] = [self._answer, *reversed(texts)]
        self._most, self._row_cost, self._never = most, row_cost, never
        self._acceptance = Acceptance()
        self._found: array[int] = array("i")  # what followed the match, of which the first `_proposed` were proposed
        self._match_length = self._proposed = 0

    def propose(self, room: int, rows: int = 1) -> list[int]:
        """At most `room` tokens that may come next, often none, for a forward that `rows` answers share."""
        self._found, self._proposed = array("i"), 0
        if not room:
            return []
        newest = self._answer.newest
        matches = [(text.find(newest), text) for text in self._texts]
        match, text = max(matches, key=lambda found: found[0].length)  # of equally long ones the newest
        if match.length:
            self._found = text.following(match, self._most + 1)
        if self._never is not None and self._never in self._found:
            del self._found[self._found.index(self._never) :]
        most = min(room, self._most, len(self._found))
        self._match_length = match.length
        self._proposed = self._acceptance.worth_verifying(match.length, most, self._row_cost, rows)
        return self._found[: self._proposed].tolist()

    def observe(self, tokens: Sequence[int]) -> None:
        """The tokens that are certain since `propose`: those of the draft that were right, and one more."""
        right = 0
        for number, (drafted, token) in enumerate(zip(self._found, tokens, strict=False)):
            self._acceptance.observe(self._match_length + number, drafted == token)
            if drafted != token:
                break
            right += 1
        self._answer.extend(tokens)
        self.counts.steps += 1
        self.counts.drafts += self._proposed > 0
        self.counts.proposed += self._proposed
        self.counts.accepted += min(right, self._proposed)
