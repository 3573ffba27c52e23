"""What a run needs, by owner and tier, computed in closed form before any weights are loaded.

Chooses the tiers of keys and values and the prefill chunk size. Free memory is measured in `l4ctx.machine.memory`; the
bytes of keys and values come from `cache.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cache.layout import KV_DTYPES, StoreLayout, unbounded_bytes
from cache.residency import KVBytes, Residency, held_bytes, peak_bytes, rows_within
from l4ctx.errors import MEMORY
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import SPARE_SHARE
from l4ctx.planning.workload import NO_LIMITS, Capacity, Workload
from model.costs import activation_bytes
from model.errors import UserError

TOKEN_ID_BYTES = 4
MARGIN_BYTES = 256 * 2**20
"""Kept free by every plan, for the interpreter, its libraries, and memory that the allocator does not return."""

FILE_BYTES, FILE_BYTES_A_TENSOR = 4096, 192
"""Disk space of a block beside its keys and values: the file's header, and the unused end of its last page."""

PREFILL_CHUNK_SIZES = (8192, 4096, 2048, 1024, 512, 256)
"""Tried in this order by default. Larger chunks are faster and need more memory for activations."""

KV_HOST_LIMIT = "--kv-host-memory"


class MemoryPlanError(UserError):
    """The run does not fit; the message says what it needs, what is free, and what would help."""

    exit_code = MEMORY


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one run by owner and tier, and what was chosen to make it fit."""

    workload: Workload
    layout: StoreLayout
    residency: Residency
    prefill_chunk_size: int
    end: KVBytes  # keys and values at the end of the run
    peak: KVBytes  # by tier
    activations: int
    notes: tuple[str, ...] = ()  # for the user, one line each

    @classmethod
    def of(cls, workload: Workload, capacity: Capacity = NO_LIMITS) -> MemoryPlan:
        """Chooses tiers, and the prefill chunk size unless the user did; `shortfalls` says what still does not fit.

        Weights that could be mapped are copied into memory where there is plenty: computing is faster that way.
        """
        plan = _within(workload, capacity)
        if workload.weights_are_mapped and capacity.host is not None and plan.weights < SPARE_SHARE * capacity.host:
            held = _within(replace(workload, weights_are_mapped=False), capacity)
            if not held.shortfalls(capacity) and (held.residency, held.prefill_chunk_size) == (
                plan.residency,
                plan.prefill_chunk_size,
            ):
                return held
        return plan

    def placed(self, residency: Residency, step: int) -> MemoryPlan:
        """The same plan with blocks in these tiers; `step` is the most tokens read at a time."""
        workload = self.workload
        end = held_bytes(self.layout, workload.length, residency, all_on_disk=workload.is_saved)
        peak = peak_bytes(self.layout, workload.length, step, residency, all_on_disk=workload.is_saved)
        return replace(self, residency=residency, end=end, peak=peak)

    @property
    def weights(self) -> int:
        """Bytes of the text model's weights, and of the vision tower's where there are images."""
        return self.workload.weights + self.workload.tower_weights

    @property
    def weights_are_mapped(self) -> bool:
        return self.workload.weights_are_mapped

    @property
    def images(self) -> int:
        """Peak bytes: the pixels of one image in host memory, and the vision tower's activations."""
        return self.workload.pixel_bytes + self.workload.tower_activations

    @property
    def token_ids(self) -> int:
        return TOKEN_ID_BYTES * self.workload.read_tokens

    @property
    def unbounded_cache(self) -> int:
        """Bytes of keys and values if every layer kept all of them."""
        return unbounded_bytes(self.workload.config, self.workload.length, KV_DTYPES[self.workload.dtype])

    @property
    def host_keys_values(self) -> int:
        """Peak host memory for NoPE keys and values and their read buffers."""
        return self.peak.nope_host + self.peak.buffers

    @property
    def beside_on_accelerator(self) -> int:
        """Accelerator memory for everything but NoPE keys and values."""
        return self.weights + self.layout.window_bytes + self.activations + self.workload.tower_activations

    @property
    def beside_on_host(self) -> int:
        """Host memory for everything but NoPE keys and values and mapped weights."""
        if self.residency.on_accelerator:
            return self.token_ids + self.workload.pixel_bytes
        return self.workload.held_weights + self.layout.window_bytes + self.token_ids + self.activations + self.images

    @property
    def needed(self) -> int:
        """Peak host memory in bytes."""
        return self.beside_on_host + self.host_keys_values

    @property
    def needed_on_accelerator(self) -> int:
        return self.beside_on_accelerator + self.peak.nope_device if self.residency.on_accelerator else 0

    @property
    def needed_on_disk(self) -> int:
        """Bytes still to be written: sealed blocks with their files' headers, and the rest of a saved context."""
        layout = self.layout
        rows = self.end.nope_disk // layout.row_bytes if self.end.nope_disk else 0
        tensors = self.workload.config.num_nope_layers * layout.segments_per_block * (4 if layout.scale_bytes else 2)
        total = self.end.nope_disk + rows * (FILE_BYTES + FILE_BYTES_A_TENSOR * tensors)
        if self.workload.is_saved:
            total += self.token_ids + layout.window_bytes + layout.open_bytes(layout.block_tokens)
        return max(0, total - self.workload.on_disk_already)

    def shortfalls(self, capacity: Capacity) -> dict[str, tuple[int, int]]:
        """The tiers that are too small, each with the bytes needed and the bytes available."""
        found = {}
        if capacity.accelerator is not None and self.needed_on_accelerator + MARGIN_BYTES > capacity.accelerator:
            found["accelerator memory"] = (self.needed_on_accelerator + MARGIN_BYTES, capacity.accelerator)
        if capacity.host is not None and self.needed + MARGIN_BYTES > capacity.host:
            found["memory"] = (self.needed + MARGIN_BYTES, capacity.host)
        if capacity.kv_host is not None and not capacity.has_disk and self.host_keys_values > capacity.kv_host:
            found[KV_HOST_LIMIT] = (self.host_keys_values, capacity.kv_host)
        if capacity.disk is not None and self.needed_on_disk > capacity.disk:
            found[f"disk space in {capacity.disk_folder}"] = (self.needed_on_disk, capacity.disk)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json; keys and values as at the end of the run."""
        end, layout = self.end, self.layout
        numbers = {
            name: getattr(self, name)
            for name in (
                "weights",
                "weights_are_mapped",
                "token_ids",
                "activations",
                "images",
                "needed",
                "needed_on_accelerator",
                "needed_on_disk",
                "unbounded_cache",
                "prefill_chunk_size",
            )
        }
        device, host, _ = self.residency.split(layout.sealed_rows(self.workload.length))
        return {
            "tokens": self.workload.length,
            **numbers,
            "rope_windows": end.rope_windows,
            "nope_device": end.nope_device,
            "nope_host": end.nope_host,
            "nope_disk": end.nope_disk,
            "buffers": end.buffers,
            "dtype": self.workload.dtype,
            "kv_dtype": layout.kv_dtype,
            "block_tokens": layout.block_tokens,
            "host_rows": host,
            "device_rows": device,
        }


def host_budget(plan: MemoryPlan, capacity: Capacity) -> int | None:
    """The most bytes that `host_keys_values` may take; None where nothing limits them."""
    free = None if capacity.host is None else capacity.host - plan.beside_on_host - MARGIN_BYTES
    return _least(capacity.kv_host, free)


def _within(workload: Workload, capacity: Capacity) -> MemoryPlan:
    """The plan with the largest prefill chunk that fits."""
    plans: list[MemoryPlan] = []
    for size in (workload.prefill_chunk_size,) if workload.prefill_chunk_size else PREFILL_CHUNK_SIZES:
        plans.append(_with_chunk_size(workload, capacity, size))
        if not plans[-1].shortfalls(capacity):
            break
    else:
        plans.append(plans[0])  # does not fit; refused in terms of the size that the user expects
    return replace(plans[-1], notes=tuple(_notes(plans[-1], capacity)))


def _with_chunk_size(workload: Workload, capacity: Capacity, prefill_chunk_size: int) -> MemoryPlan:
    """Keeps as many sealed blocks as fit on the accelerator, then in host memory; the rest goes to disk, if any."""
    layout, on_accelerator = workload.layout, capacity.accelerator is not None
    step, rows = min(prefill_chunk_size, workload.read_tokens), layout.sealed_rows(workload.length)
    activations = activation_bytes(workload.config, step, KV_DTYPES[workload.dtype])
    residency, nothing = Residency(on_accelerator=on_accelerator), KVBytes(0, 0, 0)
    plan = MemoryPlan(workload, layout, residency, prefill_chunk_size, nothing, nothing, activations)
    device_rows = 0
    if capacity.accelerator is not None:
        left = _least(capacity.kv_device, capacity.accelerator - plan.beside_on_accelerator - MARGIN_BYTES)
        device_rows = min(rows, rows_within(layout, left or 0, step, is_open_here=True, is_read_here=False))
    plan = plan.placed(Residency(None, device_rows, on_accelerator), step)
    budget = host_budget(plan, capacity)
    if capacity.has_disk and budget is not None and plan.host_keys_values > budget:
        fitting = rows_within(layout, budget, step, is_open_here=not on_accelerator, is_read_here=True)
        plan = plan.placed(Residency(fitting, device_rows, on_accelerator), step)
    return plan


def _notes(plan: MemoryPlan, capacity: Capacity) -> Iterator[str]:
    if capacity.kv_host is not None and capacity.has_disk and plan.host_keys_values > capacity.kv_host:
        yield (
            f"--kv-host-memory {human_bytes(capacity.kv_host)} is exceeded: open blocks and read buffers need at "
            f"least {human_bytes(plan.host_keys_values)}"
        )
    if capacity.kv_device is not None and plan.peak.nope_device > capacity.kv_device:
        yield (
            f"--kv-device-memory {human_bytes(capacity.kv_device)} is exceeded: open blocks need at "
            f"least {human_bytes(plan.peak.nope_device)}"
        )
    if plan.weights_are_mapped and capacity.host is not None and plan.weights > capacity.host:
        yield (
            f"the weights ({human_bytes(plan.weights)}) exceed the free memory: they are read from the "
            "checkpoint's files again and again, which predicted times do not include"
        )
    chosen = plan.workload.prefill_chunk_size or PREFILL_CHUNK_SIZES[0]
    if plan.prefill_chunk_size < chosen:
        yield f"the prefill chunk is {plan.prefill_chunk_size} tokens, so that the activations fit"


def _least(*limits: int | None) -> int | None:
    """The smallest of the known limits, at least 0; None if none is known."""
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None
