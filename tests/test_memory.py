"""Plans against what toy runs hold, control groups against fake folders, and the sampler against an allocation."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache import sizes
from cache.hybrid import HybridKVCache
from l4ctx import memory
from l4ctx.memory import (
    MARGIN_BYTES,
    MemoryPlan,
    MemoryPlanError,
    MemoryReport,
    PeakSampler,
    ProcessMemory,
    _cgroup_available,
    available_memory,
    human_bytes,
    process_memory,
)
from l4ctx.prefill import prefill
from model.config import TextConfig, activation_bytes
from model.transformer import Transformer

MIB = 2**20


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it allocate and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self:  # what is composed of other operations is looked into
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def test_live_storages_counts_what_is_there() -> None:
    """The tool itself: views and results in place are nothing new, what is dropped is gone."""
    x = torch.zeros(1000)
    with LiveStorages() as live:
        kept = x + 1  # 4000 bytes
        for _ in range(3):
            kept.view(10, 100).add_(1)
            torch.nn.functional.linear(kept[None], x[None])  # 4 bytes, dropped
        (kept * 2).exp()  # 8000 more at once
    assert (live.peak, live.largest) == (12000, 4000)


def config(**changes: Any) -> TextConfig:
    return TextConfig.from_dict({
        "model_type": "llama4_text", "vocab_size": 211, "hidden_size": 96, "intermediate_size": 80,
        "intermediate_size_mlp": 144, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 3, "attention_chunk_size": 64, "max_position_embeddings": 4096,
        "no_rope_layer_interval": 2} | changes)


def random_model(of: TextConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(of).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scout's proportions": {"hidden_size": 320, "num_attention_heads": 20, "num_key_value_heads": 4,
                            "intermediate_size": 512, "intermediate_size_mlp": 1024},
    "top 2": {"num_experts_per_tok": 2},
    "wide experts": {"intermediate_size": 512},
    "wide dense layers": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 700},
    "dense": {"moe_layers": []},
    "many heads": {"num_attention_heads": 24, "num_key_value_heads": 8},
    "equal heads": {"num_attention_heads": 6, "num_key_value_heads": 6},
    "many layers": {"num_hidden_layers": 12, "no_rope_layer_interval": 4},
}


def measured_activations(of: TextConfig, size: int, dtype: torch.dtype, steps: int = 2) -> int:
    """Peak of what prefill steps of `size` tokens hold beside weights and cache."""
    model = random_model(of, dtype)
    cache = HybridKVCache(of, length=(steps + 1) * size, dtype=dtype)  # one block: there after the first step
    ids = torch.randint(of.vocab_size, ((steps + 1) * size,), generator=torch.Generator().manual_seed(1)).tolist()
    list(prefill(model, cache, ids[:size], prefill_chunk_size=size))
    with LiveStorages() as live:
        list(prefill(model, cache, ids[size:], prefill_chunk_size=size))
    assert cache.offset == len(ids)
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [0.75, 1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_bounded_by_their_estimate(name: str, chunks: float, dtype: torch.dtype) -> None:
    """By prefill chunks of three quarters of an attention chunk, one, and four; and the estimate is no wild one."""
    of = config(**SHAPES[name])
    size = int(chunks * of.attention_chunk_size)
    peak, estimate = measured_activations(of, size, dtype), activation_bytes(of, size, dtype.itemsize)
    assert estimate / 6 <= peak <= estimate, f"{peak / estimate:.2f} of the estimate"


def plan(**changes: Any) -> MemoryPlan:
    arguments = {"weights": 1000, "weights_are_mapped": False, "prompt_tokens": 150, "max_new_tokens": 21,
                 "itemsize": 4, "prefill_chunk_size": 48}
    return MemoryPlan.of(config(), **(arguments | changes))


@pytest.mark.parametrize("block_chunks", [1, 2, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt_tokens", [5, 63, 128, 150])
def test_the_plan_is_what_a_run_holds_at_its_end(monkeypatch: pytest.MonkeyPatch, prompt_tokens: int,
                                                 dtype: torch.dtype, block_chunks: int) -> None:
    of, itemsize = config(), dtype.itemsize
    monkeypatch.setattr(sizes, "MIN_BLOCK_BYTES", block_chunks * 64 * 2 * 2 * 16 * itemsize)
    planned = plan(prompt_tokens=prompt_tokens, itemsize=itemsize)
    ids = array("i", [7] * prompt_tokens)
    length = prompt_tokens + 21
    cache = HybridKVCache(of, length=length, dtype=dtype)
    model = random_model(of, dtype)
    for _ in prefill(model, cache, ids, prefill_chunk_size=48):
        assert cache.held().rope_windows == planned.rope_windows
        assert cache.held().nope <= planned.nope_keys_values
    for _ in range(21):
        model(torch.tensor([[3]]), cache, logits="last")
    held = cache.held()
    assert (held.rope_windows, held.nope) == (planned.rope_windows, planned.nope_keys_values)
    per_token = 2 * 2 * 16 * itemsize  # keys and values, 2 heads of 16
    assert planned.rope_windows == 2 * min(64, length) * per_token
    assert planned.nope_keys_values == 2 * length * per_token
    assert planned.unbounded_cache == 4 * length * per_token
    assert planned.token_ids == ids.itemsize * len(ids)


def test_what_must_be_free() -> None:
    loaded, mapped = plan(weights=10**9), plan(weights=10**9, weights_are_mapped=True)
    assert loaded.needed - mapped.needed == 10**9 == loaded.weights == mapped.weights
    assert mapped.needed == (mapped.rope_windows + mapped.nope_keys_values + mapped.token_ids + mapped.activations)
    assert mapped.activations == activation_bytes(config(), 48, 4)
    assert plan(prefill_chunk_size=10**6).activations == activation_bytes(config(), 150, 4)  # never beyond the prompt


@pytest.mark.parametrize("mapped", [False, True])
def test_check_refuses_what_does_not_fit_and_says_what_helps(mapped: bool) -> None:
    planned = MemoryPlan(weights=3 * 2**30, weights_are_mapped=mapped, rope_windows=100 * MIB,
                         nope_keys_values=5 * 2**30, token_ids=20 * MIB, activations=31 * MIB, unbounded_cache=0,
                         itemsize=4)
    needed = (5 * 1024 + 151 + (0 if mapped else 3 * 1024)) * MIB
    assert planned.needed == needed
    documents = [("src/big file.txt", 750), ("notes.md", 204)]
    planned.check(None, documents, 1000)  # what is free is not known
    planned.check(needed + MARGIN_BYTES, documents, 1000)
    with pytest.raises(MemoryPlanError) as error:
        planned.check(needed + MARGIN_BYTES - 1, documents, 1000)
    message = str(error.value)
    total = "5.4 GiB" if mapped else "8.4 GiB"
    assert f"needs {total} of memory and {total} are free" in message  # one byte is missing
    assert "keys and values 5.1 GiB" in message and "activations 31.0 MiB" in message
    assert f"weights {'0 B' if mapped else '3.0 GiB'}" in message
    assert "leave out src/big file.txt (75% of the tokens); leave out notes.md (20% of the tokens)" in message
    assert "--dtype" in message and "--prefill-chunk-size" in message and "\n" not in message
    with pytest.raises(MemoryPlanError, match=r"and 0 B are free .*what helps: --dtype"):
        planned.check(0, [], 0)
    with pytest.raises(MemoryPlanError) as error:
        replace(planned, itemsize=2).check(0, [], 0)
    assert "--dtype" not in str(error.value)


def test_check_with_an_accelerator_asks_for_each_memory_apart() -> None:
    """Weights, windows and activations there; keys and values of the NoPE layers, and ids, in host memory."""
    planned = MemoryPlan(weights=3 * 2**30, weights_are_mapped=False, rope_windows=100 * MIB,
                         nope_keys_values=5 * 2**30, token_ids=20 * MIB, activations=31 * MIB, unbounded_cache=0,
                         itemsize=2)
    host, device = (5 * 1024 + 20) * MIB + MARGIN_BYTES, (3 * 1024 + 131) * MIB + MARGIN_BYTES
    planned.check(host, [], 1, on_accelerator=device)
    with pytest.raises(MemoryPlanError, match=r"5\.3 GiB of memory and"):
        planned.check(host - 1, [], 1, on_accelerator=device)
    with pytest.raises(MemoryPlanError, match=r"3\.4 GiB of accelerator memory and .*--device cpu"):
        planned.check(host, [], 1, on_accelerator=device - 1)


def test_plans_import_no_torch() -> None:
    code = "import sys, l4ctx.memory; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (99.94 * 1024, "99.9 KiB"),
    (100 * 1024, "100 KiB"), (1.125 * 2**30, "1.1 GiB"), (48 * 2**30, "48.0 GiB"), (480 * 2**30, "480 GiB"),
    (2.5 * 2**40, "2.5 TiB"), (5000 * 2**40, "5000 TiB")])
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


needs_proc = pytest.mark.skipif(process_memory() is None, reason="this system has no /proc/self/status")


@needs_proc
def test_process_memory_agrees_with_statm() -> None:
    now = process_memory()
    resident, shared = (int(field) * 4096 for field in Path("/proc/self/statm").read_text().split()[1:3])
    assert now is not None
    assert abs(now.anonymous - (resident - shared)) < 8 * MIB and abs(now.file_backed - shared) < 8 * MIB


class CountingSampler(PeakSampler):
    """Tells when a sample was taken that began after `wait_for_one` was called."""

    def __init__(self) -> None:
        super().__init__(seconds=0.001)
        self.taken = threading.Semaphore(0)

    def sample(self) -> None:
        super().sample()
        self.taken.release()

    def wait_for_one(self) -> None:
        while self.taken.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have begun before
            assert self.taken.acquire(timeout=60)


@needs_proc
def test_the_sampler_sees_what_is_gone_by_the_end() -> None:
    gc.collect()
    threads = threading.active_count()
    with CountingSampler() as sampler:
        before = process_memory()
        block = bytearray(b"x") * (64 * MIB)  # written, so that it is resident
        sampler.wait_for_one()
        del block
        sampler.wait_for_one()
        after = process_memory()
    assert before is not None and after is not None and sampler.peak is not None
    assert sampler.peak.anonymous - before.anonymous > 60 * MIB
    assert sampler.peak.anonymous - after.anonymous > 60 * MIB
    assert threading.active_count() == threads


@needs_proc
def test_the_sampler_ends_with_an_error_and_samples_once_more() -> None:
    threads = threading.active_count()
    sampler = PeakSampler(seconds=3600)

    def interrupted() -> None:
        with sampler:
            stack.append(bytearray(b"x") * (64 * MIB))
            raise KeyboardInterrupt

    stack: list[bytearray] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    stack.clear()
    now = process_memory()
    assert now is not None and sampler.peak is not None and threading.active_count() == threads
    assert sampler.peak.anonymous - now.anonymous > 60 * MIB  # seen by the last sample alone


def test_without_proc_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "process_memory", lambda: None)
    with PeakSampler() as sampler:
        pass
    assert sampler.peak is None


def group(folder: Path, limit: object, usage: int, version: int = 2, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    lines = [*(f"{name} {value}" for name, value in stat.items()), "an odd line\n"]
    (folder / "memory.stat").write_text("\n".join(lines))


def cgroup(tmp_path: Path, own: str) -> list[int]:
    (tmp_path / "own").write_text(own)
    return sorted(_cgroup_available(tmp_path / "root", tmp_path / "own"))


def test_cgroup_version_2(tmp_path: Path) -> None:
    """Every limit on the way up counts; pages of files that can be dropped do not count as used."""
    root = tmp_path / "root"
    group(root / "a" / "b", 1000, 400, inactive_file=50, active_file=7)
    group(root / "a", "max", 900, inactive_file=1)
    group(root, 5000, 4999, inactive_file=0)
    group(root / "c", 1, 0)  # somebody else's
    group(tmp_path, 7, 0)  # above the root
    assert cgroup(tmp_path, "0::/a/b\n") == [1, 650]
    assert cgroup(tmp_path, "0::/a\n") == cgroup(tmp_path, "0::/\n") == [1]
    assert cgroup(tmp_path, "0::/not/mounted/here\n") == [1]  # as in a container that sees its own group as the root


def test_cgroup_version_1(tmp_path: Path) -> None:
    root = tmp_path / "root" / "memory"
    group(root / "docker" / "x:y", 3000, 2500, version=1, inactive_file=9, total_inactive_file=100)
    group(root, 9223372036854771712, 0, version=1)
    group(tmp_path / "root" / "docker" / "x:y", 1, 0, version=1)  # not under the controller
    own = "12:cpu,cpuacct:/docker/x:y\n5:memory,hugetlb:/docker/x:y\n1:name=systemd:/docker\n"
    assert cgroup(tmp_path, own) == [600, 9223372036854771712]
    assert cgroup(tmp_path, own + "0::/docker/x:y\n") == [600, 9223372036854771712]  # both are mounted


def test_cgroup_that_is_full_absent_or_broken(tmp_path: Path) -> None:
    root = tmp_path / "root"
    group(root / "full", 1000, 1500, inactive_file=20)
    assert cgroup(tmp_path, "0::/full\n") == [0]
    (root / "full" / "memory.current").write_text("many")
    assert cgroup(tmp_path, "0::/full\n") == []
    assert cgroup(tmp_path, "") == []
    assert _cgroup_available(root, tmp_path / "absent") == []


@pytest.mark.parametrize(("machine", "groups", "expected"), [
    (100, [], 100), (100, [70, 90], 70), (100, [9223372036854771712], 100), (None, [5], 5), (None, [], None),
    (100, [0], 0)])
def test_available_memory_is_the_least(monkeypatch: pytest.MonkeyPatch, machine: int | None, groups: list[int],
                                       expected: int | None) -> None:
    monkeypatch.setattr(memory, "_machine_available", lambda: machine)
    monkeypatch.setattr(memory, "_cgroup_available", lambda: groups)
    assert available_memory() == expected


def test_the_report_becomes_plain_numbers() -> None:
    report = MemoryReport(predicted=plan(), weights=1, rope_windows=2, nope_device=3, nope_host=4, token_ids=5,
                          process=ProcessMemory(6, 7), process_peak=None, accelerator_peak=None)
    fields = json.loads(json.dumps(report.as_dict()))
    assert fields["predicted"]["nope_keys_values"] == plan().nope_keys_values
    assert fields["process"] == {"anonymous": 6, "file_backed": 7} and fields["process_peak"] is None
    assert [fields[name] for name in ("weights", "rope_windows", "nope_device", "nope_host", "token_ids")] == [
        1, 2, 3, 4, 5]
