"""The second stage of a run: how much it needs, whether that is free, and how much of the prompt a context holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.machine.device import free_on_accelerator
from l4ctx.machine.limits import address_space_left, largest_file
from l4ctx.machine.memory import SPARE_SHARE, ProcessMemory, available_disk, available_memory, process_memory
from l4ctx.machine.processor import assumed_operations, computing_dtype
from l4ctx.planning import remedies
from l4ctx.planning.batch import plan_rows
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan, MemoryPlanError
from l4ctx.planning.workload import Capacity, ImageWorkload, Workload
from l4ctx.run.choices import KVDtype
from l4ctx.run.request import ComputeOptions, KVOptions
from l4ctx.run.weights import Weights
from model.config import TextConfig
from model.context_division import most_tokens
from model.costs import Operations, reading_operations

if TYPE_CHECKING:
    import torch

    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.context import ReadContext, WrittenContext
    from l4ctx.run.images import ImageReading
    from l4ctx.run.inputs import Inputs
    from l4ctx.run.monitor import Monitor
    from model.spread import Spread

ALL_OF_IT = 2**62
"""What a context that is only read has on disk already, in bytes: nothing will be written."""


@dataclass(frozen=True)
class PromptSize:
    """Of a prompt and its answer, in tokens."""

    prompt_tokens: int
    max_new_tokens: int
    documents: Sequence[tuple[str, int]] = ()  # each with its tokens
    images: ImageWorkload | None = None

    @classmethod
    def of(cls, prompt: Prompt, images: ImageReading | None, prompt_tokens: int, max_new_tokens: int) -> PromptSize:
        """`prompt_tokens` includes those that a saved context holds."""
        documents = [(span.source, span.stop - span.start) for span in prompt.spans]
        return cls(prompt_tokens, max_new_tokens, documents, images.workload(prompt.images) if images else None)


@dataclass(frozen=True)
class Sized:
    """A plan that fits, and what is reused."""

    inputs: Inputs
    plan: MemoryPlan
    attention: str
    written: WrittenContext | None  # the context that what is read is kept in
    reused: int  # tokens
    before: ProcessMemory | None  # what the process held before weights and cache were made

    @property
    def device(self) -> torch.device:
        """The one that computes, or the first of several."""
        shares = self.plan.shares
        return self.inputs.checked.devices[shares[0].device if shares else self.plan.device]

    @property
    def spread(self) -> Spread | None:
        """Which device has which layers; None where one has all."""
        from model.spread import Spread

        shares, config = self.plan.shares, self.inputs.config
        if len(shares) < 2:
            return None
        layers = [self.inputs.checked.devices[share.device] for share in shares for _ in share.layers]
        return Spread(tuple(layers), config.tie_word_embeddings)

    @property
    def context(self) -> ReadContext | WrittenContext | None:
        return self.written or self.inputs.context

    def operations(self, start: int, stop: int) -> Operations:
        """What reading positions start .. stop - 1 of the prompt takes."""
        return prompt_operations(self.inputs.config, self.inputs.prompt, self.inputs.images, start, stop)


def prompt_operations(
    config: TextConfig, prompt: Prompt, images: ImageReading | None, start: int, stop: int
) -> Operations:
    """To prefill positions start .. stop - 1 of a prompt, the features of images there included."""
    operations = reading_operations(config, start, stop)
    return images.with_images(operations, prompt.images, start, stop) if images else operations


def workload_of(
    config: TextConfig,
    weights: Weights,
    size: PromptSize,
    compute: ComputeOptions,
    kv_dtype: KVDtype,
    capacity: Capacity,
) -> Workload:
    """The workload in the dtype that this machine computes it in."""
    on_accelerator = capacity.accelerator is not None
    dtype = computing_dtype(compute.dtype, weights.dtype, on_accelerator=on_accelerator)
    return Workload(
        config,
        prompt_tokens=size.prompt_tokens,
        max_new_tokens=size.max_new_tokens,
        weights=weights.bytes_in(dtype),
        weights_are_mapped=weights.are_mapped(dtype) and not on_accelerator,
        dtype=dtype,
        kv_dtype=_stored_kv_dtype(kv_dtype, dtype, compute, weights, capacity),
        stored_dtype=weights.dtype,
        stored=weights.stored,
        prefill_chunk_size=compute.prefill_chunk_size,
        context_ranks=compute.context_ranks,
        largest=size.documents,
        images=size.images,
    )


def _stored_kv_dtype(
    asked: KVDtype, dtype: str, compute: ComputeOptions, weights: Weights, capacity: Capacity
) -> KVDtype:
    """Resolves "auto" for a large checkpoint in 16 bits that a processor computes in float32: keys and values are
    stored in the checkpoint's dtype, in which the model was trained, so that the processor does not double them."""
    is_large = capacity.host is not None and 4 * weights.parameters >= SPARE_SHARE * capacity.host
    is_widened = compute.dtype == "auto" and dtype == "float32" != weights.dtype
    if asked != "auto" or not (is_large and is_widened):
        return asked
    return "float16" if weights.dtype == "float16" else "bfloat16"


def capacity_here(
    kv: KVOptions,
    compute: ComputeOptions,
    accelerators: Sequence[int],
    disk: Path | None,
    context: Path | None = None,
) -> Capacity:
    """What is free on this machine, within the user's limits.

    `accelerators`: bytes free on each that layers may be on; none on a CPU. `disk`: the folder that blocks may be
    written to; those of `context` are on disk already. Raises RequestError.
    """
    kv.check_device_memory(on_accelerator=bool(accelerators))
    compute.check_device_memory(on_accelerator=bool(accelerators))
    folder = disk or context
    return Capacity(
        host=available_memory(),
        accelerator=sum(accelerators) if accelerators else None,
        accelerators=tuple(accelerators) if len(accelerators) > 1 else (),
        kv_device=kv.device_memory,
        kv_host=kv.host_memory,
        disk=None if disk is None else available_disk(disk),
        disk_folder=None if folder is None else str(folder),
        addresses=address_space_left(),
        file_size=None if disk is None else largest_file(),
        weights=compute.weights_memory,
        weights_device=compute.weights_device_memory,
        operations=assumed_operations(),
    )


MUCH_TO_EXPAND = 2**28
"""Bytes of weights."""

VECTOR_CODE_HINT = "pip install 'l4ctx[cpu]' adds what makes answers from weights of this form several times as fast"


def size(inputs: Inputs, monitor: Monitor) -> Sized:
    """Plans memory and disk by owner, and opens a context that is written to.

    Raises MemoryPlanError when more is needed than is free, ContextError, and DiskFullError.
    """
    from l4ctx.run.context import Reuse, WrittenContext

    monitor.tell("planning memory")
    request, choices = inputs.request, inputs.choices
    before = process_memory()
    frees = (free_on_accelerator(device) for device in inputs.checked.devices)
    accelerators = [free for free in frees if free is not None]
    answer_from, save_to = request.context.answer_from, request.context.save_to
    disk = save_to or request.kv.folder
    capacity = capacity_here(request.kv, request.compute, accelerators, disk, answer_from)
    if request.launch is not None:
        capacity = capacity.shared_by(request.launch.local_count)
    workload = _workload(inputs, capacity)
    plan = _plan(inputs, workload, capacity)
    if save_to is not None and save_to.exists():
        # much of it may be there already, and a full disk loses nothing
        capacity = replace(capacity, disk=None, file_size=None)
    remedies.check(plan, capacity)
    for text in plan.notes:
        monitor.note(text)
    if not accelerators and request.asks and would_profit(workload):
        monitor.note(VECTOR_CODE_HINT)
    computing = inputs.checked.devices[plan.shares[0].device if plan.shares else plan.device]
    attention = choices.attention(workload.config, workload.dtype, str(computing))
    folder = request.context.folder
    monitor.tell(f"comparing with {folder}" if folder else "planning memory")
    written, reuse = None, Reuse()
    if inputs.context is not None:
        reuse = inputs.context.reuse(inputs.prompt, plan.layout)
    elif save_to is not None:
        provenance = inputs.checked.provenance
        recipe = choices.recipe_for(provenance, plan.layout, plan.prefill_chunk_size, attention)
        written = WrittenContext(choices, recipe, inputs.skipped)
        monitor.resources.callback(written.close)
        monitor.kept = written.kept
        reuse = written.reuse(inputs.prompt, plan.layout)
    for text in reuse.notes:
        monitor.note(text)
    _check_unsaved_rows(inputs, plan, reuse.tokens)
    return Sized(inputs, plan, attention, written, reuse.tokens, before)


def _plan(inputs: Inputs, workload: Workload, capacity: Capacity) -> MemoryPlan:
    """Raises MemoryPlanError for more answers at a time than fit."""
    if inputs.asking is None or inputs.rows is None:
        return plan_memory(workload, capacity)
    return plan_rows(workload, capacity, inputs.rows, is_chosen=inputs.asking.options.batch is not None)


def would_profit(workload: Workload) -> bool:
    """Whether answers wait for weights that are expanded for each token, as the package that avoids it is missing."""
    if workload.stored is None or find_spec("llvmlite") is not None:
        return False
    return workload.stored.expanded_in(workload.dtype) >= MUCH_TO_EXPAND


def _workload(inputs: Inputs, capacity: Capacity) -> Workload:
    """With what a saved context determines: the layout, and what is on disk already."""
    request, choices, prompt = inputs.request, inputs.choices, inputs.prompt
    size = PromptSize.of(prompt, inputs.images, inputs.prompt_tokens, inputs.max_new_tokens)
    workload = workload_of(inputs.config, inputs.checked.weights, size, choices.compute, choices.kv_dtype, capacity)
    whole = inputs.checked.whole
    saved = choices.saved_layout(whole, inputs.length, workload.dtype)
    return replace(
        workload,
        is_saved=request.context.folder is not None,
        on_disk_already=ALL_OF_IT if request.context.answer_from is not None else 0,
        new_tokens=len(prompt.ids),
        has_drafts=request.has_drafts or request.context.save_to is not None,
        saved_layout=None if saved is None else saved.of_rank(inputs.config),
        whole=whole if request.launch is not None else None,
        ranks=1 if request.launch is None else request.launch.count // request.compute.context_ranks,
        converses=request.converses,
        gathers_rows=request.launch is not None and request.context.save_to is not None,
    )


def _check_unsaved_rows(inputs: Inputs, plan: MemoryPlan, reused: int) -> None:
    """New blocks beside a context that is only read have no place on disk. Raises MemoryPlanError."""
    host, layout = plan.residency.host_rows, plan.layout
    if inputs.context is None or inputs.request.kv.folder is not None or host is None:
        return
    ranks, chunk_size = inputs.request.compute.context_ranks, inputs.config.attention_chunk_size
    read, held = (most_tokens(ranks, tokens, chunk_size) for tokens in (inputs.prompt_tokens, reused))
    new = layout.sealed_rows(read) - layout.sealed_rows(held)
    if new > host + plan.residency.device_rows:
        raise MemoryPlanError(
            "what these documents have beyond the context does not fit into memory; add "
            "--kv-dir, or read them into the context with l4ctx prefill"
        )
