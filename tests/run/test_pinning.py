"""Pinned memory of a run: what is planned is taken before the first step, and what is refused is said in one line."""

from __future__ import annotations

from dataclasses import replace

from cache.hybrid import HybridKVCache
from cache.residency import pinned_bytes, slot_bytes
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.growth import Growth, grown
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.monitor import Monitor
from l4ctx.run.pinning import pin, refusal
from support.cache_toys import CHUNK, CONFIG, LAYERS, random_keys_values
from support.cached_paths import small_layout
from support.transports import PinningTransport

LAYOUT = small_layout(CONFIG, length=256, block_chunks=2, segment_chunks=1)
BLOCK = LAYOUT.block_tokens


def planned(tokens: int) -> MemoryPlan:
    """All blocks in host memory beside an accelerator."""
    workload = Workload(
        CONFIG,
        prompt_tokens=tokens - 1,
        max_new_tokens=1,
        weights=0,
        weights_are_mapped=False,
        dtype="float32",
        saved_layout=LAYOUT,
        converses=True,
    )
    return plan_memory(workload, Capacity(host=2**30 + MARGIN_BYTES, accelerator=2**30, kv_device=0))


def made(plan: MemoryPlan, transport: PinningTransport) -> HybridKVCache:
    length = plan.layout.length
    return HybridKVCache(CONFIG, length=length, layout=plan.layout, residency=plan.residency, transport=transport)


def test_a_run_pins_what_was_planned_once_and_a_conversation_what_it_grows_by() -> None:
    plan, transport, told, notes = planned(4 * BLOCK + 3), PinningTransport(0), list[str](), list[str]()
    cache, monitor = made(plan, transport), Monitor(notes.append, told.append)
    pin(cache, plan, monitor)
    asked = sum(transport.asked)
    assert cache.held().pinned == plan.end.pinned == pinned_bytes(4 * 2 * 2, slot_bytes(LAYOUT)) >= asked > 0
    assert plan.needed == plan.beside_on_host + plan.end.pinned and plan.as_dict()["pinned"] == plan.end.pinned
    pin(cache, plan, monitor)
    assert (sum(transport.asked), len(told), notes) == (asked, 1, [])
    for _ in range(4):
        for layer in LAYERS:
            cache.append(layer, *random_keys_values(cache, BLOCK))
        cache.advance(BLOCK)
    assert cache.held().nope_host == plan.end.nope_host and transport.outside == 0
    longer = grown(plan, replace(plan.workload, prompt_tokens=6 * BLOCK), CHUNK)
    growth = Growth.of(longer, cache.held(), cache.offset, keeps_state=False, loads_tower=False)
    assert growth.host == longer.end.pinned - plan.end.pinned > 0
    pin(cache, longer, monitor)
    assert sum(transport.asked) == asked * 6 // 4 and len(told) == 2
    assert Growth.of(longer, cache.held(), cache.offset, keeps_state=False, loads_tower=False).host == 0


def test_what_the_system_refuses_is_said_in_one_line() -> None:
    notes = list[str]()
    plan = planned(4 * BLOCK)
    pin(made(plan, PinningTransport(0, most=0)), plan, Monitor(notes.append))
    assert len(notes) == 1 and notes[0].startswith("the system pins 0 B of the ")
    assert refusal(3 * 2**30, 4 * 2**30, 2**16, 5 * 2**30) == (
        "the system pins 1.0 GiB of the 4.0 GiB of host memory for keys and values (the limit of locked memory "
        "(ulimit -l) is 64.0 KiB, free memory is 5.0 GiB): the rest is copied to the GPU more slowly"
    )
    assert refusal(1, 2, None, None).endswith(" for keys and values: the rest is copied to the GPU more slowly")
