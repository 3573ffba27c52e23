"""What the next part of a conversation needs beyond what is held already, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cache.layout import KV_DTYPES
from cache.residency import KVBytes
from l4ctx.formatting import human_bytes
from l4ctx.planning.memory_plan import MemoryPlan, MemoryPlanError
from l4ctx.planning.workload import Capacity, Workload
from model.costs import activation_bytes

TURN_MARGIN_BYTES = 64 * 2**20
"""Left free by every turn. The interpreter and its libraries, for which a plan leaves more, are in memory by then."""


def grown(plan: MemoryPlan, workload: Workload, step: int) -> MemoryPlan:
    """The plan of a run that has become this workload, of which up to `step` tokens are still read at a time.

    What was decided for the first one stays: tiers, the prefill chunk, where weights are.
    """
    activations = activation_bytes(workload.config, step, KV_DTYPES[workload.dtype])
    changed = replace(plan, workload=workload, layout=workload.layout, activations=activations, notes=())
    return changed.placed(plan.residency, step)


@dataclass(frozen=True)
class Growth:
    """Bytes by tier that are needed beside what is in memory."""

    host: int
    accelerator: int
    disk: int

    @classmethod
    def of(cls, plan: MemoryPlan, held: KVBytes, tokens: int, *, keeps_state: bool, loads_tower: bool) -> Growth:
        """From `tokens` in the cache, which holds `held`, to all of the plan's. `keeps_state`: a copy of the state
        before is made, and there is none yet. `loads_tower`: for images among what is read."""
        layout, workload, peak = plan.layout, plan.workload, plan.peak
        config, chunk = layout.config, layout.config.attention_chunk_size
        windows = min(chunk, plan.workload.length) - min(chunk, tokens)
        behind = tokens % layout.block_tokens
        untouched = layout.open_bytes(behind) - config.num_nope_layers * behind * layout.token_bytes
        near = config.num_rope_layers * windows * layout.token_bytes + plan.activations
        near += workload.kept_state if keeps_state else 0
        if loads_tower:
            near += workload.tower_weights + workload.tower_activations
        on_device, on_host = peak.nope_device - held.nope_device, peak.nope_host - held.nope_host
        more = peak.buffers - held.buffers
        host = max(0, on_host + more) if plan.residency.on_accelerator else max(0, on_host) + max(0, more)
        host += workload.pixel_bytes if loads_tower else 0
        disk = max(0, plan.end.nope_disk - held.nope_disk) if not workload.is_saved else 0
        if plan.residency.on_accelerator:
            return cls(host, max(0, on_device + untouched) + near, disk)
        return cls(host + untouched + near, 0, disk)

    def check(self, capacity: Capacity) -> None:
        """Raises MemoryPlanError where more is needed than is free now."""
        for what, needed, free in (
            ("memory", self.host + TURN_MARGIN_BYTES, capacity.host),
            ("address space", self.host + TURN_MARGIN_BYTES, capacity.addresses),
            ("accelerator memory", self.accelerator + TURN_MARGIN_BYTES, capacity.accelerator),
            (f"disk space in {capacity.disk_folder}", self.disk, capacity.disk),
        ):
            if free is not None and needed > free:
                raise MemoryPlanError(
                    f"this needs {human_bytes(needed)} of {what}, and {human_bytes(free)} are free; the conversation "
                    "is as it was"
                )
