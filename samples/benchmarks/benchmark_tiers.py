"""Benchmarks the disk tier against the same run with everything in host memory.

    python -m samples.benchmarks.benchmark_tiers --tokens 524288 --share 8 --rounds 3

A random model with two NoPE layers (hidden 32, one head of 16, bfloat16) reads random tokens, so that every step
attends to the whole prefix. Runs alternate, each in a separate process: one without limits, and one with a host budget
for a share of the KV cache and the rest in a scratch file. Compares the bytes of sealed blocks, times and memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency, rows_within
from l4ctx.engine.prefill import prefill
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import PeakSampler, process_memory
from model.config import TextConfig
from model.transformer import Transformer
from model.weights.read_ahead import as_bytes

CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 2,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10485760,
        "no_rope_layers": [1, 0, 1, 0, 1],
    }
)
CHUNK = 8192


def random_model() -> Transformer:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def run(tokens: int, share: int, folder: Path) -> dict[str, Any]:
    """One prefill. With `share` 0, everything stays in host memory."""
    model = random_model()
    ids = torch.randint(CONFIG.vocab_size, (tokens,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    row = memoryview(bytearray(as_bytes(ids))).cast("i")
    layout = StoreLayout.of(CONFIG, length=tokens, dtype="bfloat16")
    all_bytes = layout.sealed_rows(tokens) * layout.row_bytes
    budget = all_bytes // share if share else 0
    residency = Residency()
    if share:
        residency = Residency(rows_within(layout, budget, CHUNK, is_open_here=True, is_read_here=True))
    list(prefill(model, HybridKVCache(CONFIG, length=2 * CHUNK, dtype=torch.bfloat16), row[: 2 * CHUNK]))  # warm-up
    before = process_memory()
    with PeakSampler() as sampler:
        rows = Scratch(folder) if share else None
        cache = HybridKVCache(CONFIG, length=tokens, dtype=torch.bfloat16, residency=residency, rows=rows)
        began = time.perf_counter()
        for _ in prefill(model, cache, row):
            pass
        seconds = time.perf_counter() - began
    digests = [hashlib.sha256() for _ in cache.stores]
    for digest, store in zip(digests, cache.stores, strict=True):
        for block in cache.tiers.stream(store.sealed, residency, 1):
            digest.update(as_bytes(block.keys.contiguous()))
            digest.update(as_bytes(block.values.contiguous()))
    assert before is not None and sampler.peak is not None
    held = cache.held()
    return {
        "seconds": seconds,
        "digests": [digest.hexdigest() for digest in digests],
        "budget": budget,
        "held": held.total,
        "on_disk": held.nope_disk,
        "sealed": all_bytes,
        "anonymous_above": sampler.peak.anonymous - before.anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=524288)
    parser.add_argument("--share", type=int, default=8, help="host budget: 1/SHARE of the sealed keys and values")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(run(args.tokens, args.worker, args.kv_dir)))
        return
    ratios = []
    for number in range(args.rounds):
        results = []
        for share in (0, args.share):
            command = [
                sys.executable,
                "-m",
                "samples.benchmarks.benchmark_tiers",
                "--tokens",
                str(args.tokens),
                "--kv-dir",
                str(args.kv_dir),
                "--worker",
                str(share),
            ]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        host, disk = results
        ratios.append(disk["seconds"] / host["seconds"])
        equal = host["digests"] == disk["digests"]
        print(
            f"round {number + 1}: {args.tokens:,} tokens, {human_bytes(host['sealed'])} sealed; all in memory "
            f"{host['seconds']:.1f} s; budget {human_bytes(disk['budget'])}, {human_bytes(disk['on_disk'])} on disk: "
            f"{disk['seconds']:.1f} s ({ratios[-1]:.2f} times); block bytes {'equal' if equal else 'DIFFER'}; "
            f"anonymous memory above the model {human_bytes(disk['anonymous_above'])} "
            f"({human_bytes(host['anonymous_above'])} with all in memory)",
            flush=True,
        )
        if not equal:
            raise SystemExit(1)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
