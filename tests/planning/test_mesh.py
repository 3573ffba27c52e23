"""What a rank of tensor x context ranks holds, sends and waits for, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import ACCELERATOR, MARGIN_BYTES
from l4ctx.planning.mesh import Mesh, RankPlan, RankWeights
from l4ctx.planning.mesh_time import LATENCY, MeshTime, Rates
from l4ctx.planning.published import PUBLISHED, plain
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.costs import reading_operations
from model.errors import DivisionError
from model.weights.owners import Owner

GIB = 2**30
SCOUT = TextConfig.from_dict({"model_type": "llama4_text", "max_position_embeddings": 10485760})
TOY = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 96,
        "num_local_experts": 5,
        "attention_chunk_size": 7,
    }
)
AT_ONCE = Rates(compute=1e12, link=math.inf, host_link=math.inf, disk=math.inf, memory=1e12)


def workload(config: TextConfig, tokens: int, form: str = "bfloat16", **options: Any) -> Workload:
    stored = next(known for known in PUBLISHED if known.name == form).weights(config)
    return Workload(
        config,
        tokens,
        0,
        stored.bytes_in("bfloat16"),
        weights_are_mapped=False,
        dtype="bfloat16",
        stored_dtype="bfloat16",
        stored=stored,
        **options,
    )


def ranked(tokens: int, mesh: Mesh, *, config: TextConfig = SCOUT, form: str = "bfloat16", **options: Any) -> RankPlan:
    names = ("prefill_chunk_size", "kv_dtype")
    of_workload = {name: options.pop(name) for name in names if name in options}
    capacity = Capacity(**{"accelerator": 141 * GIB, **options})
    return RankPlan.of(workload(config, tokens, form, **of_workload), mesh, capacity)


def test_scout_on_eight_ranks_by_hand() -> None:
    attention, expert, small = 2 * 5120 * (5120 + 1024), 3 * 5120 * 8192, 16 * 5120 + 2 * 5120
    of_rank = 48 * ((attention + 17 * expert) // 8 + small) + 5120 + 2 * 202048 * 5120 // 8
    rank = ranked(2**20, Mesh(tensor=8))
    assert rank.plan.weights == 2 * of_rank
    assert rank.weights.replicated == 2 * (48 * small + 5120)
    assert rank.weights.kv_copies == 1
    assert rank.plan.end.nope_device == 48 * GIB // 8  # 12 layers x 8 heads x 128 x 2 x 2 bytes, for 2**20 tokens
    assert rank.plan.end.rope_windows == 36 * 8192 * 4096 // 8
    assert rank.plan.end.nope_host == rank.plan.end.nope_disk == 0
    assert rank.device < 141 * GIB and not rank.shortfalls(Capacity(accelerator=141 * GIB))


def test_one_rank_holds_what_one_process_does() -> None:
    capacity = Capacity(accelerator=141 * GIB)
    rank = RankPlan.of(workload(SCOUT, 10**6, "FP8"), Mesh(), capacity)
    alone = plan_memory(workload(SCOUT, 10**6, "FP8"), capacity)
    assert rank.plan == alone
    assert rank.device == alone.needed_on_accelerator + MARGIN_BYTES


def test_fewer_kv_heads_than_ranks_are_replicated() -> None:
    stored = plain("bfloat16").weights(TOY)
    whole, parts = stored.owned_by(Owner.ATTENTION), {}
    for tensor in (1, 2, 4, 8):
        weights = RankWeights.of(stored, TOY, Mesh(tensor))
        parts[tensor] = (weights.kv_copies, weights.stored.owned_by(Owner.ATTENTION))
        rank = ranked(700, Mesh(tensor), config=TOY)
        assert rank.plan.end.nope_device == 2 * 700 * 2 * max(1, 2 // tensor) * 10 * 2
    queries, keys = 2 * 8 * 40 * 80 * 2, 2 * 8 * 40 * 20 * 2
    assert whole == queries + keys
    assert parts == {
        1: (1, whole),
        2: (1, whole // 2),
        4: (2, queries // 4 + keys // 2),
        8: (4, queries // 8 + keys // 2),
    }


@pytest.mark.parametrize("ranks", [3, 16])
def test_what_cannot_be_divided_is_refused(ranks: int) -> None:
    with pytest.raises(DivisionError, match=f"{ranks} ranks: num_attention_heads 40 cannot be divided by {ranks}"):
        ranked(10**6, Mesh(tensor=ranks))


def test_context_ranks_share_keys_but_not_weights() -> None:
    one, four = (ranked(8192 * 100, Mesh(2, context), prefill_chunk_size=8192 * context) for context in (1, 4))
    assert four.plan.weights == one.plan.weights
    assert four.plan.workload.held * 4 == one.plan.workload.held
    assert four.plan.end.nope_device * 4 == one.plan.end.nope_device
    assert four.prefill_chunk_size == 4 * 8192
    uneven = ranked(8192 * 9 + 5, Mesh(context=4))
    assert uneven.plan.workload.held == 8192 * 3


def test_a_short_step_is_one_ranks_work() -> None:
    """An attention chunk is not cut: where a prefill chunk is one, the other context ranks only attend."""
    one, four = (ranked(2**20, Mesh(1, context), form="FP8", prefill_chunk_size=8192) for context in (1, 4))
    alone, together = (MeshTime(rank, AT_ONCE).step(2**19, 2**19 + 8192) for rank in (one, four))
    per_pair = 11 * 4 * 5120 * 8192 * (2**19 + 4096.5) / 1e12
    assert math.isclose(together.computing, alone.computing - 0.75 * per_pair, rel_tol=1e-6)


def test_the_traffic_of_a_step_by_hand() -> None:
    steps = MeshTime(ranked(10**6, Mesh(2, 2)), Rates())
    traffic = steps.traffic(2**19, 2**19 + 2**14)
    assert traffic.sums == (1 + 2 * 47) * 8192 * 5120 * 4  # a ring of 2: each sends its half twice
    a_query = 20 * (128 * 2 + 128 * 4 + 4)  # there in bfloat16, back in float32 with a log-sum-exp
    assert traffic.exchange == 11 * 8192 * a_query  # the last layer needs none
    assert traffic.host == traffic.disk == 0
    early = steps.traffic(0, 2**14)
    assert early.exchange == 11 * 8192 * 2 * 4 * 128 * 2 // 2  # keys of one rank of two, as they are fewer bytes
    token = steps.traffic_of_token()
    assert token.sums == (1 + 2 * 48) * 5120 * 4 + 202048 * 2 // 2
    assert token.exchange == 12 * a_query // 2


def test_without_links_a_prefill_takes_what_it_computes() -> None:
    rank = ranked(10**6, Mesh(), form="FP8", kv_device=0)
    seconds = MeshTime(rank, AT_ONCE).prefill()
    assert seconds.waiting == seconds.sums == seconds.exchange == seconds.share_waiting == 0
    assert math.isclose(seconds.computing, reading_operations(SCOUT, 0, 10**6).total / 1e12, rel_tol=1e-9)
    many = MeshTime(ranked(2**20, Mesh(4, 2), form="FP8"), AT_ONCE).prefill()
    expected = reading_operations(SCOUT, 0, 2**20).total / 8e12
    assert math.isclose(many.computing, expected, rel_tol=0.005)  # routers are computed by all
    assert math.isclose(many.sums, 64 * 95 * LATENCY) and math.isclose(many.exchange, 64 * 11 * LATENCY)


@pytest.mark.parametrize(("compute", "least"), [(790e12, 3160), (395e12, 1580)])
def test_streaming_hides_from_the_issue_of_a_few_thousand_queries(compute: float, least: int) -> None:
    """A pair of key and value costs 4 KiB and 4 x 5120 operations a query; layers compute a little besides."""
    rates = Rates(compute=compute, host_link=50e9)
    rank = ranked(10**6, Mesh(), form="FP8", kv_device=0, prefill_chunk_size=8192)
    hiding = MeshTime(rank, rates).hiding_chunk
    assert hiding is not None and 0.95 * least < hiding <= least
    for chunk, is_hidden in ((round(1.1 * least), True), (round(0.7 * least), False)):
        sized = ranked(10**6, Mesh(), form="FP8", kv_device=0, prefill_chunk_size=chunk)
        start = 999_000 - chunk
        assert (MeshTime(sized, rates).step(start, start + chunk).waiting == 0) == is_hidden
    assert MeshTime(ranked(10**6, Mesh(8)), rates).hiding_chunk is None


def test_a_small_card_streams_weights_and_blocks() -> None:
    capacity = {"accelerator": 24 * GIB, "host": 70 * GIB}
    rank = ranked(10**6, Mesh(), form="w4a16", kv_dtype="int8", **capacity)
    device = rank.plan.device_weights
    assert device is not None and device.is_pinned
    assert rank.device <= 24 * GIB and rank.host <= 70 * GIB and not rank.shortfalls(Capacity(**capacity))
    streamed = device.residency.copied_a_pass
    assert device.on_device + device.on_host > rank.plan.weights >= streamed > 30 * GIB
    time = MeshTime(rank, Rates(host_link=25e9))
    traffic = time.traffic(0, 8192)
    assert traffic.host == streamed and traffic.disk == 0
    blocks = rank.plan.end.nope_host // 12
    assert math.isclose(time.traffic_of_token().host, streamed + 12 * blocks, rel_tol=1e-3)
    assert time.token().total > streamed / 25e9 * 0.9
    full = ranked(10**6, Mesh(), form="w4a16", **capacity)  # keys and values twice as large: no room to pin weights
    assert full.plan.device_weights is not None and not full.plan.device_weights.is_pinned
    from_files = MeshTime(full, Rates()).traffic(0, 8192)
    assert from_files.disk == from_files.host == full.plan.device_weights.residency.copied_a_pass
    assert set(ranked(10**7, Mesh(), form="w4a16", **capacity).shortfalls(Capacity(**capacity))) == {"host memory"}
    with_disk = ranked(10**6, Mesh(), form="w4a16", disk_folder="disk", **capacity)
    assert not with_disk.shortfalls(Capacity(**capacity, disk_folder="disk")) and with_disk.disk > 10 * GIB


def test_a_card_that_is_too_small_is_told() -> None:
    rank = ranked(10**6, Mesh(), accelerator=2 * GIB)
    needed, there = rank.shortfalls(Capacity(accelerator=2 * GIB))[ACCELERATOR]
    assert needed > there == 2 * GIB


def test_billions_of_steps_are_estimated_at_once() -> None:
    rank = ranked(2**31 - 1, Mesh(8), form="FP8", prefill_chunk_size=1)
    time = MeshTime(rank, AT_ONCE)
    assert time.number_of_steps == 2**31 - 1
    expected = 11 * 4 * 5120 * 2.0**61 / 8e12
    assert math.isclose(time.prefill().computing, expected, rel_tol=1e-3)


def test_faster_links_never_take_longer() -> None:
    rank = ranked(10**6, Mesh(2, 4), kv_device=GIB, prefill_chunk_size=4096)
    slow = Rates(link=50e9, host_link=5e9)
    for faster in (replace(slow, link=400e9), replace(slow, host_link=50e9), replace(slow, compute=1e15)):
        assert MeshTime(rank, faster).prefill().total < MeshTime(rank, slow).prefill().total
        assert MeshTime(rank, faster).token().total <= MeshTime(rank, slow).token().total
