"""The session of one turn: its prompt is the whole conversation, and its cache holds most of it already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.machine.device import free_on_accelerator
from l4ctx.planning.growth import Growth, grown
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.prompt.builder import Prompt, PromptLengthError
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS
from l4ctx.run.session import Answer, Session
from l4ctx.run.sizing import capacity_here

if TYPE_CHECKING:
    from l4ctx.run.chat_moments import Moments, Said
    from l4ctx.run.images import ImageReading
    from l4ctx.run.inputs import Checked
    from l4ctx.vision.features import ImageFeatures
    from l4ctx.vision.prompter import PlacedImage


@dataclass(frozen=True)
class Turn:
    """What is to be read, and perhaps answered, behind what a cache holds."""

    said: Said
    stop: int  # tokens, those of a saved context included
    max_new_tokens: int = 0
    question: str | None = None
    cites: bool = False  # sources are named
    images: ImageReading | None = None
    unread: Sequence[PlacedImage] = ()  # images that are read in it
    draws: int = 0  # added to the number of the answer, from which its seed is made

    @property
    def end(self) -> int:
        return self.stop + self.max_new_tokens

    def plan(self, session: Session, moments: Moments) -> MemoryPlan:
        """Raises PromptLengthError and MemoryPlanError for what does not fit."""
        base, cache = session.sized, moments.cache
        positions = cache.config.max_position_embeddings
        if self.end > positions:
            raise PromptLengthError(
                f"the conversation would have {self.end:,} tokens, {self.end - positions:,} more than the model's "
                f"{positions:,} positions (max_position_embeddings); it is as it was before, and /undo makes room"
            )
        workload = replace(
            base.plan.workload,
            prompt_tokens=self.stop,
            max_new_tokens=self.max_new_tokens,
            new_tokens=len(self.said.ids),
            images=self.images.workload(self.unread) if self.images else None,
        )
        plan = grown(base.plan, workload, min(base.plan.prefill_chunk_size, max(1, self.stop - cache.offset)))
        keeps_state = moments.leaves_chunk(self.end) and not moments.has_copy
        growth = Growth.of(plan, cache.held(), cache.offset, keeps_state=keeps_state, loads_tower=bool(self.unread))
        request, free = session.request, free_on_accelerator(session.model.device)
        accelerators = [] if free is None else [free]
        growth.check(capacity_here(request.kv, request.compute, accelerators, request.kv.folder))
        return plan

    def features(self, session: Session) -> ImageFeatures | None:
        """Of the unread images. Raises CheckpointError."""
        if not self.unread:
            return None
        model, is_mapped = session.model, session.sized.plan.weights_are_mapped
        assert self.images is not None
        return self.images.load(self.unread, dtype=model.dtype, device=model.device, is_mapped=is_mapped)

    def session(self, base: Session, plan: MemoryPlan, moments: Moments, features: ImageFeatures | None) -> Session:
        """What reads and answers it; `base` is the session that the conversation began with."""
        inputs, said = base.sized.inputs, self.said
        asked = replace(inputs.request, question=self.question, answer=replace(inputs.request.answer, cites=self.cites))
        inputs = replace(
            inputs,
            request=asked,
            prompt=Prompt(said.ids, self.stop, list(said.spans), list(said.images)),
            prompt_tokens=self.stop,
            max_new_tokens=self.max_new_tokens,
            checked=_checked(inputs.checked, said.turns.answers + self.draws),
            images=self.images,
        )
        sized = replace(base.sized, inputs=inputs, plan=plan, reused=moments.cache.offset)
        return replace(base, sized=sized, cache=moments.cache, features=features, answer=Answer())


def answer_length(asked: int | None, tokens: int, positions: int) -> int:
    """Maximum tokens of an answer behind so many, as `ask` has it. Raises RequestError."""
    left = positions - tokens
    if asked is not None and 0 < left < asked:
        raise RequestError(
            f"an answer of {asked:,} tokens does not fit: the conversation leaves {left:,} of the model's "
            f"{positions:,} positions"
        )
    return asked or max(1, min(DEFAULT_MAX_NEW_TOKENS, left))


def _checked(checked: Checked, number: int) -> Checked:
    """With a seed for each answer: with the same one, all would be drawn alike."""
    seed = checked.sampling.seed
    if seed is None or number < 2:
        return checked
    return replace(checked, sampling=replace(checked.sampling, seed=(seed + number - 1) % 2**63))
