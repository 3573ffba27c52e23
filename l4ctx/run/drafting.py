"""What a run's drafts are copied from: the tokens of its prompt, those in a saved context included."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.drafts.drafter import MOST_TOKENS, Drafter
from l4ctx.drafts.index import DEPTH, IndexedText
from model.costs import parameter_count, weights_a_token, weights_of_another_token

if TYPE_CHECKING:
    from l4ctx.run.sizing import Sized

ROW_COST = 0.1
"""Of a forward of one token, what each more takes beside the weights of experts: it reads the same ones."""


@dataclass(frozen=True)
class DraftSource:
    """Indexed texts, and what a drafter must know beside them. Makes a drafter for each answer."""

    texts: list[IndexedText]
    end: array[int]  # the prompt's last tokens
    most: int  # tokens of a draft
    row_cost: float
    image_patch: int | None
    nbytes: int  # of the index, and of token ids that only drafts need

    @classmethod
    def of(cls, sized: Sized) -> DraftSource:
        """Indexes the prompt but for what a context has indexed. Takes some half a second for a million tokens.

        Raises ContextError.
        """
        from l4ctx.drafts.order import text_order

        inputs, texts, before = sized.inputs, [], array("i")
        asked, ids = inputs.request.answer.draft_tokens, inputs.prompt.ids
        kept = sized.context.text() if sized.context is not None else None
        if inputs.request.answers_from_all and kept is not None:
            texts, before, behind = [kept], kept.ids, ids
        elif kept is not None and memoryview(kept.ids) == memoryview(ids)[: len(kept.ids)]:
            texts, behind = [IndexedText(ids, kept.order)], ids[len(kept.ids) :]
        else:
            behind = ids
        texts.append(IndexedText(behind, text_order(behind)))
        only_here = [text.ids for text in texts if text.ids is not ids]
        return cls(
            texts,
            (before[-DEPTH:] + ids[-DEPTH:])[-DEPTH:],
            MOST_TOKENS if asked is None else asked,
            _row_cost(sized),
            inputs.tokenizer.special_id("<|patch|>"),
            sum(memoryview(part).nbytes for part in (*(text.order for text in texts), *only_here)),
        )

    def drafter(self, question: array[int] | None = None) -> Drafter:
        """`question`: the tokens behind the texts, if they are not among them."""
        return Drafter(
            self.texts,
            self.end + (question or array("i")),
            most=self.most,
            row_cost=self.row_cost,
            never=self.image_patch,
        )


def _row_cost(sized: Sized) -> float:
    """What one more token adds to a forward at the end of the prompt, as a share of a forward of one token.

    By the bytes that are read: all tokens share keys and values and all weights but those of routed experts.
    """
    config, workload, layout = sized.inputs.config, sized.plan.workload, sized.plan.layout
    weight_bytes = workload.weights / parameter_count(config)
    keys_values = layout.row_bytes * workload.prompt_tokens / layout.block_tokens + layout.window_bytes
    one = weight_bytes * weights_a_token(config) + keys_values
    return ROW_COST + (1 - ROW_COST) * weight_bytes * weights_of_another_token(config) / one
