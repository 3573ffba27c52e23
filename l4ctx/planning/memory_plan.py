"""What a run needs, by owner and tier, computed in closed form before any weights are loaded.

Chooses the tiers of keys and values and the prefill chunk size. Free memory is measured in `l4ctx.machine.memory`; the
bytes of keys and values come from `cache.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cache.layout import KV_DTYPES, StoreLayout, unbounded_bytes
from cache.residency import (
    KVBytes,
    Residency,
    buffer_bytes,
    device_rows_within,
    held_bytes,
    peak_bytes,
    pinned_rows_within,
    pinned_slots,
    rows_within,
)
from l4ctx.errors import MEMORY
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import SPARE_SHARE
from l4ctx.planning import disk_use
from l4ctx.planning.device_weights import DeviceWeights
from l4ctx.planning.layer_shares import DeviceShare, LayerShares, spread_note, together, why_on_one
from l4ctx.planning.placement import PlacedWeights, placed_weights
from l4ctx.planning.step_time import PREFILL_CHUNK_SIZES, STREAMING_CHUNK_SIZES, WORTH_GROWING, StepTime
from l4ctx.planning.workload import NO_LIMITS, TOKEN_ID_BYTES, Capacity, Workload
from model.costs import activation_bytes
from model.division import exchange_bytes
from model.errors import UserError
from model.weights.residency import WeightResidency

MARGIN_BYTES = 256 * 2**20
"""Kept free by every plan, for the interpreter, its libraries, and memory that the allocator does not return."""

ACCELERATOR = "accelerator memory"
KV_HOST_LIMIT = "--kv-host-memory"
ADDRESS_SPACE = "address space (ulimit -v)"
FILE_SIZE = "a single file (ulimit -f)"
ALLOWED = (KV_HOST_LIMIT, ADDRESS_SPACE, FILE_SIZE)
"""Shortfalls of what is allowed; those of other tiers are of what is free."""


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
    weights_budget: int | None = None  # memory for mapped weights; None: no limit
    device_weights: DeviceWeights | None = None  # None: an accelerator holds all of them
    shares: tuple[DeviceShare, ...] = ()  # of several accelerators; (): there is one, or all is on the one below
    device: int = 0  # number of the one, among those of the capacity
    notes: tuple[str, ...] = ()  # for the user, one line each

    @classmethod
    def of(cls, workload: Workload, capacity: Capacity = NO_LIMITS) -> MemoryPlan:
        """Chooses tiers, and the prefill chunk size unless the user did; `shortfalls` says what still does not fit.

        Weights that could be mapped are copied into memory where there is plenty: computing is faster that way.
        """
        if capacity.accelerators:
            return _on_several(workload, capacity)
        plan = _within(workload, capacity)
        is_plenty = capacity.host is not None and plan.weights < SPARE_SHARE * capacity.host
        if workload.weights_are_mapped and is_plenty and capacity.weights is None:
            held = _within(replace(workload, weights_are_mapped=False), capacity)
            if not held.shortfalls(capacity) and (held.residency, held.prefill_chunk_size) == (
                plan.residency,
                plan.prefill_chunk_size,
            ):
                return held
        return plan

    def placed(self, residency: Residency, step: int) -> MemoryPlan:
        """The same plan with blocks in these tiers; `step` is the most tokens read at a time."""
        layout, tokens, is_saved = self.layout, self.workload.held, self.workload.is_saved
        slots = pinned_slots(layout, tokens, residency, layout.config.num_nope_layers, all_on_disk=is_saved)
        end = held_bytes(layout, tokens, residency, all_on_disk=is_saved, slots=slots)
        peak = peak_bytes(layout, tokens, step, residency, all_on_disk=is_saved, slots=slots)
        if self.shares:  # each with buffers of its own
            forms = LayerShares(self.workload, step, self.activations, MARGIN_BYTES)
            end = together(forms.end(share.layers, residency) for share in self.shares)
            peak = together(forms.peak(share.layers, residency) for share in self.shares)
        return replace(self, residency=residency, end=end, peak=peak)

    @property
    def weights(self) -> int:
        """Bytes of the text model's weights, and of the vision tower's where there are images."""
        return self.workload.weights + self.workload.tower_weights

    @property
    def weights_are_mapped(self) -> bool:
        return self.workload.weights_are_mapped

    @cached_property
    def weight_residency(self) -> WeightResidency:
        """What of the layers' mapped weights stays in memory, and what is read again in each prefill step."""
        return self.workload.weight_residency(self.weights_budget)

    @property
    def resident_weights(self) -> int:
        """The most bytes of mapped weights in memory at a time."""
        if not self.weights_are_mapped:
            return 0
        if not self.weight_residency.is_streamed:
            return self.weights - self.workload.held_weights
        return self.weight_residency.peak + self.workload.looked_up

    @property
    def weights_by_owner(self) -> list[PlacedWeights]:
        on_accelerator = self.residency.on_accelerator
        return placed_weights(self.workload, self.weight_residency, self.device_weights, on_accelerator=on_accelerator)

    @property
    def images(self) -> int:
        """Peak bytes: the pixels of one image in host memory, and the vision tower's activations."""
        return self.workload.pixel_bytes + self.workload.tower_activations

    @property
    def token_ids(self) -> int:
        return TOKEN_ID_BYTES * self.workload.read_tokens

    @property
    def draft_index(self) -> int:
        return self.workload.draft_index

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
        weights = self.device_weights.on_device if self.device_weights else self.weights
        forks = self.workload.row_bytes + self.workload.kept_state
        beside = self.activations + self.workload.tower_activations + forks
        return weights + self.layout.window_bytes + beside

    @property
    def beside_on_host(self) -> int:
        """Host memory for everything but NoPE keys and values and mapped weights."""
        if self.residency.on_accelerator:
            weights = self.device_weights.on_host if self.device_weights else 0
            return weights + self.token_ids + self.draft_index + max(self.workload.sorting, self.workload.pixel_bytes)
        keys_values = self.layout.window_bytes + self.workload.row_bytes + self.workload.kept_state
        tokens, forward = self.token_ids + self.draft_index, self.activations + self.images
        beside = max(self.workload.sorting, forward, self.workload.gathered_row)
        return self.workload.held_weights + keys_values + tokens + beside

    @property
    def needed(self) -> int:
        """Peak host memory in bytes."""
        return self.beside_on_host + self.host_keys_values

    @property
    def needed_on_accelerator(self) -> int:
        if self.shares:
            return sum(share.needed - MARGIN_BYTES for share in self.shares)
        return self.beside_on_accelerator + self.peak.nope_device if self.residency.on_accelerator else 0

    @property
    def needed_on_disk(self) -> int:
        """Bytes still to be written: sealed blocks with their files' headers, and the rest of a saved context."""
        return disk_use.total(self.workload, self.layout, self.end)

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file to be written."""
        return disk_use.largest_file(self.workload, self.layout, self.end)

    @property
    def needed_addresses(self) -> int:
        """Peak address space in bytes: host memory, and all mapped weights whether they are in memory or not."""
        mapped = self.weights - self.workload.held_weights if self.weights_are_mapped else 0
        return self.needed + mapped

    def shortfalls(self, capacity: Capacity) -> dict[str, tuple[int, int]]:
        """The tiers that are too small, each with the bytes needed and the bytes available."""
        found = {}
        if (lacking := self._lacking_on_accelerator(capacity)) is not None:
            found[ACCELERATOR] = lacking
        within_addresses = capacity.addresses is not None and (capacity.host or 0) >= capacity.addresses
        if capacity.host is not None and self.needed + MARGIN_BYTES > capacity.host and not within_addresses:
            found["memory"] = (self.needed + MARGIN_BYTES, capacity.host)
        if capacity.addresses is not None and self.needed_addresses + MARGIN_BYTES > capacity.addresses:
            found[ADDRESS_SPACE] = (self.needed_addresses + MARGIN_BYTES, capacity.addresses)
        if capacity.file_size is not None and self.largest_file > capacity.file_size:
            found[FILE_SIZE] = (self.largest_file, capacity.file_size)
        if capacity.kv_host is not None and not capacity.has_disk and self.host_keys_values > capacity.kv_host:
            found[KV_HOST_LIMIT] = (self.host_keys_values, capacity.kv_host)
        if capacity.disk is not None and self.needed_on_disk > capacity.disk:
            found[f"disk space in {capacity.disk_folder}"] = (self.needed_on_disk, capacity.disk)
        return found

    def _lacking_on_accelerator(self, capacity: Capacity) -> tuple[int, int] | None:
        """Bytes needed and there. Of several, what the last one lacks is what all of them do."""
        if capacity.accelerator is None:
            return None
        if not self.shares:
            needed, there = self.needed_on_accelerator + MARGIN_BYTES, capacity.with_one(self.device).accelerator or 0
            return (needed, there) if needed > there else None
        last, there = self.shares[-1], sum(capacity.accelerators)
        over = last.needed - capacity.accelerators[last.device]
        return (there + over, there) if over > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json; keys and values as at the end of the run."""
        end, layout = self.end, self.layout
        numbers = {
            name: getattr(self, name)
            for name in (
                "weights",
                "weights_are_mapped",
                "resident_weights",
                "token_ids",
                "draft_index",
                "activations",
                "images",
                "needed",
                "needed_on_accelerator",
                "needed_on_disk",
                "unbounded_cache",
                "prefill_chunk_size",
            )
        }
        device, host, _ = self.residency.split(layout.sealed_rows(self.workload.held))
        return {
            "tokens": self.workload.length,
            **numbers,
            "streamed_a_step": self.weight_residency.read_a_step,
            "copied_a_step": self.device_weights.residency.copied_a_pass if self.device_weights else 0,
            "weight_buffers": self.device_weights.residency.buffers if self.device_weights else 0,
            "weights_by_owner": [weights.as_dict() for weights in self.weights_by_owner],
            "rope_windows": end.rope_windows,
            "nope_device": end.nope_device,
            "nope_host": end.nope_host,
            "nope_disk": end.nope_disk,
            "buffers": end.buffers,
            "pinned": end.pinned,
            "dtype": self.workload.dtype,
            "kv_dtype": layout.kv_dtype,
            "block_tokens": layout.block_tokens,
            "answers_at_a_time": self.workload.rows.count if self.workload.rows else 0,
            "row_bytes": self.workload.row_bytes,
            "kept_state": self.workload.kept_state,
            "host_rows": host,
            "device_rows": device,
            "devices": [share.as_dict() for share in self.shares],
        }


def host_budget(plan: MemoryPlan, capacity: Capacity, *, with_weights: bool = False) -> int | None:
    """The most bytes that `host_keys_values` may take, and leave room for streaming weights if asked to; None where
    nothing limits them."""
    if capacity.host is None:
        return _least(capacity.kv_host)
    free = capacity.host - plan.beside_on_host - MARGIN_BYTES
    return _least(capacity.kv_host, free - (_room_for_weights(plan.workload, free) if with_weights else 0))


def _room_for_weights(workload: Workload, free: int) -> int:
    """For two layers, or all of them if that is less; but at most half of free memory."""
    if workload.stored is None or not workload.weights_are_mapped:
        return 0
    layers = workload.stored.layers
    enough = min(2 * max(layer.total for layer in layers), sum(layer.total for layer in layers))
    return min(enough + workload.looked_up, free // 2)


def _within(workload: Workload, capacity: Capacity) -> MemoryPlan:
    """The plan with the largest prefill chunk that fits."""
    plans: list[MemoryPlan] = []
    sizes = [size * workload.context_ranks for size in PREFILL_CHUNK_SIZES]
    for size in (workload.prefill_chunk_size,) if workload.prefill_chunk_size else sizes:
        plans.append(_with_chunk_size(workload, capacity, size))
        if not plans[-1].shortfalls(capacity):
            break
    else:
        plans.append(plans[0])  # does not fit; refused in terms of the size that the user expects
    plan = plans[-1]
    if workload.prefill_chunk_size is None and plan.prefill_chunk_size == PREFILL_CHUNK_SIZES[0]:
        plan = _grown(plan, capacity)
    return replace(plan, notes=tuple(_notes(plan, capacity)))


def _on_several(workload: Workload, capacity: Capacity) -> MemoryPlan:
    """On the first accelerator that holds everything, which is faster than several; else on as many as are needed.

    On the one with the most memory where layers cannot be spread, or where that gains nothing.
    """
    count = len(capacity.accelerators)
    plans = [
        replace(MemoryPlan.of(workload, capacity.with_one(device)), device=device)
        for device in (range(count) if capacity.weights_device is None else ())
    ]
    rows, chunk = workload.layout.sealed_rows(workload.held), workload.prefill_chunk_size or PREFILL_CHUNK_SIZES[0]
    for one in plans:
        is_whole = one.residency.device_rows >= rows and one.prefill_chunk_size >= chunk
        if is_whole and not one.shortfalls(capacity):
            return _on_one(one, count, "it holds everything")
    roomiest = capacity.accelerators.index(max(capacity.accelerators))
    if (reason := why_on_one(workload, capacity)) is not None:
        one = MemoryPlan.of(workload, capacity.with_one(roomiest))
        return _on_one(replace(one, device=roomiest), count, reason)
    spread, one = _within(workload, capacity), plans[roomiest]
    is_better = spread.residency.device_rows > one.residency.device_rows
    is_slower = spread.prefill_chunk_size < one.prefill_chunk_size
    if not one.shortfalls(capacity) and (is_slower or not is_better or spread.shortfalls(capacity)):
        return _on_one(one, count, "layers on several would gain nothing")
    return spread


def _on_one(plan: MemoryPlan, count: int, reason: str) -> MemoryPlan:
    return replace(plan, notes=(*plan.notes, f"GPU {plan.device} of {count} is used: {reason}"))


def _grown(plan: MemoryPlan, capacity: Capacity) -> MemoryPlan:
    """With a prefill chunk that is large enough for computing to hide the reading of streamed weights, or as large as
    still pays: activations take memory from the weights that stay."""
    for size in STREAMING_CHUNK_SIZES:
        time = step_time(plan, capacity)
        if time.is_hidden or plan.prefill_chunk_size >= plan.workload.read_tokens:
            break
        larger = _with_chunk_size(plan.workload, capacity, size)
        if larger.shortfalls(capacity) or step_time(larger, capacity).a_token > WORTH_GROWING * time.a_token:
            break
        plan = larger
    return plan


def step_time(plan: MemoryPlan, capacity: Capacity) -> StepTime:
    return StepTime.of(plan.workload, plan.prefill_chunk_size, plan.weight_residency.read_a_step, capacity)


def _with_chunk_size(workload: Workload, capacity: Capacity, prefill_chunk_size: int) -> MemoryPlan:
    """With what is copied to an accelerator in pinned memory, if there is room, or else in its files."""
    on_accelerator = capacity.accelerator is not None
    weights = DeviceWeights.of(workload, capacity.weights_device) if on_accelerator else None
    plan = _with_weights(workload, capacity, prefill_chunk_size, weights)
    if weights is None or not weights.can_stay_mapped or not plan.shortfalls(capacity).keys() - {ACCELERATOR}:
        return plan
    return _with_weights(workload, capacity, prefill_chunk_size, replace(weights, is_pinned=False))


def _with_weights(
    workload: Workload, capacity: Capacity, prefill_chunk_size: int, device_weights: DeviceWeights | None
) -> MemoryPlan:
    """Keeps as many sealed blocks as fit on the accelerator, then in host memory; the rest goes to disk, if any."""
    layout, on_accelerator = workload.layout, capacity.accelerator is not None
    together, rows = min(prefill_chunk_size, workload.step_tokens), layout.sealed_rows(workload.held)
    step, itemsize = workload.own_step(together), KV_DTYPES[workload.dtype]
    activations = activation_bytes(workload.config, step, itemsize, workload.meeting(together, step))
    if workload.whole is not None:
        activations = max(activations, exchange_bytes(workload.config, step, itemsize, workload.ranks))
    residency, nothing = Residency(on_accelerator=on_accelerator), KVBytes(0, 0, 0)
    plan = MemoryPlan(workload, layout, residency, prefill_chunk_size, nothing, nothing, activations)
    plan = replace(plan, device_weights=device_weights)
    device_rows = 0
    if capacity.accelerators:
        forms = LayerShares(workload, step, activations, MARGIN_BYTES)
        shares, device_rows = forms.spread(capacity.accelerators, capacity.kv_device)
        plan = replace(plan, shares=shares)
    elif capacity.accelerator is not None:
        left = _least(capacity.kv_device, capacity.accelerator - plan.beside_on_accelerator - MARGIN_BYTES)
        device_rows = device_rows_within(layout, left or 0, step, rows)
    plan = plan.placed(Residency(None, device_rows, on_accelerator), step)
    for with_weights in (True, False) if capacity.has_disk else ():
        budget = host_budget(plan, capacity, with_weights=with_weights)
        is_limited = plan.residency.host_rows is not None or workload.converses  # which grows until it meets its limit
        if budget is not None and (plan.host_keys_values > budget or is_limited):
            budget -= max(0, len(plan.shares) - 1) * buffer_bytes(layout, 1, 1)
            fitting = rows_within(layout, budget, step, is_open_here=True, is_read_here=True)
            if on_accelerator:
                fitting = pinned_rows_within(layout, budget)
            plan = plan.placed(Residency(fitting, device_rows, on_accelerator), step)
            while plan.shares and fitting and plan.host_keys_values > budget:  # each has slots of its own
                fitting -= 1
                plan = plan.placed(Residency(fitting, device_rows, on_accelerator), step)
        if capacity.disk is None or plan.needed_on_disk <= capacity.disk:
            break  # else keys and values need more memory than is left beside weights
    left = None if capacity.host is None else capacity.host - plan.needed - MARGIN_BYTES
    return replace(plan, weights_budget=_least(capacity.weights, left))


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
    if plan.shares:
        yield spread_note(plan.shares)
    if plan.device_weights is not None:
        yield from plan.device_weights.notes(capacity)
    yield from _streaming_notes(plan, capacity)
    chosen = plan.workload.prefill_chunk_size or PREFILL_CHUNK_SIZES[0] * plan.workload.context_ranks
    if plan.prefill_chunk_size < chosen:
        yield f"the prefill chunk is {plan.prefill_chunk_size} tokens, so that the activations fit"


def _streaming_notes(plan: MemoryPlan, capacity: Capacity) -> Iterator[str]:
    residency = plan.weight_residency
    if not residency.is_streamed:
        return
    yield (
        f"{human_bytes(residency.kept)} of the layers' {human_bytes(residency.total)} of weights stay in memory; "
        f"{human_bytes(residency.read_a_step)} are read again for each prefill chunk"
    )
    if residency.budget is not None and residency.peak > residency.budget:
        yield (
            f"a layer takes {human_bytes(residency.peak)}, more than the {human_bytes(residency.budget)} for weights: "
            "it is read as it is used"
        )
    if plan.prefill_chunk_size > PREFILL_CHUNK_SIZES[0] and plan.workload.prefill_chunk_size is None:
        hides = "so that" if step_time(plan, capacity).is_hidden else "to shorten the time in which"
        yield (
            f"the prefill chunk is {plan.prefill_chunk_size} tokens, {hides} computing hides the reading of weights "
            f"({capacity.operations / 1e9:,.0f} GFLOP/s and {human_bytes(round(capacity.reading))}/s are taken for it)"
        )


def _least(*limits: int | None) -> int | None:
    """The smallest of the known limits, at least 0; None if none is known."""
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None
