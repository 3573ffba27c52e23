"""Whole layers over several accelerators of one process: which has which, and what each holds. Imports no torch.

Consecutive layers, in the order of the devices. The first layers' device also has the embeddings and the vision tower,
the last ones' the output matrix (tied embeddings stay with the first). Every device keeps equally many of the newest
rows of blocks, of its own layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from typing import Any

from cache.layout import StoreLayout
from cache.residency import KVBytes, Residency, fork_bytes, held_bytes, peak_bytes, pinned_slots
from l4ctx.formatting import counted
from l4ctx.planning.device_weights import OPTION
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.weights.owners import Owner

Cost = Callable[[int, range, bool], int]
"""Of consecutive layers on the device of this number; whether they are the last ones. Grows with the layers."""


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds at the peak of a run. Bytes."""

    device: int  # its number among those that layers may be on
    layers: range
    weights: int
    rope_windows: int
    nope: int
    beside: int  # activations, what answers at a time need, and the margin

    @property
    def needed(self) -> int:
        return self.weights + self.rope_windows + self.nope + self.beside

    @property
    def numbers(self) -> str:
        """Of its layers, for people."""
        first, last = self.layers.start, self.layers.stop - 1
        return str(first) if first == last else f"{first}-{last}"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json."""
        numbers = asdict(self) | {"layers": [self.layers.start, self.layers.stop - 1]}
        return numbers | {"needed": self.needed}


def filled(free: Sequence[int], num_layers: int, cost: Cost) -> list[tuple[int, range]] | None:
    """Consecutive layers for the devices with so much memory, each as many as it holds, on as few devices as can be;
    None where all together do not hold them. Devices without any are left out.
    """
    found, start = list[tuple[int, range]](), 0
    for device, room in enumerate(free):
        if cost(device, range(start, num_layers), True) <= room:
            return [*found, (device, range(start, num_layers))]
        least, too_many = 0, num_layers - start
        while too_many - least > 1:
            count = (least + too_many) // 2
            if cost(device, range(start, start + count), False) <= room:
                least = count
            else:
                too_many = count
        if least:
            found.append((device, range(start, start + least)))
            start += least
    return None


@dataclass(frozen=True)
class LayerShares:
    """The closed forms of one workload: `step` in tokens read at a time, `activations` and `margin` of each device."""

    workload: Workload
    step: int
    activations: int
    margin: int

    def spread(self, free: Sequence[int], limit: int | None) -> tuple[tuple[DeviceShare, ...], int]:
        """For devices with so much free memory: what each holds, and how many of the newest rows stay there.

        These are as many as fit, with keys and values of NoPE layers within the `limit` for all devices together. What
        does not fit even without them is left to the last device.
        """
        rows = self.workload.layout.sealed_rows(self.workload.held)
        if (found := self._within(free, limit, rows)) is not None:
            return found, rows
        fitting, too_many = 0, rows
        if (found := self._within(free, None, 0)) is None:
            return self._overfull(free), 0
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if (more := self._within(free, limit, middle)) is None:
                too_many = middle
            else:
                found, fitting = more, middle
        return found, fitting

    def share(self, device: int, layers: range, *, is_last: bool, rows: int) -> DeviceShare:
        """With so many rows on every device."""
        workload, config = self.workload, self.workload.config
        is_first = layers.start == 0
        has_head = is_first if config.tie_word_embeddings else is_last
        kinds = _kinds(config, layers)
        if (kinds, rows) not in self._peaks:
            self._peaks[kinds, rows] = self.peak(layers, Residency(None, rows, on_accelerator=True))
        peak = self._peaks[kinds, rows]
        beside = self.activations + self.margin + (workload.tower_activations if is_first else 0)
        if workload.rows is not None:
            logits = 4 * config.vocab_size if has_head else 0
            beside += workload.rows.count * (fork_bytes(part_of(workload.layout, layers), workload.rows.room) + logits)
        weights = self._weights_before[layers.stop] - self._weights_before[layers.start]
        weights += self._outside[0] + workload.tower_weights if is_first else 0
        weights += self._outside[1] if has_head else 0
        return DeviceShare(device, layers, weights, peak.rope_windows, peak.nope_device, beside)

    def peak(self, layers: range, residency: Residency) -> KVBytes:
        """Of these layers."""
        return self._held(layers, residency, functools.partial(peak_bytes, step_tokens=self.step))

    def end(self, layers: range, residency: Residency) -> KVBytes:
        """The same at the end of the run."""
        return self._held(layers, residency, held_bytes)

    def _held(self, layers: range, residency: Residency, form: Callable[..., KVBytes]) -> KVBytes:
        """By a closed form of `cache.residency`, with the segments of host memory that are pinned beforehand."""
        held, is_saved = self.workload.held, self.workload.is_saved
        part = part_of(self.workload.layout, layers)
        if not part.config.num_nope_layers:
            return KVBytes(part.window_bytes, 0, 0)
        slots = pinned_slots(part, held, residency, part.config.num_nope_layers, all_on_disk=is_saved)
        return form(part, held, residency=residency, all_on_disk=is_saved, slots=slots)

    def _within(self, free: Sequence[int], limit: int | None, rows: int) -> tuple[DeviceShare, ...] | None:
        def cost(device: int, layers: range, is_last: bool) -> int:
            return self.share(device, layers, is_last=is_last, rows=rows).needed if layers else 0

        num_layers = self.workload.config.num_hidden_layers
        found = filled(free, num_layers, cost)
        if found is None:
            return None
        shares = tuple(
            self.share(device, layers, is_last=layers.stop == num_layers, rows=rows) for device, layers in found
        )
        return shares if limit is None or sum(share.nope for share in shares) <= limit else None

    def _overfull(self, free: Sequence[int]) -> tuple[DeviceShare, ...]:
        """As if the last device had no limit."""
        without_limit = [*free[:-1], 2**62]
        found = self._within(without_limit, None, 0)
        assert found is not None
        return found

    @cached_property
    def _peaks(self) -> dict[tuple[tuple[int, int], int], KVBytes]:
        """Of as many layers of either kind, with so many rows."""
        return {}

    @cached_property
    def _weights_before(self) -> list[int]:
        """Bytes of the layers before each, and of all."""
        stored, found = self.workload.stored, [0] * self.workload.config.num_hidden_layers
        assert stored is not None
        for part in stored.parts:
            if part.layer is not None:
                found[part.layer] += part.bytes_in(self.workload.dtype)
        return list(itertools.accumulate(found, initial=0))

    @cached_property
    def _outside(self) -> tuple[int, int]:
        """Bytes of the embeddings, and of the last norm and the output matrix."""
        stored, embeddings, head = self.workload.stored, 0, 0
        assert stored is not None
        for part in stored.parts:
            if part.layer is None and part.owner is Owner.EMBEDDINGS:
                embeddings += part.bytes_in(self.workload.dtype)
            elif part.layer is None:
                head += part.bytes_in(self.workload.dtype)
        return embeddings, head


def why_on_one(workload: Workload, capacity: Capacity) -> str | None:
    """Why layers cannot be on several accelerators; None if they can."""
    if capacity.weights_device is not None:
        return f"with {OPTION} layers are not spread over several"
    if workload.converses:
        return "the layers of a conversation are not spread over several"
    if workload.stored is None:
        return "how large each layer is cannot be told"
    return None


def spread_note(shares: Sequence[DeviceShare]) -> str:
    """For the user."""
    parts = [f"{share.numbers} on GPU {share.device}" for share in shares]
    return f"layers are spread over {counted(len(shares), 'GPU')}: {', '.join(parts)}"


def part_of(layout: StoreLayout, layers: range) -> StoreLayout:
    """The same store of as many layers of either kind alone, as if they were a model."""
    return _part_of(layout, *_kinds(layout.config, layers))


@functools.lru_cache(1024)
def _part_of(layout: StoreLayout, rope: int, nope: int) -> StoreLayout:
    flags = (1,) * rope + (0,) * nope
    return layout.of_rank(replace(layout.config, num_hidden_layers=rope + nope, no_rope_layers=flags, moe_layers=()))


def _kinds(config: TextConfig, layers: range) -> tuple[int, int]:
    """How many RoPE layers, and how many NoPE layers."""
    rope = sum(config.no_rope_layers[layers.start : layers.stop])
    return rope, len(layers) - rope


def together(parts: Iterable[KVBytes]) -> KVBytes:
    return KVBytes(*(sum(values) for values in zip(*(astuple(part) for part in parts), strict=True)))
