"""Plans against what toy caches hold in every tier, and what is refused with which remedies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache import layout as store_layout
from cache.disk import Scratch
from cache.grid import prefill_grid
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import RING_BUFFERS, KVBytes, Residency, pinned_bytes, slot_bytes
from l4ctx.engine.prefill import prefill
from l4ctx.formatting import parse_size, parse_tokens
from l4ctx.machine import processor
from l4ctx.machine.processor import computing_dtype
from l4ctx.planning.fitting import host_budget, plan_memory, step_time
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan, MemoryPlanError
from l4ctx.planning.published import PUBLISHED, plain, quantizing
from l4ctx.planning.remedies import check, tokens_that_fit
from l4ctx.planning.remedies import remedies as remedies_of
from l4ctx.planning.step_time import PREFILL_CHUNK_SIZES
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.costs import activation_bytes, parameter_count
from model.quantization.choice import Quantization
from model.transformer import Transformer
from support.places import ROOT

KIB, MIB, GIB = 2**10, 2**20, 2**30
CHUNK = 7


def config(**changes: Any) -> TextConfig:
    return TextConfig.from_dict(
        {
            "model_type": "llama4_text",
            "vocab_size": 97,
            "hidden_size": 42,
            "intermediate_size": 22,
            "intermediate_size_mlp": 26,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "num_local_experts": 3,
            "attention_chunk_size": CHUNK,
            "max_position_embeddings": 4096,
            "no_rope_layer_interval": 2,
        }
        | changes
    )  # two NoPE layers, three RoPE layers


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four attention chunks and segments of two in float32."""
    monkeypatch.setattr(store_layout, "MIN_BLOCK_BYTES", 4 * CHUNK * store_layout.layer_bytes_per_token(config(), 4))
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 2 * CHUNK)


def workload(of: TextConfig | None = None, **changes: Any) -> Workload:
    return Workload(
        of or config(),
        **(
            {
                "prompt_tokens": 100,
                "max_new_tokens": 9,
                "weights": 1000,
                "dtype": "float32",
                "weights_are_mapped": False,
                "prefill_chunk_size": 2 * CHUNK,
            }
            | changes
        ),
    )


def least_room(planned: MemoryPlan) -> int:
    """Bytes of host memory with which the plan just fits."""
    return planned.needed + MARGIN_BYTES


def held_in_each_step(planned: MemoryPlan, folder: Path, is_durable: bool = False) -> list[KVBytes]:
    """What a run holds as planned after each step and, but for windows, before each is committed."""
    of, layout = planned.workload.config, planned.layout
    rows = Scratch(folder)
    rows.is_durable = is_durable  # type: ignore[misc]
    dtype = getattr(torch, layout.dtype)
    cache = HybridKVCache(
        of, length=layout.length, dtype=dtype, kv_dtype=layout.kv_dtype, rows=rows, residency=planned.residency
    )
    assert cache.layout == layout
    grid = prefill_grid(0, planned.workload.prompt_tokens, planned.prefill_chunk_size, CHUNK, layout.block_tokens)
    steps, held = [*map(len, grid), *[1] * planned.workload.max_new_tokens], []
    for step in steps:
        for layer in range(of.num_hidden_layers):
            cache.append(layer, *torch.randn(2, 1, of.num_key_value_heads, step, of.head_dim).to(dtype))
            assert sum(1 for _ in cache.segments(layer, range(cache.offset, cache.offset + step))) > 0
        held.append(replace(cache.held(), rope_windows=0))
        cache.advance(step)
        held.append(cache.held())
    assert cache.offset == planned.workload.length
    rows._file.close()
    return held


TIERS: dict[str, Residency] = {
    "in memory": Residency(None),
    "one row in memory": Residency(1),
    "two rows in memory": Residency(2),
    "on disk": Residency(0),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("float32", "auto"),
        ("float32", "bfloat16"),
        ("float32", "int8"),
        ("bfloat16", "auto"),
        ("bfloat16", "int8"),
        ("bfloat16", "fp8"),
        ("bfloat16", "float16"),
    ],
)
@pytest.mark.parametrize(
    ("prompt_tokens", "chunk_size"),
    [
        (3, 64),
        (CHUNK, 4),
        (4 * CHUNK, 4 * CHUNK),
        (100, 5),
        (90, 2 * CHUNK),
        (150, 4 * CHUNK),
        (117, 9 * CHUNK),
        (47, 200),
        (40, 200),
    ],
)
def test_a_run_holds_what_is_planned(
    tmp_path: Path, prompt_tokens: int, chunk_size: int, dtype: str, kv_dtype: str, tiers: str
) -> None:
    """To the byte at its end, and never more than the peak."""
    asked = workload(prompt_tokens=prompt_tokens, prefill_chunk_size=chunk_size, dtype=dtype, kv_dtype=kv_dtype)
    planned = plan_memory(asked).placed(TIERS[tiers], min(chunk_size, prompt_tokens))
    held = held_in_each_step(planned, tmp_path)
    assert held[-1] == planned.end
    for name in KVBytes.__dataclass_fields__:
        assert max(getattr(step, name) for step in held) <= getattr(planned.peak, name), name
    if (dtype, kv_dtype) == ("float32", "auto") and chunk_size <= planned.layout.block_tokens:
        assert max(step.nope_host for step in held) == planned.peak.nope_host


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_budget_decides_how_many_rows_stay(tmp_path: Path, kv_dtype: str) -> None:
    """Whatever --kv-host-memory allows beyond the least is used and kept to, all through the run."""
    asked = workload(prompt_tokens=200, kv_dtype=kv_dtype)
    everything = plan_memory(asked).host_keys_values
    rows = []
    for budget in range(0, everything + 1500, 1500):
        capacity = Capacity(host=GIB, kv_host=budget, disk_folder=str(tmp_path))
        planned = plan_memory(asked, capacity)
        assert not planned.shortfalls(capacity)
        in_memory = [step.nope_host + step.buffers for step in held_in_each_step(planned, tmp_path)]
        assert max(in_memory) <= budget or (planned.residency.host_rows == 0 and "--kv-host-memory" in planned.notes[0])
        assert bool(planned.notes) == (planned.host_keys_values > budget)
        host, layout = planned.residency.host_rows, planned.layout
        if host is not None:
            assert planned.placed(Residency(host + 1), 2 * CHUNK).host_keys_values > budget  # no more would fit
            assert planned.end.nope_disk == (layout.sealed_rows(asked.length) - host) * layout.row_bytes > 0
        rows.append(layout.sealed_rows(asked.length) if host is None else host)
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] == 7 and len(set(rows)) >= 5
    assert plan_memory(asked, Capacity(kv_host=everything, disk_folder="x")).residency == Residency(None)


@pytest.mark.usefixtures("small_blocks")
def test_what_is_free_is_a_budget_too(tmp_path: Path) -> None:
    asked = workload(prompt_tokens=200)
    all_in_memory = plan_memory(asked)
    free = least_room(all_in_memory) - 1
    assert all_in_memory.shortfalls(Capacity(host=free)) == {"memory": (free + 1, free)}
    capacity = Capacity(host=free, disk=GIB, disk_folder=str(tmp_path))
    planned = plan_memory(asked, capacity)
    assert not planned.shortfalls(capacity) and planned.end.nope_disk > 0 == all_in_memory.end.nope_disk
    assert planned.end.nope_host < all_in_memory.end.nope_host
    assert plan_memory(asked, Capacity(host=free + 1, disk=0, disk_folder="x")).end == all_in_memory.end


@pytest.mark.usefixtures("small_blocks")
def test_a_saved_context_has_every_sealed_block_on_disk(tmp_path: Path) -> None:
    planned = plan_memory(workload(is_saved=True))
    held = held_in_each_step(planned, tmp_path, is_durable=True)
    rows = 109 // (4 * CHUNK)
    assert held[-1] == planned.end and planned.end.nope_disk == rows * planned.layout.row_bytes
    assert replace(held[-1], nope_disk=0, buffers=0) == plan_memory(workload()).end
    there = rows * planned.layout.row_bytes
    going_on = plan_memory(workload(is_saved=True, on_disk_already=there))
    assert going_on.needed_on_disk == planned.needed_on_disk - there > 0
    assert plan_memory(workload(is_saved=True, on_disk_already=GIB)).needed_on_disk == 0


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("layers", [5, 40])
def test_disk_space_suffices_for_the_files(tmp_path: Path, kv_dtype: str, layers: int) -> None:
    asked = workload(config(num_hidden_layers=layers), prompt_tokens=300, max_new_tokens=0, kv_dtype=kv_dtype)
    planned = plan_memory(asked).placed(Residency(0), 2 * CHUNK)
    written = []

    class Seen(Scratch):
        def write(self, row: int, units: Any) -> Any:
            file = super().write(row, units)
            written.append(self._end)
            return file

    rows = Seen(tmp_path)
    cache = HybridKVCache(asked.config, length=asked.length, kv_dtype=kv_dtype, residency=Residency(0), rows=rows)
    for _ in prefill_grid(0, 300, CHUNK, CHUNK):
        step = min(CHUNK, 300 - cache.offset)
        for layer in range(layers):
            cache.append(layer, *torch.randn(2, 1, 2, step, 10))
        cache.advance(step)
    rows._file.close()
    assert planned.end.nope_disk < written[-1] <= planned.needed_on_disk


def test_a_real_run_holds_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_layout, "MIN_BLOCK_BYTES", 2 * CHUNK * store_layout.layer_bytes_per_token(config(), 4))
    planned = plan_memory(workload(kv_dtype="int8"))
    model = Transformer(config())
    cache = HybridKVCache(config(), length=109, kv_dtype="int8", residency=planned.residency)
    ids = array("i", [7] * 100)
    for step in prefill(model, cache, ids, prefill_chunk_size=planned.prefill_chunk_size):
        assert step.held is not None and step.held.nope_host <= planned.peak.nope_host
    for _ in range(9):
        model(torch.tensor([[3]]), cache, logits="last")
    assert cache.held() == planned.end and planned.token_ids == ids.itemsize * len(ids)


def test_what_must_be_free() -> None:
    loaded, mapped = (
        plan_memory(workload(weights=10**9)),
        plan_memory(workload(weights=10**9, weights_are_mapped=True)),
    )
    assert loaded.needed - mapped.needed == 10**9 == loaded.weights == mapped.weights
    windows = 3 * CHUNK * store_layout.layer_bytes_per_token(config(), 4)
    assert mapped.needed == windows + 2 * 109 * 160 + 400 + mapped.activations  # 160 bytes a layer and token
    assert mapped.activations == activation_bytes(config(), 2 * CHUNK, 4)
    long = plan_memory(workload(prefill_chunk_size=10**6))
    assert long.activations == activation_bytes(config(), 100, 4)  # never beyond the prompt
    assert mapped.unbounded_cache == 5 * 109 * 160
    assert mapped.needed_on_accelerator == mapped.needed_on_disk == 0


def test_smaller_prefill_chunks_where_activations_do_not_fit() -> None:
    asked = workload(prompt_tokens=5000, prefill_chunk_size=None)
    needs = [least_room(plan_memory(replace(asked, prefill_chunk_size=size))) for size in PREFILL_CHUNK_SIZES]
    assert needs == sorted(needs, reverse=True) and needs[1] > needs[-1]
    for size, free in list(zip(PREFILL_CHUNK_SIZES, needs, strict=True))[1:]:
        planned = plan_memory(asked, Capacity(host=free))
        assert planned.prefill_chunk_size == size and not planned.shortfalls(Capacity(host=free))
        assert planned.notes == (f"the prefill chunk is {size} tokens, so that the activations fit",)
    refused = plan_memory(asked, Capacity(host=needs[-1] - 1))
    assert refused.prefill_chunk_size == PREFILL_CHUNK_SIZES[0] and refused.shortfalls(Capacity(host=needs[-1] - 1))
    assert plan_memory(asked, Capacity(host=needs[0])).notes == ()
    chosen = plan_memory(replace(asked, prefill_chunk_size=512), Capacity(host=0))
    assert chosen.prefill_chunk_size == 512


@pytest.mark.usefixtures("small_blocks")
def test_an_accelerator_has_weights_windows_activations_and_the_newest_blocks() -> None:
    asked = workload(prompt_tokens=200, weights=3 * GIB)
    planned = plan_memory(asked, Capacity(host=GIB, accelerator=8 * GIB))
    assert planned.residency == Residency(None, 7, on_accelerator=True) and planned.end.nope_host == 0
    assert planned.needed == planned.token_ids
    beside = 3 * GIB + planned.layout.window_bytes + planned.activations
    assert planned.needed_on_accelerator == beside + planned.peak.nope_device
    row, ring = planned.layout.row_bytes, RING_BUFFERS * planned.layout.sealed_segment_bytes
    for rows in (0, 1, 4):
        room = (rows + 2) * row + ring + 5  # one block is open, and one on its way to the host
        capacity = Capacity(host=GIB, accelerator=beside + MARGIN_BYTES + room)
        some = plan_memory(asked, capacity)
        assert some.residency == Residency(None, rows, on_accelerator=True) and not some.shortfalls(capacity)
        assert some.end.nope_host == (7 - rows) * row == planned.end.nope_device - some.end.nope_device + ring
        segments = (7 - rows) * planned.layout.config.num_nope_layers * planned.layout.segments_per_block
        assert some.end.pinned == pinned_bytes(segments, slot_bytes(planned.layout)) >= some.end.nope_host
        assert some.needed == some.token_ids + some.end.pinned
        limited = plan_memory(asked, Capacity(host=GIB, accelerator=8 * GIB, kv_device=room))
        assert limited.residency == some.residency and limited.notes == ()
    too_small = Capacity(host=GIB, accelerator=beside + MARGIN_BYTES + 2 * row + ring - 1)
    assert list(plan_memory(asked, too_small).shortfalls(too_small)) == ["accelerator memory"]
    none = plan_memory(asked, Capacity(host=GIB, accelerator=8 * GIB, kv_device=0))
    assert none.residency.device_rows == 0 and "--kv-device-memory 0 B is exceeded" in none.notes[0]
    few = Capacity(host=GIB, accelerator=8 * GIB, kv_device=4 * row + ring, kv_host=5 * row, disk_folder="x")
    on_disk = plan_memory(asked, few)
    assert on_disk.residency.device_rows == 2 and 0 < (on_disk.residency.host_rows or 0) < 5
    assert on_disk.peak.nope_host + on_disk.peak.buffers == on_disk.end.pinned <= 5 * row
    assert on_disk.end.nope_disk > 0


def test_without_known_limits_everything_fits() -> None:
    planned = plan_memory(workload(), Capacity())
    assert (
        planned.shortfalls(Capacity()) == {}
        and remedies_of(planned, Capacity()) == []
        and host_budget(planned, Capacity()) is None
    )
    check(planned, Capacity())
    assert planned.residency == Residency(None) and planned.prefill_chunk_size == 2 * CHUNK
    assert tokens_that_fit(workload(), Capacity()) == 4096 - 9


def test_a_model_without_nope_layers_needs_no_store() -> None:
    capacity = Capacity(host=GIB, accelerator=GIB, kv_host=0, disk_folder="x")
    planned = plan_memory(workload(config(no_rope_layers=[1] * 5), kv_dtype="int8"), capacity)
    assert planned.end.nope == planned.end.nope_disk == planned.needed_on_disk == 0
    assert planned.as_dict()["device_rows"] == 0


def test_a_saved_layout_decides() -> None:
    saved = StoreLayout.of(config(), length=1, dtype="bfloat16", kv_dtype="int8").computed_in("float32")
    planned = plan_memory(workload(saved_layout=saved))
    assert planned.layout == replace(saved, length=109) and planned.as_dict()["kv_dtype"] == "int8"
    capacity = Capacity(host=0)
    assert not any("dtype" in remedy for remedy in remedies_of(planned, capacity))


SCOUT = TextConfig.from_dict({"model_type": "llama4_text", "max_position_embeddings": 10 * 2**20})
DOCUMENTS = [("notes.md", 90_000), ("src/big file.txt", 610_000), ("a.txt", 300_000)]


def scout(**changes: Any) -> Workload:
    return Workload(
        SCOUT,
        **(
            {
                "prompt_tokens": 10**6,
                "max_new_tokens": 0,
                "weights": 2 * parameter_count(SCOUT),
                "weights_are_mapped": True,
                "dtype": "bfloat16",
                "stored_dtype": "bfloat16",
                "largest": DOCUMENTS,
            }
            | changes
        ),
    )


def remedies(asked: Workload, capacity: Capacity) -> list[str]:
    return remedies_of(plan_memory(asked, capacity), capacity)


@pytest.mark.parametrize("tokens", [10**6, 10**7, 10 * 2**20])
def test_scout_takes_48_kib_a_token_and_its_windows(tokens: int) -> None:
    plain = plan_memory(scout(prompt_tokens=tokens)).as_dict()
    assert plain["nope_host"] == tokens * 48 * KIB and plain["rope_windows"] == 1.125 * GIB
    assert plain["unbounded_cache"] == 4 * tokens * 48 * KIB
    assert plan_memory(scout(prompt_tokens=100)).as_dict()["rope_windows"] == 36 * 100 * 4 * KIB
    at_most = Capacity(host=24 * GIB, disk=500 * GIB, disk_folder="/scratch")
    on_disk = plan_memory(scout(prompt_tokens=tokens), at_most)
    assert not on_disk.shortfalls(at_most) and on_disk.prefill_chunk_size == 8192
    assert on_disk.end.nope_host + on_disk.end.nope_disk == tokens * 48 * KIB
    assert on_disk.needed + MARGIN_BYTES <= 24 * GIB and on_disk.end.nope_host > 19 * GIB
    streamed = plan_memory(scout(prompt_tokens=tokens, stored=PUBLISHED[0].weights(SCOUT)), at_most)
    assert "are read again for each prefill chunk" in streamed.notes[0] and streamed.weight_residency.is_streamed
    assert streamed.end.nope_host + streamed.end.nope_disk == tokens * 48 * KIB
    assert streamed.needed + streamed.resident_weights + MARGIN_BYTES <= 24 * GIB


def streamed(**changes: Any) -> Workload:
    return scout(prompt_tokens=500_000, stored=PUBLISHED[0].weights(SCOUT), **changes)


def test_the_prefill_chunk_grows_until_computing_hides_reading() -> None:
    sizes = {}
    for operations in (1e11, 2e12, 4e12):
        capacity = Capacity(host=80 * GIB, operations=operations, reading=1e9)
        plan = plan_memory(streamed(), capacity)
        sizes[operations] = plan.prefill_chunk_size
        assert step_time(plan, capacity).is_hidden
        assert plan.needed + plan.resident_weights + MARGIN_BYTES <= 80 * GIB
        assert any("computing hides the reading" in note for note in plan.notes) == (operations > 1e11)
        half = plan_memory(streamed(prefill_chunk_size=plan.prefill_chunk_size // 2), capacity)
        assert plan.prefill_chunk_size == 8192 or not step_time(half, capacity).is_hidden
    assert list(sizes.values()) == [8192, 16384, 32768]
    fast = Capacity(host=80 * GIB, operations=4e12, reading=1e9)
    assert plan_memory(streamed(prefill_chunk_size=4096), fast).prefill_chunk_size == 4096
    assert plan_memory(scout(prompt_tokens=500_000), fast).prefill_chunk_size == 8192  # nothing is known of weights
    assert plan_memory(streamed(), replace(fast, host=2**50)).prefill_chunk_size == 8192  # nothing is streamed
    little = Capacity(host=40 * GIB, operations=1e15, reading=1e9)
    plan = plan_memory(streamed(), little)
    assert plan.prefill_chunk_size > 8192 and not plan.shortfalls(little)
    assert any("to shorten the time" in note for note in plan.notes)


def test_weights_stay_within_the_users_limit() -> None:
    for limit in (20 * GIB, 50 * GIB):
        plan = plan_memory(streamed(), Capacity(host=100 * GIB, weights=limit))
        assert plan.resident_weights <= limit and plan.weight_residency.kept > limit - 12 * GIB
    plan = plan_memory(streamed(), Capacity(host=100 * GIB, weights=GIB))
    assert any("more than the" in note and "it is read as it is used" in note for note in plan.notes)
    small = workload(weights=10 * MIB, weights_are_mapped=True)
    assert plan_memory(small, Capacity(host=2**40, weights=GIB)).weights_are_mapped  # not copied, then


def test_the_refusal_says_what_is_needed_and_what_helps() -> None:
    planned, needed = plan_memory(scout()), least_room(plan_memory(scout()))
    check(planned, Capacity(host=needed))
    with pytest.raises(MemoryPlanError) as error:
        check(planned, Capacity(host=needed - 1))
    message = str(error.value)
    assert "needs 48.2 GiB of memory, but 48.2 GiB is free" in message  # one byte is missing
    assert "keys and values 46.9 GiB" in message and "weights 0 B" in message and "activations 1.1 GiB" in message
    assert "--kv-dir DIR makes it fit" in message and "\n" not in message
    with pytest.raises(MemoryPlanError, match="what helps: nothing but a larger machine"):
        check(plan_memory(workload(dtype="bfloat16", weights=GIB)), Capacity(host=0, kv_host=0, disk_folder="x"))
    with pytest.raises(MemoryPlanError, match=r"needs 45\.8 GiB of --kv-host-memory, but 2\.0 GiB is allowed"):
        check(planned, Capacity(host=64 * GIB, kv_host=2 * GIB))


def test_remedies_for_memory() -> None:
    """What is enough comes first, the cheapest first; the documents are those that must go."""
    found = remedies(scout(), Capacity(host=22 * GIB))
    assert found == [
        "--kv-dir DIR makes it fit (27.0 GiB on disk)",
        "--kv-dtype int8 saves 21.6 GiB (keys and values 1.9 times smaller), not enough alone",
        "leave out src/big file.txt, 61 % of the tokens",
        "fewer tokens: 449,783 of these 1,000,000 fit",
    ]
    assert remedies(scout(), Capacity(host=27 * GIB))[1:3] == [
        "--kv-dtype int8 makes it fit (keys and values 1.9 times smaller)",
        "leave out src/big file.txt, 61 % of the tokens",
    ]
    assert remedies(scout(), Capacity(host=36 * GIB))[2] == "leave out a.txt, 30 % of the tokens"  # the least that does
    some = remedies(scout(largest=DOCUMENTS[:2]), Capacity(host=6 * GIB))
    assert some[2] == "leave out src/big file.txt and notes.md, 70 % of the tokens, not enough alone"
    assert not any("leave out" in remedy for remedy in remedies(scout(), Capacity(host=6 * GIB)))  # all of them
    alone = remedies(scout(largest=[("all.txt", 999_990)]), Capacity(host=22 * GIB))
    assert not any("leave out" in remedy for remedy in alone) and "fewer tokens" in alone[-1]


def test_remedies_are_true() -> None:
    """Each dtype, size and number of tokens that is said to be enough is; the number of tokens is the most."""
    capacity = Capacity(host=27 * GIB)
    assert not plan_memory(scout(kv_dtype="int8"), capacity).shortfalls(capacity)
    fitting = tokens_that_fit(scout(), capacity)
    assert f"fewer tokens: {fitting:,} of these 1,000,000 fit" in remedies(scout(), capacity)
    assert not plan_memory(scout(prompt_tokens=fitting), capacity).shortfalls(capacity)
    assert plan_memory(scout(prompt_tokens=fitting + 1), capacity).shortfalls(capacity)


def test_remedies_within_the_users_own_limits() -> None:
    limited = Capacity(host=64 * GIB, kv_host=2 * GIB)
    found = remedies(scout(), limited)
    assert found[:2] == ["--kv-host-memory 46875MiB makes it fit", "--kv-dir DIR makes it fit (44.3 GiB on disk)"]
    enough = replace(limited, kv_host=parse_size("46875MiB"))
    assert not plan_memory(scout(), enough).shortfalls(enough)
    assert not any("--kv-host-memory" in remedy for remedy in remedies(scout(), replace(limited, host=20 * GIB)))
    chunks = scout(prompt_tokens=10_000, largest=(), prefill_chunk_size=8192)
    assert remedies(chunks, Capacity(host=int(2.4 * GIB)))[0] == "--prefill-chunk-size 4096 makes it fit"
    none_is_enough = remedies(chunks, Capacity(host=int(1.6 * GIB)))
    assert any(remedy.startswith("--prefill-chunk-size 256 saves 1.0 GiB") for remedy in none_is_enough)


def test_remedies_for_disk_space() -> None:
    found = remedies(scout(), Capacity(host=22 * GIB, disk=15 * GIB, disk_folder="/scratch"))
    assert found[:2] == [
        "12.0 GiB more free in /scratch, or a folder on a larger disk, makes it fit",
        "--kv-dtype int8 makes it fit (keys and values 1.9 times smaller)",
    ]
    assert not any("--kv-dir" in remedy for remedy in found)


def test_remedies_for_float32() -> None:
    """Weights that are converted need memory; those in the checkpoint's own dtype are mapped."""
    asked = scout(prompt_tokens=10_000, dtype="float32", weights=4 * parameter_count(SCOUT), weights_are_mapped=False)
    assert remedies(asked, Capacity(host=64 * GIB)) == ["--dtype bfloat16 makes it fit"]
    stored_so = replace(asked, stored_dtype="float32", weights_are_mapped=True)  # in bfloat16 they would not be mapped
    assert "--dtype" not in " ".join(remedies(stored_so, Capacity(host=3 * GIB)))
    cheap = remedies(scout(dtype="float32", stored_dtype="float32"), Capacity(host=56 * GIB))
    assert cheap[1:3] == [
        "--kv-dtype bfloat16 makes it fit (keys and values 2.0 times smaller)",
        "--kv-dtype int8 makes it fit (keys and values 3.8 times smaller)",
    ]


def test_remedies_for_an_accelerator() -> None:
    asked = scout(prompt_tokens=10_000, weights_are_mapped=False)
    assert remedies(asked, Capacity(host=64 * GIB, accelerator=80 * GIB)) == ["--device cpu makes it fit"]
    unknown = replace(asked, stored_dtype=None)  # so the weights may have to be converted, and take memory
    assert remedies(unknown, Capacity(host=64 * GIB, accelerator=80 * GIB)) == []
    known = replace(asked, stored=PUBLISHED[0].weights(SCOUT))
    assert remedies(known, Capacity(host=64 * GIB, accelerator=80 * GIB)) == [
        "--quantize int4 makes it fit (58.8 GiB of weights instead of 201 GiB)",
        "a checkpoint in GGUF Q5_K_M makes it fit (71.3 GiB of weights instead of 201 GiB)",
        "--weights-device-memory 78594MiB makes it fit (135 GiB are copied to the accelerator for each prefill chunk "
        "and each token of the answer)",
        "--device cpu makes it fit",
    ]
    small = remedies(known, Capacity(host=64 * GIB, accelerator=24 * GIB))
    assert small[0].startswith("--weights-device-memory 21250MiB makes it fit (188 GiB are copied")
    assert small[2].startswith("--quantize int4 saves 142 GiB (58.8 GiB") and small[2].endswith(", not enough alone")
    assert small[3].startswith("a checkpoint in GGUF Q2_K saves 164 GiB (36.8 GiB of weights instead of 201 GiB)")
    fp8 = replace(asked, stored=next(form for form in PUBLISHED if form.name == "FP8").weights(SCOUT))
    assert not any("--quantize" in remedy for remedy in remedies(fp8, Capacity(host=64 * GIB, accelerator=24 * GIB)))
    both = remedies(replace(asked, prompt_tokens=2 * 10**6), Capacity(host=64 * GIB, accelerator=80 * GIB))
    assert both[0] == "--kv-dir DIR and --device cpu make it fit"
    assert both[1] == "--kv-dir DIR saves 27.8 GiB (28.5 GiB on disk), not enough alone"


def test_remedies_for_weights_that_are_quantized_on_loading() -> None:
    """Memory has to hold them; those of a checkpoint that is written once stay in its files."""
    stored = quantizing(Quantization("int8"), plain("bfloat16")).weights(SCOUT)
    asked = scout(prompt_tokens=10_000, stored=stored, weights=stored.num_bytes, weights_are_mapped=False)
    written = "a checkpoint that l4ctx quantize wrote, whose weights stay in their files, makes it fit"
    assert remedies(asked, Capacity(host=64 * GIB)) == [
        written,
        "--quantize int4 makes it fit (58.8 GiB of weights instead of 105 GiB)",
    ]
    little = remedies(asked, Capacity(host=40 * GIB))
    assert little[0] == written and little[1].startswith("--quantize int4 saves 46.4 GiB")
    assert not asked.in_dtype("bfloat16", on_accelerator=False).weights_are_mapped


def test_the_plan_becomes_plain_numbers() -> None:
    planned = plan_memory(scout(), Capacity(host=24 * GIB, disk=500 * GIB, disk_folder="/scratch"))
    plain = json.loads(json.dumps(planned.as_dict()))
    assert set(plain) == {
        "weights",
        "weights_are_mapped",
        "resident_weights",
        "streamed_a_step",
        "copied_a_step",
        "weight_buffers",
        "weights_by_owner",
        "tokens",
        "rope_windows",
        "nope_device",
        "nope_host",
        "nope_disk",
        "buffers",
        "pinned",
        "token_ids",
        "draft_index",
        "kept_state",
        "activations",
        "images",
        "needed",
        "needed_on_accelerator",
        "needed_on_disk",
        "unbounded_cache",
        "kv_dtype",
        "dtype",
        "prefill_chunk_size",
        "block_tokens",
        "answers_at_a_time",
        "row_bytes",
        "host_rows",
        "device_rows",
        "devices",
    }
    assert plain["tokens"] == 10**6 and plain["weights_are_mapped"] is True and plain["kv_dtype"] == "bfloat16"
    assert plain["host_rows"] * plain["block_tokens"] * 48 * KIB <= plain["nope_host"] < plain["needed"]
    assert plain["nope_disk"] < plain["needed_on_disk"] < 1.001 * plain["nope_disk"]


def test_tokens_that_fit() -> None:
    answer = scout(max_new_tokens=1000)
    assert tokens_that_fit(scout(), Capacity(host=MARGIN_BYTES)) == 0
    assert tokens_that_fit(answer, Capacity()) == 10 * 2**20 - 1000
    in_memory = tokens_that_fit(scout(), Capacity(host=30 * GIB))
    on_disk = tokens_that_fit(scout(), Capacity(host=30 * GIB, disk=100 * GIB, disk_folder="x"))
    assert 610_000 < in_memory < 630_000 and on_disk - in_memory == pytest.approx(100 * GIB / (48 * KIB), rel=0.02)
    assert in_memory - tokens_that_fit(answer, Capacity(host=30 * GIB)) == pytest.approx(1000, abs=50)


def test_weights_are_held_in_memory_where_it_is_plenty() -> None:
    """And where nothing else changes by it: neither the prefill chunk size nor what lies on disk."""
    mapped = workload(weights=10 * MIB, weights_are_mapped=True)
    needed = plan_memory(mapped).needed + MARGIN_BYTES
    for host, is_mapped in ((None, True), (39 * MIB, True), (2**40, False), (needed, True)):
        plan = plan_memory(mapped, Capacity(host=host))
        assert plan.weights_are_mapped == is_mapped, host
        assert plan.needed == plan_memory(mapped).needed + (0 if is_mapped else 10 * MIB)
    for changes in ({"prefill_chunk_size": None, "config": SCOUT}, {"prompt_tokens": 10**6, "config": SCOUT}):
        long = replace(mapped, weights=4 * GIB, **changes)
        tight = Capacity(host=plan_memory(long).needed + MARGIN_BYTES, disk=2**50, disk_folder="x")
        assert plan_memory(long, tight).weights_are_mapped
        assert not plan_memory(long, replace(tight, host=2**45)).weights_are_mapped


@pytest.mark.parametrize(
    ("flags", "vendor", "expected"),
    [
        ({"avx512_bf16"}, "AuthenticAMD", "bfloat16"),
        ({"avx512_bf16"}, "GenuineIntel", "float32"),
        ({"amx_bf16", "avx512_bf16"}, "GenuineIntel", "bfloat16"),
        ({"avx2", "bf16"}, "AuthenticAMD", "float32"),
    ],
)
def test_which_dtype_auto_is(flags: set[str], vendor: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(processor, "processor_vendor", lambda: vendor)
    assert computing_dtype("auto", "bfloat16", on_accelerator=False) == expected
    for stored in ("float32", "float16"):
        assert computing_dtype("auto", stored, on_accelerator=False) == "float32"
    assert computing_dtype("auto", "float16", on_accelerator=True) == "float16"
    assert computing_dtype("float16", "bfloat16", on_accelerator=False) == "float16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("500MB", 5 * 10**8),
        ("1.5G", 3 * GIB // 2),
        ("4194304", 4 * MIB),
        ("0", 0),
        ("0GiB", 0),
        ("7b", 7),
        (" 2 tib ", 2 * 2**40),
        ("1KB", 1000),
        ("1kib", 1024),
        ("3K", 3072),
        ("2m", 2 * MIB),
        ("1T", 2**40),
        ("2TB", 2 * 10**12),
        (".5GB", 5 * 10**8),
        ("5.MiB", 5 * MIB),
        ("1.1GiB", 1181116006),
        ("0.1b", 0),
    ],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 Gigs", "1e3", "8iB", "1,5G", "nan", "inf", "0x10", "8G\nB", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 8GiB") as error:
        parse_size(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["8", "16", "0.5", "4096", " 1048575 ", "1."])
def test_a_small_size_wants_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(text.strip())} would be bytes; .*GiB, .*B for bytes$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("0", 0),
        ("128k", 128_000),
        ("128K", 128_000),
        ("10M", 10**7),
        ("10m", 10**7),
        ("1.5M", 1_500_000),
        ("128Ki", 131_072),
        ("10Mi", 10 * MIB),
        ("1g", 10**9),
        (" 7 ", 7),
        ("10_000_000", 10**7),
        ("0.25ki", 256),
    ],
)
def test_numbers_of_tokens_as_people_write_them(text: str, expected: int) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "0.0001k", "10MB", "10 M", "1e6", "1,000", "٣", "5k\nk", "_5"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens such as 4096, 128k") as error:
        parse_tokens(text)
    assert "\n" not in str(error.value)


def test_plans_import_no_torch() -> None:
    code = "import sys, l4ctx.planning.memory_plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
