"""What `l4ctx plan` finds out without loading weights: tokens, bytes by owner and tier, what fits here, and the time.

The stages of a run up to the plan, but more forgiving: missing shards and a prompt that is too long are told, not
refused. For a number of tokens nothing but config.json is read, and torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.errors import RequestError
from l4ctx.machine.device import available_on_each, prepare_torch
from l4ctx.machine.reading import reading_rate
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.remedies import remedies, tokens_that_fit
from l4ctx.planning.speed import Speed, measured_speed
from l4ctx.planning.step_time import parts_of
from l4ctx.planning.workload import Capacity
from l4ctx.run.counted import Note, counted_weights, published_weights
from l4ctx.run.forms import FormPlan, form_plans, read_a_token, reading_less
from l4ctx.run.measuring import feed_forward_weight
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS, PlanRequest
from l4ctx.run.sizing import PromptSize, capacity_here, prompt_operations, workload_of
from l4ctx.run.weights import Weights
from model.config import TextConfig
from model.costs import Operations, reading_operations

if TYPE_CHECKING:
    from l4ctx.documents.document import Skipped
    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.images import ImageReading, ImageUse
    from model.weights.sources import WeightSource


@dataclass(frozen=True)
class PlanReport:
    """The plan, and what a person wants to know about it."""

    plan: MemoryPlan
    capacity: Capacity
    shortfalls: dict[str, tuple[int, int]]  # bytes needed and there, by tier
    documents: list[tuple[str, int]]  # with their tokens, wrapping included; none for a number of tokens
    skipped: list[Skipped]
    notes: list[str]
    tokens_in_memory: int  # the longest prompt that fits
    tokens_with_disk: int | None  # None: no disk is given
    speed: Speed | None
    seconds: float | None  # to read the prompt; None: no rate is known
    assumed_seconds: float | None  # the same at rates that are assumed of this processor; None: others are known
    read_from_disk: int  # bytes of keys and values, in all steps of the prefill together
    weights_read: int  # bytes that are read in these steps again, as memory does not hold them
    forms: Sequence[FormPlan]  # published ones of the model, where this one is not held in memory

    @property
    def exceeds_positions(self) -> bool:
        return self.plan.workload.length > self.plan.workload.config.max_position_embeddings

    @property
    def fits(self) -> bool:
        return not self.shortfalls and not self.exceeds_positions

    @property
    def folders(self) -> list[tuple[str, int, int]]:
        """Folders with the number and the tokens of the documents in each itself, the most tokens first."""
        found: dict[str, tuple[int, int]] = {}
        for source, tokens in self.documents:
            name = f"{source.rpartition('/')[0]}/" if "/" in source else "./"
            number, total = found.get(name, (0, 0))
            found[name] = number + 1, total + tokens
        return sorted(((name, *counts) for name, counts in found.items()), key=lambda folder: -folder[2])

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json."""
        workload = self.plan.workload
        return {
            "fits": self.fits,
            "prompt_tokens": workload.prompt_tokens,
            "max_new_tokens": workload.max_new_tokens,
            "max_position_embeddings": workload.config.max_position_embeddings,
            "exceeds_positions": self.exceeds_positions,
            "documents": [{"path": source, "tokens": tokens} for source, tokens in self.documents],
            "skipped": [{"path": entry.source, "reason": entry.reason} for entry in self.skipped],
            "plan": self.plan.as_dict(),
            "room": asdict(self.capacity),
            "missing": {tier: {"needed": needed, "there": there} for tier, (needed, there) in self.shortfalls.items()},
            "remedies": remedies(self.plan, self.capacity),
            "notes": self.notes,
            "tokens_in_memory": self.tokens_in_memory,
            "tokens_with_disk": self.tokens_with_disk,
            "read_from_disk": self.read_from_disk,
            "weights_read": self.weights_read,
            "weights_read_a_token": read_a_token(self.plan),
            "reading_less": reading_less(self.plan, self.capacity, self.forms),
            "forms": [form.as_dict() for form in self.forms],
            "operations_per_second": self.speed and self.speed._asdict(),
            "seconds": self.seconds,
            "assumed_seconds": self.assumed_seconds,
            "folders": [{"path": name, "documents": number, "tokens": all_} for name, number, all_ in self.folders],
        }


@dataclass(frozen=True)
class _Read:
    """What is known of a prompt: its length, and for documents the prompt itself."""

    tokens: int
    prompt: Prompt | None = None
    images: ImageReading | None = None
    skipped: Sequence[Skipped] = ()

    def size(self, max_new_tokens: int) -> PromptSize:
        if self.prompt is None:
            return PromptSize(self.tokens, max_new_tokens)
        return PromptSize.of(self.prompt, self.images, self.tokens, max_new_tokens)

    def operations(self, config: TextConfig, start: int, stop: int) -> Operations:
        """Of reading positions start .. stop - 1."""
        if self.prompt is None:
            return reading_operations(config, start, stop)
        return prompt_operations(config, self.prompt, self.images, start, stop)

    def seconds(self, plan: MemoryPlan, speed: Speed, capacity: Capacity) -> float:
        """To read all of it, at `speed`, while weights that do not stay in memory are read, and those that do not stay
        on an accelerator are copied."""
        config, residency, total = plan.workload.config, plan.weight_residency, 0.0
        reading = capacity.reading
        if (weights := plan.device_weights) is not None:
            copying = weights.residency.copied_a_pass / weights.rate(capacity)
            for positions, count in self.steps(plan):
                operations = self.operations(config, positions.start, positions.stop)
                total += max(speed.seconds(operations), count * copying)
            return total
        if not residency.is_streamed:
            return speed.seconds(self.operations(config, 0, self.tokens))
        for positions, count in self.steps(plan):
            computing = speed.seconds(self.operations(config, positions.start, positions.stop))
            read = count * residency.read_a_step
            if not positions.start:
                read += residency.total - residency.layers[-1].total - residency.read_a_step
            total += max(computing, read / reading)
        return total

    def number_of_steps(self, plan: MemoryPlan) -> int:
        return -(-self.tokens // plan.prefill_chunk_size)

    def steps(self, plan: MemoryPlan) -> Iterator[tuple[range, int]]:
        """Those of the prefill, roughly, in few parts: the positions of each, and how many steps."""
        size = plan.prefill_chunk_size
        for steps in parts_of(self.number_of_steps(plan)):
            yield range(steps.start * size, min(steps.stop * size, self.tokens)), len(steps)


def make_plan(request: PlanRequest, note: Note) -> PlanReport:
    """The plan for what is requested; `note` is told what a user should know.

    Raises RequestError, ConfigError, and for documents also DocumentError, TokenizerError, ImageProcessingError and
    PromptError.
    """
    if (request.tokens is None) == (not request.sources.paths):
        raise RequestError("a plan is made for documents or for --tokens N: give one of them")
    config = TextConfig.from_folder(request.model)
    notes: list[str] = []

    def noted(text: str) -> None:
        notes.append(text)
        note(text)

    if request.tokens is not None:
        weights, read = counted_weights(request, config, noted), _Read(request.tokens)
    else:
        weights, read = _stored_weights(request, config, noted), _tokenized(request, config, noted)
    if read.tokens < 1:
        raise RequestError(f"--tokens: {read.tokens} is not a positive number")
    request.kv.check_folder()
    accelerators = _accelerators(request)
    capacity = capacity_here(request.kv, request.compute, accelerators, request.kv.folder)
    if request.gpus is not None:  # of another machine
        capacity = replace(capacity, host=request.gpus.host_memory, addresses=None)
    if request.measure and (reading := _reading_rate(request.model)) is not None:
        capacity = replace(capacity, reading=reading)
    size = read.size(_max_new_tokens(request, config, read.tokens))
    workload = workload_of(config, weights, size, request.compute, request.kv.dtype, capacity)
    workload = replace(workload, has_drafts=True)  # as in every run that answers, or keeps what it reads
    plan = plan_memory(workload, capacity)
    for text in plan.notes:
        noted(text)
    speed = _speed(request, plan, bool(accelerators))

    assumed = None if accelerators or speed is not None else Speed(capacity.operations, capacity.operations)

    def seconds(of: MemoryPlan) -> float | None:
        taken = speed or assumed
        return None if taken is None else read.seconds(of, taken, capacity)

    residency = plan.weight_residency
    is_large = residency.is_streamed or bool(plan.shortfalls(capacity))
    return PlanReport(
        plan,
        capacity,
        plan.shortfalls(capacity),
        list(size.documents),
        list(read.skipped),
        notes,
        tokens_in_memory=tokens_that_fit(workload, capacity.without_disk),
        tokens_with_disk=tokens_that_fit(workload, capacity) if capacity.has_disk else None,
        speed=speed,
        seconds=None if speed is None else seconds(plan),
        assumed_seconds=None if assumed is None else seconds(plan),
        read_from_disk=_read_from_disk(plan),
        weights_read=residency.read_a_step * (read.number_of_steps(plan) - 1),
        forms=list(form_plans(workload, capacity, seconds)) if is_large else [],
    )


def _accelerators(request: PlanRequest) -> list[int]:
    """Free bytes of each that is here, or that is to be planned for. Raises RequestError."""
    if request.gpus is not None:
        return [request.gpus.memory] * (request.gpus.one_process or 1)
    return available_on_each(request.compute.device, quick=request.tokens is not None)


def _max_new_tokens(request: PlanRequest, config: TextConfig, prompt_tokens: int) -> int:
    """As `ask` has it for documents; a number of tokens is taken as it is, and nothing added unless asked for."""
    if request.max_new_tokens is not None or request.tokens is not None:
        return request.max_new_tokens or 0
    return max(1, min(DEFAULT_MAX_NEW_TOKENS, config.max_position_embeddings - prompt_tokens))


def _reading_rate(model: Path) -> float | None:
    """Bytes a second from the checkpoint's largest file; None if there is none, or none large enough."""
    files = [model] if model.is_file() else [*model.glob("*.safetensors"), *model.glob("*.gguf")]
    files = [file for file in files if file.is_file()]
    return reading_rate(max(files, key=lambda file: file.stat().st_size)) if files else None


def _stored_weights(request: PlanRequest, config: TextConfig, note: Note) -> Weights:
    """By the shards' headers; without shards by config.json."""
    prepare_torch()
    from model.errors import CheckpointError
    from model.weights.loading import checked_sources
    from model.weights.quantizing import quantized_sources
    from model.weights.shards import unused_weights

    try:
        sources = quantized_sources(checked_sources(request.model, config), request.compute.quantization)
        weights = Weights.of(sources, config)
        if (text := unused_weights(request.model)) is not None:
            note(text)
    except CheckpointError as error:
        note(f"{error}; the weights are counted by config.json")
        return published_weights(request, config, note)
    return weights


def _tokenized(request: PlanRequest, config: TextConfig, note: Note) -> _Read:
    """The prompt of an empty question."""
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.prompt.builder import build_prompt
    from l4ctx.run.inputs import read_sources

    sources = read_sources(request.model, config, request.sources)
    found = sources.documents
    found.require_any(request.sources.paths)
    for text in found.notes:
        note(text)
    template = ChatTemplate.from_folder(request.model)
    if template is not None:
        template.prepare()
    tokenizer = Tokenizer.from_folder(request.model, config.vocab_size)
    images = sources.images.prepare(tokenizer, _tower(sources.images, note)) if found.has_images else None
    prompt = build_prompt(
        tokenizer,
        template,
        found.take(),
        "",
        images=images.prompter if images else None,
        positions=config.max_position_embeddings,
    )
    for text in prompt.notes:
        note(text)
    return _Read(len(prompt.ids), prompt, images, found.skipped)


def _tower(images: ImageUse, note: Note) -> dict[str, WeightSource] | None:
    """The vision tower's weights; None where they have to be counted by config.json."""
    from model.errors import CheckpointError

    try:
        return images.sources()
    except CheckpointError as error:
        note(f"{error}; the vision tower's weights are counted by config.json")
        return None


def _speed(request: PlanRequest, plan: MemoryPlan, on_accelerator: bool) -> Speed | None:
    config, device = plan.workload.config, request.compute.device
    step = min(plan.prefill_chunk_size, plan.workload.prompt_tokens)
    if request.rate is not None:
        if not 0 < request.rate < math.inf:
            raise RequestError(f"--rate: {request.rate} is not a positive number of tokens a second")
        per_token = reading_operations(config, 0, step).total / step
        return Speed(request.rate * per_token, request.rate * per_token)
    if not request.measure:
        return None
    device = device if device != "auto" else "cuda" if on_accelerator else "cpu"
    return measured_speed(config, plan.workload.dtype, device, step, feed_forward_weight(request.model, plan))


def _read_from_disk(plan: MemoryPlan) -> int:
    """Bytes of blocks that are on disk alone, read in every step of the prefill again, but for the last layer."""
    layout, step, config = plan.layout, min(plan.prefill_chunk_size, plan.workload.prompt_tokens), plan.workload.config
    if not plan.end.nope_disk:
        return 0
    reading = config.num_nope_layers - (not config.uses_rope(config.num_hidden_layers - 1))
    sealed = (layout.sealed_rows(start) for start in range(0, plan.workload.prompt_tokens, step))
    return layout.row_bytes * reading // config.num_nope_layers * sum(plan.residency.split(rows)[2] for rows in sealed)
