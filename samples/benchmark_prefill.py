"""Prefill speed against `transformers` on a random model of medium size, each in a process of its own, in turn.

    python samples/benchmark_prefill.py --tokens 16384 --pairs 3

Both read the same token ids and choose the next one. `transformers` runs with sdpa in prefill chunks of 4096 tokens, in
float32 and in bfloat16; so does l4ctx, in its own chunks. Needs the extra `l4ctx[test]` and about 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CONFIG = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size": 1024, "vocab_size": 202048,
    "attention_chunk_size": 8192,
}


def make_checkpoint(folder: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(**CONFIG)).save_pretrained(folder)


def token_ids(tokens: int) -> torch.Tensor:
    return torch.randint(CONFIG["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(1))


def measure_ours(folder: Path, tokens: int, dtype: torch.dtype, prefill_chunk_size: int) -> tuple[float, int]:
    from cache.hybrid import HybridKVCache
    from l4ctx.generate import generate
    from l4ctx.prefill import prefill
    from model.checkpoint import load_checkpoint

    model, ids = load_checkpoint(folder, dtype=dtype), token_ids(tokens)[0].tolist()
    began = time.perf_counter()
    cache = HybridKVCache(model.config, length=tokens + 1, dtype=dtype)
    for _ in prefill(model, cache, ids[:-1], prefill_chunk_size=prefill_chunk_size):
        pass
    chosen = next(generate(model, cache, ids[-1], max_new_tokens=1, stop_tokens=frozenset()))
    return time.perf_counter() - began, chosen


@torch.inference_mode()
def measure_transformers(folder: Path, tokens: int, dtype: torch.dtype, prefill_chunk_size: int) -> tuple[float, int]:
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    ids = token_ids(tokens)
    began = time.perf_counter()
    out = model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=prefill_chunk_size, eos_token_id=-1)
    return time.perf_counter() - began, int(out[0, -1])


def run_apart(folder: Path, tokens: int, who: str, dtype: str, prefill_chunk_size: int) -> tuple[float, int]:
    command = [sys.executable, __file__, "--tokens", str(tokens), "--checkpoint", str(folder),
               "--worker", who, dtype, str(prefill_chunk_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, chosen = json.loads(done.stdout.splitlines()[-1])
    print(f"  {who} {dtype}, chunks of {prefill_chunk_size}: {tokens / seconds:,.0f} tokens/s, next token {chosen}",
          file=sys.stderr, flush=True)
    return seconds, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="use this folder instead of writing a checkpoint")
    parser.add_argument("--prefill-chunk-size", type=int, default=8192, help="of l4ctx")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        who, dtype, size = args.worker
        measure = measure_ours if who == "l4ctx" else measure_transformers
        print(json.dumps(measure(args.checkpoint, args.tokens, getattr(torch, dtype), int(size))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch)
        if args.checkpoint is None:
            make_checkpoint(folder)
        rows: dict[str, list[float]] = {}
        for _ in range(args.pairs):
            for dtype in ("float32", "bfloat16"):
                for who, size in (("l4ctx", args.prefill_chunk_size), ("transformers", 4096)):
                    rows.setdefault(f"{who} {dtype}", []).append(run_apart(folder, args.tokens, who, dtype, size)[0])
    for name, seconds in rows.items():
        print(f"{name}: median {args.tokens / statistics.median(seconds):,.0f} tokens/s of {len(seconds)} runs")
    ours, theirs = ([min(pair) for pair in zip(rows[f"{who} float32"], rows[f"{who} bfloat16"], strict=True)]
                    for who in ("l4ctx", "transformers"))
    ratios = [their / own for own, their in zip(ours, theirs, strict=True)]
    print(f"l4ctx is {statistics.median(ratios):.2f} times as fast, each at its better dtype, round by round "
          f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
