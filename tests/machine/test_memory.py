"""Activations against their estimate, what is free against fakes, the sampler against an allocation, the table."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import mmap
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cache.hybrid import HybridKVCache
from cache.residency import READ_BUFFERS
from l4ctx.cli.tables.memory import memory_table
from l4ctx.engine.prefill import prefill
from l4ctx.formatting import human_bytes
from l4ctx.machine import memory
from l4ctx.machine.device import available_on_gpu
from l4ctx.machine.memory import (
    PeakSampler,
    ProcessMemory,
    _cgroup_available,
    available_disk,
    available_memory,
    process_memory,
)
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.placement import PlacedWeights, Tier
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.memory_report import MemoryReport
from model.config import TextConfig
from model.costs import activation_bytes
from model.transformer import Transformer
from model.weights.owners import Owner
from support.places import ROOT
from support.storages import LiveStorages

MIB = 2**20


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
    return TextConfig.from_dict(
        {
            "model_type": "llama4_text",
            "vocab_size": 211,
            "hidden_size": 96,
            "intermediate_size": 80,
            "intermediate_size_mlp": 144,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 3,
            "attention_chunk_size": 64,
            "max_position_embeddings": 4096,
            "no_rope_layer_interval": 2,
        }
        | changes
    )


def random_model(of: TextConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(of).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scout's proportions": {
        "hidden_size": 320,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "intermediate_size_mlp": 1024,
    },
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


def test_imports_no_torch() -> None:
    code = "import sys, l4ctx.machine.memory; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (99.94 * 1024, "99.9 KiB"),
        (100 * 1024, "100 KiB"),
        (1.125 * 2**30, "1.1 GiB"),
        (48 * 2**30, "48.0 GiB"),
        (480 * 2**30, "480 GiB"),
        (2.5 * 2**40, "2.5 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
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


def resident(size: int) -> mmap.mmap:
    """So many bytes in pages of their own, which go back when it is closed; malloc might keep them."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, MIB):
        block[start : start + MIB] = b"x" * MIB
    return block


@needs_proc
def test_the_sampler_sees_what_is_gone_by_the_end() -> None:
    gc.collect()
    threads = threading.active_count()
    with CountingSampler() as sampler:
        before = process_memory()
        block = resident(64 * MIB)
        sampler.wait_for_one()
        block.close()
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
            stack.append(resident(64 * MIB))
            raise KeyboardInterrupt

    stack: list[mmap.mmap] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    stack.pop().close()
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


@pytest.mark.parametrize(
    ("machine", "groups", "expected"),
    [
        (100, [], 100),
        (100, [70, 90], 70),
        (100, [9223372036854771712], 100),
        (None, [5], 5),
        (None, [], None),
        (100, [0], 0),
    ],
)
def test_available_memory_is_the_least(
    monkeypatch: pytest.MonkeyPatch, machine: int | None, groups: list[int], expected: int | None
) -> None:
    monkeypatch.setattr(memory, "_machine_available", lambda: machine)
    monkeypatch.setattr(memory, "_cgroup_available", lambda: groups)
    assert available_memory() == expected


def test_available_disk_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(folder: Path) -> Any:
        asked.append(folder)
        return shutil._ntuple_diskusage(7, 4, 3)

    monkeypatch.setattr(memory.shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    assert available_disk(tmp_path) == available_disk(tmp_path / "new" / "folder") == available_disk(Path("new")) == 3
    assert asked == [tmp_path] * 3

    def fails(folder: Path) -> Any:
        raise PermissionError

    monkeypatch.setattr(memory.shutil, "disk_usage", fails)
    assert available_disk(tmp_path) is None


class FakeNVML:
    """The driver's library with GPUs by index and by UUID, and the bytes that are free on each."""

    def __init__(self, free: dict[int | bytes, int], *, broken: bool = False) -> None:
        self.free, self.broken = free, broken
        self.shut_down = 0

    def nvmlInit_v2(self) -> int:
        return 9 if self.broken else 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        return self.nvmlDeviceGetHandleByUUID(index.value, handle)

    def nvmlDeviceGetHandleByUUID(self, name: int | bytes, handle: Any) -> int:
        if name not in self.free:
            return 6
        handle._obj.value = list(self.free).index(name) + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, found: Any) -> int:
        assert handle.value is not None and ctypes.sizeof(found._obj) == 24
        found._obj.total, found._obj.free, found._obj.used = 99, list(self.free.values())[handle.value - 1], 1
        return 0

    def nvmlShutdown(self) -> int:
        self.shut_down += 1
        return 0


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [
        (None, 0, 10),
        (None, 1, 11),
        (None, 2, None),
        ("1,0", 0, 11),
        ("1, 0", 1, 10),
        ("1", 1, None),
        ("", 0, None),
        ("GPU-abc", 0, 12),
        ("GPU-xyz", 0, None),
        ("-1", 0, None),
    ],
)
def test_free_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, expected: int | None
) -> None:
    driver = FakeNVML({0: 10, 1: 11, b"GPU-abc": 12})
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert available_on_gpu(index) == expected


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert available_on_gpu() is None
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: FakeNVML({0: 1}, broken=True))
    assert available_on_gpu() is None
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # an old one, without these functions
    assert available_on_gpu() is None


def report(**changes: Any) -> MemoryReport:
    workload = Workload(
        config(), prompt_tokens=150, max_new_tokens=21, weights=1000, weights_are_mapped=False, dtype="float32"
    )
    fields = {
        "predicted": plan_memory(workload),
        "weights": 1 * MIB,
        "weights_by_owner": [PlacedWeights(Owner.HEAD, ("Q6_K",), {Tier.MAPPED: 1 * MIB})],
        "rope_windows": 2 * MIB,
        "nope_device": 3 * MIB,
        "nope_host": 4 * MIB,
        "nope_disk": 5 * MIB,
        "buffers": 6 * MIB,
        "token_ids": 7 * MIB,
        "draft_index": 0,
        "weight_buffers": 0,
        "process_before": ProcessMemory(8 * MIB, 9 * MIB),
        "process": ProcessMemory(10 * MIB, 11 * MIB),
        "process_peak": ProcessMemory(12 * MIB, 13 * MIB),
        "accelerator_peak": 14 * MIB,
    }
    return MemoryReport(**(fields | changes))


def test_the_report_becomes_plain_numbers() -> None:
    whole = report(process_peak=None)
    fields = json.loads(json.dumps(whole.as_dict()))
    assert list(fields) == list(MemoryReport.__dataclass_fields__)
    assert fields["predicted"] == whole.predicted.as_dict()
    held = {"owner": "head", "stored": ["Q6_K"], "mapped": 1 * MIB, "streamed": 0, "memory": 0, "device": 0}
    assert fields["weights_by_owner"] == [held]
    assert fields["process_before"] == {"anonymous": 8 * MIB, "file_backed": 9 * MIB}
    assert fields["process"] == {"anonymous": 10 * MIB, "file_backed": 11 * MIB} and fields["process_peak"] is None
    assert [
        fields[name] // MIB
        for name in (
            "weights",
            "rope_windows",
            "nope_device",
            "nope_host",
            "nope_disk",
            "buffers",
            "token_ids",
            "accelerator_peak",
        )
    ] == [1, 2, 3, 4, 5, 6, 7, 14]


def table(of: MemoryReport) -> dict[str, list[str]]:
    """The memory table's rows as a person reads them, by name."""
    text = io.StringIO()
    Console(file=text, width=120).print(memory_table(of))
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.getvalue().splitlines()]
    return {name: values for name, *values in rows}


def test_the_table_shows_what_is_there() -> None:
    rows = table(report())
    host = human_bytes(report().predicted.end.nope_host)
    assert rows["NoPE keys and values, host memory"] == [host, host, "4.0 MiB"]
    assert rows["NoPE keys and values, accelerator"] == ["0 B", "0 B", "3.0 MiB"]
    assert rows["NoPE keys and values, disk"] == ["0 B", "0 B", "5.0 MiB"]
    assert rows["read buffers"] == ["0 B", "0 B", "6.0 MiB"]
    assert rows["process, anonymous"] == ["10.0 MiB", "12.0 MiB"] and rows["accelerator"] == ["14.0 MiB"]
    assert rows["keys and values in memory"][-1] == "15.0 MiB"
    plain = table(report(nope_device=0, nope_disk=0, buffers=0, process=None, accelerator_peak=None))
    assert not {name for name in plain if "disk" in name or "accelerator" in name or "process" in name}
    assert "read buffers" not in plain


def test_the_table_shows_what_was_planned_for_disk() -> None:
    """Predicted at the end and at the most, then what is held."""
    of = config(num_hidden_layers=2, attention_chunk_size=8192, head_dim=128)
    workload = Workload(
        of, prompt_tokens=60_000, max_new_tokens=0, weights=1000, weights_are_mapped=True, dtype="float32"
    )
    budget = (16 + 1 + 16 * READ_BUFFERS + 16) * MIB  # an open block, read buffers and one row
    plan = plan_memory(workload, Capacity(kv_host=budget, disk_folder="x"))
    rows = table(
        report(
            predicted=plan,
            nope_device=0,
            nope_host=plan.end.nope_host,
            nope_disk=plan.end.nope_disk,
            buffers=plan.end.buffers,
        )
    )
    assert rows["NoPE keys and values, host memory"] == ["21.2 MiB", "32.0 MiB", "21.2 MiB"]
    assert rows["NoPE keys and values, disk"] == ["96.0 MiB", "96.0 MiB", "96.0 MiB"]
    assert rows["read buffers"] == [human_bytes(16 * READ_BUFFERS * MIB)] * 3
    assert "weights, mapped from the checkpoint" in rows
