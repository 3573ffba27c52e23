"""Plans for weights that an accelerator does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan
from l4ctx.planning.placement import Tier
from l4ctx.planning.published import PUBLISHED, plain, quantizing
from l4ctx.planning.remedies import remedies
from l4ctx.planning.weights import StoredWeights
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.quantization.choice import Quantization
from model.weights.owners import Owner

GIB = 2**30
SCOUT = TextConfig.from_dict({"model_type": "llama4_text"})
FORMS = {form.name: form.weights(SCOUT) for form in PUBLISHED}


def workload(stored: StoredWeights) -> Workload:
    dtype = "bfloat16"
    return Workload(SCOUT, 10_000, 9, stored.bytes_in(dtype), weights_are_mapped=False, dtype=dtype, stored=stored)


def room(host: int, limit: int | None) -> Capacity:
    return Capacity(host=host * GIB, accelerator=80 * GIB, weights_device=None if limit is None else limit * GIB)


@pytest.mark.parametrize("name", ["bfloat16", "FP8", "w4a16", "GGUF Q4_K_M"])
@pytest.mark.parametrize("limit", [24, 40])
def test_the_device_has_what_stays_and_two_buffers(name: str, limit: int) -> None:
    asked = workload(FORMS[name])
    plan = plan_memory(asked, room(400, limit))
    weights = plan.device_weights
    assert weights is not None and weights.is_pinned and not plan.shortfalls(room(400, limit))
    copied = weights.residency.copied_a_pass
    assert weights.on_device <= limit * GIB and weights.on_device - weights.residency.buffers == asked.weights - copied
    whole = plan_memory(asked, room(400, None))
    assert plan.needed == plan.token_ids + plan.peak.nope_host + copied
    assert plan.beside_on_accelerator == whole.beside_on_accelerator - asked.weights + weights.on_device
    tiers = {row.owner: row.tiers for row in plan.weights_by_owner}
    assert sum(row[Tier.MEMORY] for row in tiers.values()) == copied
    assert tiers[Owner.ROUTED][Tier.MEMORY] >= 0.9 * copied
    assert sum(map(sum, (row.values() for row in tiers.values()))) == asked.weights
    assert f"for each token of the answer, at least {copied / 2e10:.2g} s each" in plan.notes[0]
    numbers = plan.as_dict()
    assert (numbers["copied_a_step"], numbers["weight_buffers"]) == (copied, weights.residency.buffers)


def test_where_host_memory_is_short_weights_stay_in_their_files() -> None:
    plan = plan_memory(workload(FORMS["bfloat16"]), room(16, 40))
    weights = plan.device_weights
    assert weights is not None and not weights.is_pinned and weights.on_host == 0
    assert not plan.shortfalls(room(16, 40)) and "from the checkpoint's files" in plan.notes[0]
    routed = next(row for row in plan.weights_by_owner if row.owner is Owner.ROUTED)
    assert routed.tiers[Tier.STREAMED] == weights.residency.copied_a_pass
    made = workload(quantizing(Quantization("int8"), plain("bfloat16")).weights(SCOUT))
    plan = plan_memory(made, room(16, 40))  # no file holds them
    assert plan.device_weights is not None and plan.device_weights.on_host == made.weights
    assert list(plan.shortfalls(room(16, 40))) == ["memory"]


def test_where_all_fit_nothing_changes() -> None:
    asked = workload(FORMS["w4a16"])
    for limit in (None, 70):
        assert plan_memory(asked, room(64, limit)) == plan_memory(asked, room(64, None))
    unknown = replace(asked, stored=None)
    assert plan_memory(unknown, room(64, 4)).device_weights is None


def test_too_small_a_limit_is_exceeded_and_said() -> None:
    plan = plan_memory(workload(FORMS["bfloat16"]), room(400, 4))
    weights = plan.device_weights
    assert weights is not None and weights.on_device > 4 * GIB
    assert plan.notes[1].startswith("--weights-device-memory 4.0 GiB is exceeded: what stays and two buffers take")
    tight = Capacity(host=400 * GIB, accelerator=weights.on_device + MARGIN_BYTES, weights_device=4 * GIB)
    assert list(plan_memory(workload(FORMS["bfloat16"]), tight).shortfalls(tight)) == ["accelerator memory"]


def test_the_remedy_names_a_limit_that_fits() -> None:
    asked = workload(FORMS["bfloat16"])
    (remedy,) = [text for text in remedies(asked_plan(asked, 80), capacity(80)) if "--weights-device" in text]
    assert " makes it fit (" in remedy and " copied to the accelerator for each prefill chunk and each token" in remedy
    mebibytes = int(remedy.split()[1].removesuffix("MiB"))
    fitting = replace(capacity(80), weights_device=mebibytes * 2**20)
    assert not plan_memory(asked, fitting).shortfalls(fitting)
    too_small = remedies(asked_plan(asked, 8), capacity(8))  # less than two buffers
    assert not any("--weights-device" in text for text in too_small)


def capacity(accelerator: int) -> Capacity:
    return Capacity(host=300 * GIB, accelerator=accelerator * GIB)


def asked_plan(asked: Workload, accelerator: int) -> MemoryPlan:
    return plan_memory(asked, capacity(accelerator))
