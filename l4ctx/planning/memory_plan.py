"""What a run needs, by owner and tier, computed in closed form before any weights are loaded.

What is chosen so that it fits is chosen in `l4ctx.planning.fitting`; the bytes of keys and values come from
`cache.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cache.layout import KV_DTYPES, StoreLayout, unbounded_bytes
from cache.residency import (
    KVBytes,
    Residency,
    held_bytes,
    peak_bytes,
    pinned_slots,
)
from l4ctx.errors import MEMORY
from l4ctx.planning import disk_use
from l4ctx.planning.device_weights import DeviceWeights
from l4ctx.planning.layer_shares import DeviceShare, LayerShares, together
from l4ctx.planning.placement import PlacedWeights, placed_weights
from l4ctx.planning.workload import TOKEN_ID_BYTES, Capacity, Workload
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
