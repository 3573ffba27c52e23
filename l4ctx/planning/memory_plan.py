"""What a run needs, by owner and tier: planned from closed forms before weights are loaded, and refused if too much.

Chooses tiers and the prefill chunk size, and computes what would help where that is not enough. Imports no torch, so
that plans are quick. What is free, and what the process holds, is measured in `l4ctx.machine.memory`; the bytes of keys
and values are those of `cache.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
"""Left free by a plan: the interpreter, its libraries, and what the allocator does not give back."""

FILE_BYTES, FILE_BYTES_A_TENSOR = 4096, 192
"""Disk space that a row takes beside its keys and values: its header, and what is lost at the end of a page."""

PREFILL_CHUNK_SIZES = (8192, 4096, 2048, 1024, 512, 256)
"""Tried in this order where the user names none; more tokens at a time are faster and need more for activations."""

WORTH_SAYING = 0.98
"""What leaves more than this share of the lack, and so does not help by itself or with others, is not named."""

KV_HOST_LIMIT = "--kv-host-memory"


class MemoryPlanError(UserError):
    """A run that cannot fit; the message says what it needs, what is free, and what would help."""

    exit_code = MEMORY


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one run by owner and tier, and what was chosen so that they fit."""

    workload: Workload
    layout: StoreLayout
    residency: Residency
    prefill_chunk_size: int
    end: KVBytes  # keys and values at the end of the run
    peak: KVBytes  # at the most, by tier
    activations: int
    notes: tuple[str, ...] = ()  # what a user should know, one line each

    @classmethod
    def of(cls, workload: Workload, capacity: Capacity = NO_LIMITS) -> MemoryPlan:
        """Chooses tiers, and the prefill chunk size if the user did not, for this capacity; `check` says if it fits.

        Weights that could be mapped are held in memory where there is plenty: they are quicker there.
        """
        plan = cls._within(workload, capacity)
        if workload.weights_are_mapped and capacity.host is not None and plan.weights < SPARE_SHARE * capacity.host:
            held = cls._within(replace(workload, weights_are_mapped=False), capacity)
            if not held.shortfalls(capacity) and (held.residency, held.prefill_chunk_size) == (
                plan.residency,
                plan.prefill_chunk_size,
            ):
                return held
        return plan

    @classmethod
    def _within(cls, workload: Workload, capacity: Capacity) -> MemoryPlan:
        plans: list[MemoryPlan] = []
        for size in (workload.prefill_chunk_size,) if workload.prefill_chunk_size else PREFILL_CHUNK_SIZES:
            plans.append(cls._with(workload, capacity, size))
            if not plans[-1].shortfalls(capacity):
                break
        else:
            plans.append(plans[0])  # to be refused, in the terms that a user knows
        return replace(plans[-1], notes=tuple(plans[-1]._notes(capacity)))

    @classmethod
    def _with(cls, workload: Workload, capacity: Capacity, prefill_chunk_size: int) -> MemoryPlan:
        layout, on_accelerator = workload.layout, capacity.accelerator is not None
        step, rows = min(prefill_chunk_size, workload.read_tokens), layout.sealed_rows(workload.length)
        nothing = KVBytes(0, 0, 0)
        plan = cls(
            workload,
            layout,
            Residency(on_accelerator=on_accelerator),
            prefill_chunk_size,
            nothing,
            nothing,
            activation_bytes(workload.config, step, KV_DTYPES[workload.dtype]),
        )
        device_rows = 0
        if capacity.accelerator is not None:
            left = _least(capacity.kv_device, capacity.accelerator - plan._beside_on_accelerator - MARGIN_BYTES)
            device_rows = min(rows, rows_within(layout, left or 0, step, is_open_here=True, is_read_here=False))
        plan = plan._placed(Residency(None, device_rows, on_accelerator), step)
        budget = plan.host_budget(capacity)
        if capacity.has_disk and budget is not None and plan.host_keys_values > budget:
            fitting = rows_within(layout, budget, step, is_open_here=not on_accelerator, is_read_here=True)
            plan = plan._placed(Residency(fitting, device_rows, on_accelerator), step)
        return plan

    def _placed(self, residency: Residency, step: int) -> MemoryPlan:
        workload = self.workload
        end = held_bytes(self.layout, workload.length, residency, all_on_disk=workload.is_saved)
        peak = peak_bytes(self.layout, workload.length, step, residency, all_on_disk=workload.is_saved)
        return replace(self, residency=residency, end=end, peak=peak)

    @property
    def weights(self) -> int:
        """Of the text model, and of the vision tower where there are images."""
        return self.workload.weights + self.workload.tower_weights

    @property
    def weights_are_mapped(self) -> bool:
        return self.workload.weights_are_mapped

    @property
    def held_weights(self) -> int:
        """Those that are no pages of files."""
        workload = self.workload
        if not workload.weights_are_mapped:
            return self.weights
        return workload.tower_weights if workload.images and workload.images.stored_dtype != workload.dtype else 0

    @property
    def images(self) -> int:
        """At the most: pixels of one image in host memory, and the vision tower's activations where it computes."""
        return self.workload.pixel_bytes + self.workload.tower_activations

    @property
    def token_ids(self) -> int:
        return TOKEN_ID_BYTES * self.workload.read_tokens

    @property
    def unbounded_cache(self) -> int:
        """Keys and values if every layer kept all of them."""
        return unbounded_bytes(self.workload.config, self.workload.length, KV_DTYPES[self.workload.dtype])

    @property
    def host_keys_values(self) -> int:
        """Host memory for NoPE keys and values and the buffers that serve them, at the most."""
        return self.peak.nope_host + self.peak.buffers

    def host_budget(self, capacity: Capacity) -> int | None:
        """Bytes that `host_keys_values` may be; None where nothing limits them."""
        return _least(
            capacity.kv_host, None if capacity.host is None else capacity.host - self._beside_on_host - MARGIN_BYTES
        )

    @property
    def _beside_on_accelerator(self) -> int:
        """Bytes of an accelerator's memory beside NoPE keys and values."""
        return self.weights + self.layout.window_bytes + self.activations + self.workload.tower_activations

    @property
    def _beside_on_host(self) -> int:
        """Bytes of host memory beside NoPE keys and values: everything but mapped weights."""
        if self.residency.on_accelerator:
            return self.token_ids + self.workload.pixel_bytes
        return self.held_weights + self.layout.window_bytes + self.token_ids + self.activations + self.images

    @property
    def needed(self) -> int:
        """Bytes of host memory, at the most."""
        return self._beside_on_host + self.host_keys_values

    @property
    def needed_on_accelerator(self) -> int:
        return self._beside_on_accelerator + self.peak.nope_device if self.residency.on_accelerator else 0

    @property
    def needed_on_disk(self) -> int:
        """Bytes still to be written: sealed blocks with their files' headers, and what a saved context has beside."""
        layout = self.layout
        rows = self.end.nope_disk // layout.row_bytes if self.end.nope_disk else 0
        tensors = self.workload.config.num_nope_layers * layout.segments_per_block * (4 if layout.scale_bytes else 2)
        total = self.end.nope_disk + rows * (FILE_BYTES + FILE_BYTES_A_TENSOR * tensors)
        if self.workload.is_saved:
            total += self.token_ids + layout.window_bytes + layout.open_bytes(layout.block_tokens)
        return max(0, total - self.workload.on_disk_already)

    def shortfalls(self, capacity: Capacity) -> dict[str, tuple[int, int]]:
        """The tiers that do not suffice, with bytes needed and bytes there."""
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

    def check(self, capacity: Capacity) -> None:
        """Raises MemoryPlanError if the run cannot fit."""
        shortfalls = self.shortfalls(capacity)
        if not shortfalls:
            return
        short = "; ".join(
            f"{human_bytes(needed)} of {tier}, and {human_bytes(there)} are "
            f"{'allowed' if tier == KV_HOST_LIMIT else 'free'}"
            for tier, (needed, there) in shortfalls.items()
        )
        what_helps = "; ".join(self.remedies(capacity)) or "nothing but a larger machine"
        raise MemoryPlanError(
            f"this run needs {short} (keys and values {human_bytes(self.peak.rope_windows + self.peak.nope)}, weights "
            f"{human_bytes(self.held_weights)}, activations {human_bytes(self.activations)}"
            f"{f', images {human_bytes(self.images)}' if self.images else ''}); what helps: {what_helps}"
        )

    def remedies(self, capacity: Capacity) -> list[str]:
        """What a user can do: first what is enough by itself, then the rest; the cheapest of each first."""
        short, enough, partial = self._short(capacity), [], []
        if not short:
            return []
        for option in _options(self, capacity):
            left = MemoryPlan.of(option.workload, option.capacity)._short(option.capacity)
            if left == 0:
                enough.append(f"{option.action} makes it fit{option.detail}")
            elif left < WORTH_SAYING * short:
                partial.append(f"{option.action} saves {human_bytes(short - left)}{option.detail}, not enough alone")
        if len(partial) > 1 and not enough and (actions := _together(self, capacity)):
            enough.append(f"{' and '.join(actions)} make it fit")
        return enough + partial + self._shorter(capacity)

    def _shorter(self, capacity: Capacity) -> list[str]:
        """Documents to leave out, and how many tokens would fit."""
        total, fitting = self.workload.prompt_tokens, tokens_that_fit(self.workload, capacity)
        if not 0 < fitting < total:
            return []
        found, documents = [], sorted(self.workload.largest, key=lambda document: document[1])
        left_out = next(([document] for document in documents if document[1] >= total - fitting), documents[:-4:-1])
        tokens = sum(tokens for _, tokens in left_out)
        share = f"{tokens / total:.0%}".replace("%", " %")
        if share not in ("0 %", "100 %"):
            hint = "" if tokens >= total - fitting else ", not enough alone"
            found.append(f"leave out {' and '.join(name for name, _ in left_out)}, {share} of the tokens{hint}")
        return [*found, f"fewer tokens: {fitting:,} of these {total:,} fit"]

    def _short(self, capacity: Capacity) -> int:
        """Bytes that are missing, of all tiers together; a limit within host memory is not one more tier."""
        short = {tier: needed - there for tier, (needed, there) in self.shortfalls(capacity).items()}
        in_host_memory = max(short.pop("memory", 0), short.pop(KV_HOST_LIMIT, 0))
        return in_host_memory + sum(short.values())

    def _notes(self, capacity: Capacity) -> Iterator[str]:
        if capacity.kv_host is not None and capacity.has_disk and self.host_keys_values > capacity.kv_host:
            yield (
                f"--kv-host-memory {human_bytes(capacity.kv_host)} is exceeded: open blocks and read buffers take "
                f"{human_bytes(self.host_keys_values)} in any case"
            )
        if capacity.kv_device is not None and self.peak.nope_device > capacity.kv_device:
            yield (
                f"--kv-device-memory {human_bytes(capacity.kv_device)} is exceeded: open blocks take "
                f"{human_bytes(self.peak.nope_device)} in any case"
            )
        if self.weights_are_mapped and capacity.host is not None and self.weights > capacity.host:
            yield (
                f"the weights ({human_bytes(self.weights)}) are more than the memory that is free: the run reads "
                "them from the checkpoint's files again and again, which no prediction of time takes into account"
            )
        chosen = self.workload.prefill_chunk_size or PREFILL_CHUNK_SIZES[0]
        if self.prefill_chunk_size < chosen:
            yield f"{self.prefill_chunk_size} tokens are read at a time, so that the activations fit"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json; keys and values are those at the end of the run."""
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


class _Option(NamedTuple):
    """Something that a user could do: how it is said, what more to say, and the workload and capacity then."""

    action: str
    detail: str
    workload: Workload
    capacity: Capacity


def _options(plan: MemoryPlan, capacity: Capacity) -> Iterator[_Option]:
    """From the cheapest, in effort and in loss of quality, to the dearest."""
    workload, on_accelerator = plan.workload, capacity.accelerator is not None
    if capacity.disk is not None and (lacking := plan.needed_on_disk - capacity.disk) > 0:
        yield _Option(
            f"{human_bytes(lacking)} more free in {capacity.disk_folder}, or a folder on a larger disk,",
            "",
            workload,
            replace(capacity, disk=None),
        )
    if capacity.kv_host is not None:
        unlimited = replace(capacity, kv_host=None)
        without = MemoryPlan.of(workload, unlimited)
        if "memory" not in without.shortfalls(unlimited):
            yield _Option(f"--kv-host-memory {-(-without.host_keys_values // 2**20)}MiB", "", workload, unlimited)
    if not capacity.has_disk:
        there = replace(capacity, disk_folder="DIR")
        on_disk = human_bytes(MemoryPlan.of(workload, there).needed_on_disk)
        yield _Option("--kv-dir DIR", f" ({on_disk} on disk)", workload, there)
    for size in PREFILL_CHUNK_SIZES if workload.prefill_chunk_size and workload.saved_layout is None else ():
        smaller = replace(workload, prefill_chunk_size=size)
        if size < plan.prefill_chunk_size and (
            size == PREFILL_CHUNK_SIZES[-1] or not MemoryPlan.of(smaller, capacity).shortfalls(capacity)
        ):
            yield _Option(f"--prefill-chunk-size {size}", "", smaller, capacity)
            break
    yield from _other_dtypes(plan, capacity)
    if workload.images is not None:
        largest, pixels = workload.images.largest, human_bytes(workload.images.pixel_bytes)
        yield _Option(
            "--no-images",
            f" ({largest} takes {pixels} to decode; scaled down it takes less)",
            workload.without_images(),
            capacity,
        )
    if on_accelerator:
        yield _Option(
            "--device cpu",
            "",
            workload.in_dtype(workload.dtype, on_accelerator=False),
            replace(capacity, accelerator=None, kv_device=None),
        )


def _other_dtypes(plan: MemoryPlan, capacity: Capacity) -> Iterator[_Option]:
    """Of keys and values, and of everything. A saved context has settled both."""
    workload = plan.workload
    if workload.saved_layout is not None:
        return
    for dtype in ("bfloat16", "int8"):
        other = replace(workload, kv_dtype=dtype)
        factor = plan.layout.row_bytes / other.layout.row_bytes if plan.layout.row_bytes else 1.0
        if factor > 1:
            yield _Option(f"--kv-dtype {dtype}", f" (keys and values {factor:.1f} times smaller)", other, capacity)
        if dtype == "bfloat16":
            for computed in dict.fromkeys(("bfloat16", workload.stored_dtype)):
                if computed is not None and computed != workload.dtype:
                    yield _Option(
                        f"--dtype {computed}",
                        "",
                        workload.in_dtype(computed, on_accelerator=capacity.accelerator is not None),
                        capacity,
                    )


def _together(plan: MemoryPlan, capacity: Capacity) -> list[str]:
    """Options that are enough only if combined, the cheapest ones that help; none if they are not enough either."""
    actions: list[str] = []
    while short := plan._short(capacity):
        for action, _, workload, there in _options(plan, capacity):
            better = MemoryPlan.of(workload, there)
            if better._short(there) < WORTH_SAYING * short:
                actions.append(action)
                plan, capacity = better, there
                break
        else:
            return []
    return actions


def tokens_that_fit(workload: Workload, capacity: Capacity) -> int:
    """The longest prompt that fits, in tokens: 0 if none does, at most what the model has positions for."""
    fitting, too_many = 0, workload.config.max_position_embeddings - workload.max_new_tokens + 1
    while too_many - fitting > 1:
        tokens = (fitting + too_many) // 2
        shorter = replace(
            workload, prompt_tokens=tokens, new_tokens=workload.new_tokens and min(tokens, workload.new_tokens)
        )
        if MemoryPlan.of(shorter, capacity).shortfalls(capacity):
            too_many = tokens
        else:
            fitting = tokens
    return fitting


def _least(*limits: int | None) -> int | None:
    """The smallest of those that are known, but not less than 0; None if none is."""
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None
