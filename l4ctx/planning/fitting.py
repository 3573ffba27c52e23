"""The plan of a run: chooses the tiers of keys and values, and the prefill chunk size, so that it fits.

The largest prefill chunk that fits, and as many blocks as fit on an accelerator, then in host memory; the rest goes to
disk. Free memory is measured in `l4ctx.machine.memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cache.layout import KV_DTYPES
from cache.residency import KVBytes, Residency, buffer_bytes, device_rows_within, pinned_rows_within, rows_within
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import SPARE_SHARE
from l4ctx.planning.device_weights import DeviceWeights
from l4ctx.planning.layer_shares import LayerShares, spread_note, why_on_one
from l4ctx.planning.memory_plan import ACCELERATOR, MARGIN_BYTES, MemoryPlan
from l4ctx.planning.step_time import PREFILL_CHUNK_SIZES, STREAMING_CHUNK_SIZES, WORTH_GROWING, StepTime
from l4ctx.planning.workload import NO_LIMITS, Capacity, Workload
from model.costs import activation_bytes
from model.division import exchange_bytes


def plan_memory(workload: Workload, capacity: Capacity = NO_LIMITS) -> MemoryPlan:
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
        replace(plan_memory(workload, capacity.with_one(device)), device=device)
        for device in (range(count) if capacity.weights_device is None else ())
    ]
    rows, chunk = workload.layout.sealed_rows(workload.held), workload.prefill_chunk_size or PREFILL_CHUNK_SIZES[0]
    for one in plans:
        is_whole = one.residency.device_rows >= rows and one.prefill_chunk_size >= chunk
        if is_whole and not one.shortfalls(capacity):
            return _on_one(one, count, "it holds everything")
    roomiest = capacity.accelerators.index(max(capacity.accelerators))
    if (reason := why_on_one(workload, capacity)) is not None:
        one = plan_memory(workload, capacity.with_one(roomiest))
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
