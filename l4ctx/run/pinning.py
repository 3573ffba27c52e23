"""Host memory of keys and values beside a GPU is pinned before the first step, which would wait for it otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.formatting import human_bytes
from l4ctx.machine.limits import soft_limit
from l4ctx.machine.memory import available_memory

if TYPE_CHECKING:
    from cache.context import ContextKVCache
    from cache.hybrid import HybridKVCache
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.run.monitor import Monitor


def pin(cache: HybridKVCache | ContextKVCache, plan: MemoryPlan, monitor: Monitor) -> None:
    """Takes what the plan counts, with what the cache has taken; a note says how much the system did not pin."""
    before = cache.held().pinned
    if plan.end.pinned <= before:
        return
    monitor.tell(f"pinning {human_bytes(plan.end.pinned - before)} of host memory for keys and values")
    refused = cache.pin(plan.workload.length, all_on_disk=plan.workload.is_saved)
    if refused:
        monitor.note(refusal(refused, cache.held().pinned, soft_limit("RLIMIT_MEMLOCK"), available_memory()))


def refusal(refused: int, asked: int, limit: int | None, free: int | None) -> str:
    """What the user is told; `limit` is that of locked memory, `free` what the machine and control groups leave."""
    known = [
        f"{name} {human_bytes(size)}"
        for name, size in (("the limit of locked memory (ulimit -l) is", limit), ("free memory is", free))
        if size is not None
    ]
    because = f" ({', '.join(known)})" if known else ""
    return (
        f"the system pins {human_bytes(asked - refused)} of the {human_bytes(asked)} of host memory for keys and "
        f"values{because}: the rest is copied to the GPU more slowly"
    )
