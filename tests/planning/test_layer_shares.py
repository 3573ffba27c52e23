"""Which layers go to which of several GPUs, against every division there is, and what each then holds."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from cache.hybrid import HybridKVCache
from cache.residency import Residency
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.layer_shares import LayerShares, filled, together
from l4ctx.planning.memory_plan import ACCELERATOR, MARGIN_BYTES
from l4ctx.planning.published import PUBLISHED
from l4ctx.planning.remedies import remedies
from l4ctx.planning.workload import Capacity, Rows, Workload
from model.config import TextConfig
from support.cache_toys import CONFIG, LAYERS, make, random_keys_values
from support.transports import UnrulyTransport

GIB = 2**30
SCOUT = TextConfig.from_dict({"model_type": "llama4_text", "max_position_embeddings": 10485760})
FORMS = {form.name: form.weights(SCOUT) for form in PUBLISHED}


def workload(tokens: int, form: str = "w4a16") -> Workload:
    stored = FORMS[form]
    size = stored.bytes_in("bfloat16")
    return Workload(SCOUT, tokens, 0, size, weights_are_mapped=False, dtype="bfloat16", stored=stored)


def room(*accelerators: float, **more: int) -> Capacity:
    each = tuple(round(free * GIB) for free in accelerators)
    return Capacity(host=400 * GIB, accelerator=sum(each), accelerators=each if len(each) > 1 else (), **more)


def test_no_other_division_fits_where_none_is_found() -> None:
    """Random costs: embeddings before the first layer, an output matrix behind the last one."""
    chance, is_found = random.Random(3), set[bool]()
    for _ in range(300):
        layers = [chance.randint(1, 9) for _ in range(chance.randint(1, 6))]
        free = [chance.randint(0, 16) for _ in range(chance.randint(1, 4))]
        embeddings, head, fixed = (chance.randint(0, 5) for _ in range(3))

        def cost(device: int, of: range, is_last: bool) -> int:
            begins = embeddings if of.start == 0 else 0  # noqa: B023
            return fixed + begins + sum(layers[of.start : of.stop]) + (head if is_last else 0)  # noqa: B023

        found = filled(free, len(layers), cost)
        possible = []
        for cuts in itertools.combinations_with_replacement(range(len(layers) + 1), len(free) - 1):
            ends = [0, *cuts, len(layers)]
            parts = [(n, range(a, b)) for n, (a, b) in enumerate(itertools.pairwise(ends)) if a < b]
            if all(cost(device, of, of.stop == len(layers)) <= free[device] for device, of in parts):
                possible.append(parts)
        assert (found is not None) == bool(possible), (layers, free, embeddings, head, fixed)
        is_found.add(found is not None)
        if found is not None:
            assert found in possible and [n for _, of in found for n in of] == list(range(len(layers)))
            assert max(device for device, _ in found) == min(max(device for device, _ in parts) for parts in possible)
    assert is_found == {True, False}


@pytest.mark.parametrize("tokens", [9_000, 200_000, 1_000_000])
@pytest.mark.parametrize("free", [(44, 44), (30, 50), (24, 24, 24, 24)])
def test_shares_are_the_whole(tokens: int, free: tuple[int, ...]) -> None:
    """What the devices hold together is what one would, but for activations; each has as many rows as fit."""
    asked, there = workload(tokens), room(*free)
    plan, one = plan_memory(asked, there), plan_memory(asked, room(999))
    assert not plan.shortfalls(there) and len(free) >= len(plan.shares) > 1
    assert sum(share.weights for share in plan.shares) == one.weights == asked.weights
    assert sum(share.rope_windows for share in plan.shares) == one.layout.window_bytes
    assert [n for share in plan.shares for n in share.layers] == list(range(48))
    assert all(share.needed <= there.accelerators[share.device] for share in plan.shares)
    assert sum(share.nope for share in plan.shares) == plan.peak.nope_device
    assert plan.needed_on_accelerator == sum(share.needed - MARGIN_BYTES for share in plan.shares)
    rows, all_rows = plan.residency.device_rows, plan.layout.sealed_rows(tokens)
    if rows == all_rows:
        assert (plan.peak, plan.end) == (one.peak, one.end)
    forms = LayerShares(asked, plan.prefill_chunk_size, plan.activations, MARGIN_BYTES)
    assert rows == all_rows or forms._within(there.accelerators, None, rows + 1) is None


def test_one_suffices() -> None:
    """The first one that holds everything; the others are not used, and a line says so."""
    plan = plan_memory(workload(9_000), there := room(20, 90, 90))
    assert not plan.shares and plan.device == 1 and not plan.shortfalls(there)
    assert plan.notes[-1] == "GPU 1 of 3 is used: it holds everything"
    assert replace(plan, notes=(), device=0) == replace(plan_memory(workload(9_000), room(90)), notes=())


@pytest.mark.parametrize(
    ("changes", "limits", "why"),
    [
        ({"converses": True}, {}, "the layers of a conversation are not spread over several"),
        ({"stored": None}, {}, "how large each layer is cannot be told"),
        ({}, {"weights_device": 20 * GIB}, "with --weights-device-memory layers are not spread over several"),
    ],
)
def test_what_is_not_spread_is_said(changes: dict[str, object], limits: dict[str, int], why: str) -> None:
    plan = plan_memory(replace(workload(9_000), **changes), room(40, 44, **limits))  # type: ignore[arg-type]
    assert not plan.shares and plan.device == 1 and plan.notes[-1] == f"GPU 1 of 2 is used: {why}"
    assert bool(plan.shortfalls(room(40, 44))) == ("stored" in changes or "converses" in changes)


def test_too_small_together() -> None:
    """What is lacking, and what helps: today's remedies, on one of the GPUs where they are of one."""
    asked, there = workload(9_000), room(24, 24)
    plan = plan_memory(asked, there)
    needed, free = plan.shortfalls(there)[ACCELERATOR]
    assert free == 48 * GIB and needed - free == plan.shares[-1].needed - 24 * GIB > 0
    told = remedies(plan, there)
    assert any(line.startswith("--weights-device-memory ") and "makes it fit" in line for line in told)
    assert any(line.startswith("--device cpu makes it fit") for line in told)


def test_limits_and_answers_at_a_time() -> None:
    """--kv-device-memory is of all together; a fork's keys and values are with their layers, logits with the last."""
    asked = workload(1_000_000)
    limited = plan_memory(asked, room(60, 60, kv_device=8 * GIB))
    assert 7 * GIB < limited.peak.nope_device <= 8 * GIB and len(limited.shares) == 2
    rows = plan_memory(replace(asked, rows=Rows(3, 500, 700)), there := room(60, 60))
    without = LayerShares(asked, rows.prefill_chunk_size, rows.activations, MARGIN_BYTES)
    assert rows.shares and not rows.shortfalls(there)
    more = [
        share.beside - without.share(share.device, share.layers, is_last=False, rows=0).beside for share in rows.shares
    ]
    assert sum(more) == rows.workload.row_bytes and all(more)


@pytest.mark.parametrize("residency", [Residency(None, 1, True), Residency(None, 9, True), Residency(None, 0, True)])
def test_a_cache_holds_what_the_closed_forms_say(residency: Residency) -> None:
    """Of each device's layers; one of them has no NoPE layer, and another nothing else."""
    where = [torch.device("cpu", number) for number in (0, 1, 1, 2, 3)]
    layout = make(length=90).layout
    cache = HybridKVCache(
        CONFIG,
        length=90,
        layout=layout,
        residency=residency,
        devices=where,
        transports={device: UnrulyTransport(n) for n, device in enumerate(where)},
    )
    cache.pin(90)
    asked = Workload(CONFIG, 90, 0, 0, weights_are_mapped=False, dtype="float32")
    asked = replace(asked, saved_layout=layout)
    forms, parts = LayerShares(asked, 21, 0, 0), [range(1), range(1, 3), range(3, 4), range(4, 5)]
    peak = together(forms.peak(layers, residency) for layers in parts)
    for count in (21, 21, 21, 20, 6, 1):
        for layer in LAYERS:
            cache.append(layer, *random_keys_values(cache, count))
            assert cache.held().nope_device <= peak.nope_device
        cache.advance(count)
    for layers, device in zip(parts, (0, 1, 2, 3), strict=True):
        assert cache.held(torch.device("cpu", device)) == forms.end(layers, residency)
    assert cache.held() == together(forms.end(layers, residency) for layers in parts)
