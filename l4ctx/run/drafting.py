"""What a run's drafts are copied from, the tokens of its prompt and saved context, and what verifying them costs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from l4ctx.drafts.drafter import MOST_TOKENS, DraftCounts, Drafter
from l4ctx.drafts.index import DEPTH, IndexedText
from model.costs import answering_operations, parameter_count, weights_a_token, weights_of_another_token

if TYPE_CHECKING:
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.run.sizing import Sized

CPU_OPERATIONS, GPU_OPERATIONS = 6, 100
"""That are done for a few tokens while a byte of memory is read. CPU cores were measured at 2 to 11; for GPUs it is a
third of what data sheets say."""

MEMORY_A_DISK_BYTE = 5
"""Bytes that are read from memory in the time of one from a disk."""


@dataclass(frozen=True)
class DraftSource:
    """Indexed texts, and what a drafter must know beside them. Makes a drafter for each answer."""

    texts: list[IndexedText]
    end: array[int]  # the prompt's last tokens
    most: int  # tokens of a draft
    row_cost: float
    image_patch: int | None
    nbytes: int  # of the index, and of token ids that only drafts need
    counts: DraftCounts = field(default_factory=DraftCounts)  # of all its drafters

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
            row_cost(sized.plan),
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
            counts=self.counts,
        )


@dataclass(frozen=True)
class GrownDrafts:
    """What was indexed when a conversation began, which had `indexed` tokens then; None: it has no drafts."""

    source: DraftSource | None
    indexed: int

    def behind(self, ids: array[int]) -> DraftSource | None:
        """For an answer behind all of `ids`: what was said since follows the indexed texts as it is."""
        if self.source is None:
            return None
        return replace(self.source, end=self.source.end + ids[self.indexed :], counts=DraftCounts())


def row_cost(plan: MemoryPlan) -> float:
    """What one more token adds to a forward at the end of the prompt, as a share of a forward of one token.

    All tokens share what is read, but for the weights of routed experts; each computes with all of it. Times are bytes
    of memory, read or computed with.
    """
    workload, config = plan.workload, plan.workload.config
    operations = GPU_OPERATIONS if plan.residency.on_accelerator else CPU_OPERATIONS
    a_weight = workload.weights / parameter_count(config)
    read = a_weight * weights_a_token(config) + _keys_values(plan, workload.prompt_tokens)
    computed = answering_operations(config, workload.prompt_tokens) / operations
    another = a_weight * weights_of_another_token(config) + computed
    return another / (read + computed)


def _keys_values(plan: MemoryPlan, tokens: int) -> float:
    """What a token behind so many reads of the cache: the time in bytes of memory."""
    layout = plan.layout
    rows = tokens / layout.block_tokens
    *_, on_disk = plan.residency.split(int(rows))
    return layout.window_bytes + layout.row_bytes * (rows + on_disk * (MEMORY_A_DISK_BYTE - 1))
