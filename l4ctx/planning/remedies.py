"""What a user can do about a run that does not fit, and the refusal that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from l4ctx.formatting import human_bytes
from l4ctx.planning.device_weights import OPTION, DeviceWeights
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import (
    ADDRESS_SPACE,
    ALLOWED,
    FILE_SIZE,
    KV_HOST_LIMIT,
    MARGIN_BYTES,
    MemoryPlan,
    MemoryPlanError,
)
from l4ctx.planning.published import PUBLISHED, plain, quantizing
from l4ctx.planning.step_time import PREFILL_CHUNK_SIZES
from l4ctx.planning.weights import StoredWeights
from l4ctx.planning.workload import Capacity, Workload
from model.quantization.choice import Quantization

QUANTIZED = ("int8", "int4")
"""Values of --quantize that are proposed, the larger result first."""

MAKES_IT_FIT = "makes it fit"

WORTH_SAYING = 0.98
"""An option that leaves more than this share of the shortfall helps neither alone nor with others: it is not named."""


def check(plan: MemoryPlan, capacity: Capacity) -> None:
    """Raises MemoryPlanError if the run cannot fit."""
    shortfalls = plan.shortfalls(capacity)
    if not shortfalls:
        return
    short = "; ".join(
        f"{human_bytes(needed)} of {tier}, but {human_bytes(there)} is {'allowed' if tier in ALLOWED else 'free'}"
        for tier, (needed, there) in shortfalls.items()
    )
    what_helps = "; ".join(remedies(plan, capacity)) or "nothing but a larger machine"
    raise MemoryPlanError(
        f"this run needs {short} (keys and values {human_bytes(plan.peak.rope_windows + plan.peak.nope)}, weights "
        f"{human_bytes(plan.workload.held_weights)}, activations {human_bytes(plan.activations)}"
        f"{f', images {human_bytes(plan.images)}' if plan.images else ''}); what helps: {what_helps}"
    )


def remedies(plan: MemoryPlan, capacity: Capacity) -> list[str]:
    """What a user can do, one line each: options that suffice alone first, then the others, each from the cheapest."""
    short, enough, partial = _shortfall(plan, capacity), [], []
    if not short:
        return []
    for option in _options(plan, capacity):
        left = _shortfall(plan_memory(option.workload, option.capacity), option.capacity)
        if left == 0:
            enough.append(f"{option.action} {MAKES_IT_FIT}{option.detail}")
        elif left < WORTH_SAYING * short:
            partial.append(f"{option.action} saves {human_bytes(short - left)}{option.detail}, not enough alone")
    if len(partial) > 1 and not enough and (actions := _together(plan, capacity)):
        enough.append(f"{' and '.join(actions)} make it fit")
    return enough + partial + _shorter(plan.workload, capacity)


def _shorter(workload: Workload, capacity: Capacity) -> list[str]:
    """Which documents to leave out, and how many tokens would fit."""
    total, fitting = workload.prompt_tokens, tokens_that_fit(workload, capacity)
    if not 0 < fitting < total:
        return []
    found, documents = [], sorted(workload.largest, key=lambda document: document[1])
    left_out = next(([document] for document in documents if document[1] >= total - fitting), documents[:-4:-1])
    tokens = sum(tokens for _, tokens in left_out)
    share = f"{tokens / total:.0%}".replace("%", " %")
    if share not in ("0 %", "100 %"):
        hint = "" if tokens >= total - fitting else ", not enough alone"
        found.append(f"leave out {' and '.join(name for name, _ in left_out)}, {share} of the tokens{hint}")
    return [*found, f"fewer tokens: {fitting:,} of these {total:,} fit"]


def _shortfall(plan: MemoryPlan, capacity: Capacity) -> int:
    """The shortfalls of all tiers in bytes. --kv-host-memory is a limit within host memory, not a tier of its own."""
    short = {tier: needed - there for tier, (needed, there) in plan.shortfalls(capacity).items()}
    in_host_memory = max(short.pop(tier, 0) for tier in ("memory", KV_HOST_LIMIT, ADDRESS_SPACE))
    return in_host_memory + sum(short.values())


class _Option(NamedTuple):
    """Something a user could do: its wording, a detail to add, and the workload and capacity that would result."""

    action: str
    detail: str
    workload: Workload
    capacity: Capacity


def _options(plan: MemoryPlan, capacity: Capacity) -> Iterator[_Option]:
    """From the cheapest to the most expensive, in effort and in loss of quality."""
    workload, on_accelerator = plan.workload, capacity.accelerator is not None
    if capacity.disk is not None and (lacking := plan.needed_on_disk - capacity.disk) > 0:
        yield _Option(
            f"{human_bytes(lacking)} more free in {capacity.disk_folder}, or a folder on a larger disk,",
            "",
            workload,
            replace(capacity, disk=None),
        )
    short = plan.shortfalls(capacity)
    if FILE_SIZE in short:
        yield _Option(f"ulimit -f {-(-plan.largest_file // 1024)}", "", workload, replace(capacity, file_size=None))
    if ADDRESS_SPACE in short:
        free = replace(capacity, addresses=None, host=max(capacity.host or 0, plan.needed + MARGIN_BYTES))
        yield _Option("a higher limit (ulimit -v)", "", workload, free)
    if capacity.kv_host is not None:
        unlimited = replace(capacity, kv_host=None)
        without = plan_memory(workload, unlimited)
        if "memory" not in without.shortfalls(unlimited):
            yield _Option(f"--kv-host-memory {-(-without.host_keys_values // 2**20)}MiB", "", workload, unlimited)
    if not capacity.has_disk:
        there = replace(capacity, disk_folder="DIR")
        on_disk = human_bytes(plan_memory(workload, there).needed_on_disk)
        yield _Option("--kv-dir DIR", f" ({on_disk} on disk)", workload, there)
    for size in PREFILL_CHUNK_SIZES if workload.prefill_chunk_size and workload.saved_layout is None else ():
        smaller = replace(workload, prefill_chunk_size=size)
        if size < plan.prefill_chunk_size and (
            size == PREFILL_CHUNK_SIZES[-1] or not plan_memory(smaller, capacity).shortfalls(capacity)
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
    if workload.stored is not None and not workload.weights_are_mapped:
        yield from _smaller_weights(workload, workload.stored, capacity)
    if on_accelerator:
        yield from _copied_weights(plan, capacity)
        yield _Option(
            "--device cpu",
            "",
            workload.in_dtype(workload.dtype, on_accelerator=False),
            replace(capacity, accelerator=None, accelerators=(), kv_device=None, weights_device=None),
        )


def _copied_weights(plan: MemoryPlan, capacity: Capacity) -> Iterator[_Option]:
    """All memory of the accelerator that other things leave for weights, if it suffices with the rest copied."""
    if capacity.accelerators:  # one of several is used then
        roomiest = capacity.with_one()
        plan, free = plan_memory(plan.workload, roomiest), roomiest.accelerator
    else:
        free = capacity.accelerator
    held = plan.device_weights.on_device if plan.device_weights else plan.weights
    other = plan.needed_on_accelerator - held + MARGIN_BYTES
    mebibytes = ((free or 0) - other) // 2**20
    weights = DeviceWeights.of(plan.workload, mebibytes * 2**20) if mebibytes > 0 else None
    if weights is not None and weights.on_device <= weights.limit < held:
        copied = human_bytes(weights.residency.copied_a_pass)
        yield _Option(
            f"{OPTION} {mebibytes}MiB",
            f" ({copied} are copied to the accelerator for each prefill chunk and each token of the answer)",
            plan.workload,
            replace(capacity, weights_device=weights.limit),
        )


def _smaller_weights(workload: Workload, stored: StoredWeights, capacity: Capacity) -> Iterator[_Option]:
    """For weights that memory has to hold: quantizing them, or another checkpoint of the model. Of each, the largest
    with which it fits, or else the smallest."""
    on_accelerator = capacity.accelerator is not None

    def option(action: str, other: StoredWeights) -> _Option:
        detail = (
            f" ({human_bytes(other.bytes_in(workload.dtype))} of weights instead of {human_bytes(workload.weights)})"
        )
        return _Option(action, detail, workload.with_weights(other, on_accelerator=on_accelerator), capacity)

    if stored.is_made and not on_accelerator:
        kept = workload.with_weights(replace(stored, is_made=False), on_accelerator=False)
        action = "a checkpoint that l4ctx quantize wrote, whose weights stay in their files,"
        yield _Option(action, "", kept, capacity)
    dtype = workload.stored_dtype or "bfloat16"
    made = [
        option(f"--quantize {kind}", quantizing(Quantization(kind), plain(dtype)).weights(workload.config))
        for kind in (QUANTIZED if stored.is_plain or stored.is_made else ())
    ]
    forms = [(form.name, form.weights(workload.config)) for form in (PUBLISHED if on_accelerator else ())]
    forms.sort(key=lambda form: -form[1].num_bytes)
    published = [option(f"a checkpoint in {name}", weights) for name, weights in forms]
    for options in (made, published):
        smaller = [other for other in options if other.workload.weights < workload.weights]
        fitting = (other for other in smaller if not plan_memory(other.workload, capacity).shortfalls(capacity))
        if smaller:
            yield next(fitting, smaller[-1])


def _other_dtypes(plan: MemoryPlan, capacity: Capacity) -> Iterator[_Option]:
    """For keys and values alone, and for the whole computation. A saved context fixes both."""
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
    """Options that suffice only when combined, the cheapest that help; empty if all together are not enough."""
    actions: list[str] = []
    while short := _shortfall(plan, capacity):
        for action, _, workload, there in _options(plan, capacity):
            better = plan_memory(workload, there)
            if _shortfall(better, there) < WORTH_SAYING * short:
                actions.append(action)
                plan, capacity = better, there
                break
        else:
            return []
    return actions


def tokens_that_fit(workload: Workload, capacity: Capacity) -> int:
    """The longest prompt that fits, in tokens: 0 if none does, and never more than the model has positions for."""
    fitting, too_many = 0, workload.config.max_position_embeddings - workload.max_new_tokens + 1
    while too_many - fitting > 1:
        tokens = (fitting + too_many) // 2
        shorter = replace(
            workload, prompt_tokens=tokens, new_tokens=workload.new_tokens and min(tokens, workload.new_tokens)
        )
        if plan_memory(shorter, capacity).shortfalls(capacity):
            too_many = tokens
        else:
            fitting = tokens
    return fitting
