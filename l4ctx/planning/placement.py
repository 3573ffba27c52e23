"""Where weights are: bytes by owner and tier, planned or held. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from l4ctx.planning.device_weights import DeviceWeights
from l4ctx.planning.weights import StoredWeights
from l4ctx.planning.workload import Workload
from model.weights.owners import Owner
from model.weights.residency import WeightResidency


class Tier(StrEnum):
    """In the order of tables."""

    MAPPED = "mapped"  # pages of the checkpoint's files, which the system reads when they are used
    STREAMED = "streamed"  # the same, read again for every prefill chunk
    MEMORY = "memory"
    DEVICE = "device"


@dataclass(frozen=True)
class PlacedWeights:
    """The weights of one owner."""

    owner: Owner
    stored: tuple[str, ...]  # the forms in which they are stored, the one with the most bytes first
    tiers: Mapping[Tier, int]  # bytes, in the dtype computed in if they are converted to it

    @property
    def num_bytes(self) -> int:
        return sum(self.tiers.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json."""
        return {"owner": str(self.owner), "stored": list(self.stored)} | {
            str(tier): self.tiers.get(tier, 0) for tier in Tier
        }


def placed_weights(
    workload: Workload, residency: WeightResidency, device: DeviceWeights | None = None, *, on_accelerator: bool
) -> list[PlacedWeights]:
    """Owners in their order; none for a workload of which only the bytes in all are known."""
    stored, found = workload.stored, list[PlacedWeights]()
    if stored is None:
        return found
    streamed = _streamed(stored, residency) if residency.is_streamed else {}
    held = Tier.DEVICE if on_accelerator else Tier.MEMORY
    copied = device.by_owner() if device else {}
    on_host = Tier.MEMORY if device is None or device.is_pinned else Tier.STREAMED
    for owner in dict.fromkeys(share.owner for share in stored.by_owner()):
        tiers = dict.fromkeys(Tier, 0)
        for part in stored.parts:
            if part.owner is owner:
                is_mapped = workload.weights_are_mapped and not part.changes(workload.dtype)
                tiers[Tier.MAPPED if is_mapped else held] += part.bytes_in(workload.dtype)
        tiers[Tier.STREAMED] = min(tiers[Tier.MAPPED], streamed.get(owner, 0))
        tiers[Tier.MAPPED] -= tiers[Tier.STREAMED]
        tiers[held] -= copied.get(owner, 0)
        tiers[on_host] += copied.get(owner, 0)
        forms = tuple(share.stored for share in stored.by_owner() if share.owner is owner)
        found.append(PlacedWeights(owner, forms, tiers))
    if workload.images is not None:
        is_mapped = workload.weights_are_mapped and workload.images.stored_dtype == workload.dtype
        tiers = {Tier.MAPPED if is_mapped else held: workload.tower_weights}
        found.append(PlacedWeights(Owner.VISION, (workload.images.stored_dtype or workload.dtype,), tiers))
    return found


def held_weights(planned: list[PlacedWeights], held: Mapping[tuple[Owner, str], int]) -> list[PlacedWeights]:
    """With bytes that are held, by owner and tier. What of mapped ones is streamed is as planned."""
    found = []
    for weights in planned:
        tiers = {tier: held.get((weights.owner, tier), 0) for tier in Tier}
        tiers[Tier.STREAMED] = min(tiers[Tier.MAPPED], weights.tiers.get(Tier.STREAMED, 0))
        tiers[Tier.MAPPED] -= tiers[Tier.STREAMED]
        found.append(PlacedWeights(weights.owner, weights.stored, tiers))
    return found


def _streamed(stored: StoredWeights, residency: WeightResidency) -> dict[Owner, int]:
    """Bytes by owner. Experts are streamed first; a layer's other weights share the rest."""
    found: dict[Owner, int] = dict.fromkeys(Owner, 0)
    for part in stored.parts:
        if part.layer is None or part.owner is Owner.SMALL:
            continue
        layer, streamed = residency.layers[part.layer], residency.streamed(part.layer)
        experts = min(layer.experts, streamed)
        amount, of = (experts, layer.experts) if part.owner is Owner.ROUTED else (streamed - experts, layer.always)
        found[part.owner] += round(part.num_bytes * amount / of) if of else 0
    return found
