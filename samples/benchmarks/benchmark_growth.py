"""Measures how CPU time and memory of a prefill grow with its length, and compares both with their expected growth.

    python -m samples.benchmarks.benchmark_growth --tokens 8192 32768 131072 524288

The random model of samples/benchmarks/benchmark_tiers.py, whose two NoPE layers attend to the whole prefix, reads each
length in a separate process. The CPU time of a prefill chunk is fitted as a linear function of its position, by least
squares of relative residuals over the longest run. The sum of that line should predict the time of every length. The
memory peak above the weights is compared with the closed form for keys and values; the rest should stay constant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import torch

from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import peak_bytes
from l4ctx.engine.prefill import prefill
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import PeakSampler, give_back_free_memory, process_memory
from model.costs import reading_operations
from samples.benchmarks.benchmark_tiers import CHUNK, CONFIG, random_model


class Line(NamedTuple):
    """CPU seconds of a prefill chunk: `constant`, plus `slope` for each token before it."""

    constant: float
    slope: float

    @classmethod
    def through(cls, starts: list[int], seconds: list[float]) -> Line:
        """The line that minimizes the sum of squares of (constant + slope * start) / seconds - 1."""
        weights = 1 / torch.tensor(seconds, dtype=torch.float64)
        terms = torch.stack((weights, weights * torch.tensor(starts)), 1)
        return cls(*torch.linalg.lstsq(terms, torch.ones(len(starts), 1, dtype=torch.float64)).solution[:, 0].tolist())

    def at(self, start: int) -> float:
        return self.constant + self.slope * start


def run(tokens: int, threads: int) -> dict[str, Any]:
    """One prefill: CPU seconds of every chunk, and memory in bytes."""
    torch.set_num_threads(threads)
    model = random_model()
    ids = torch.randint(CONFIG.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    warm_up = HybridKVCache(CONFIG, length=2 * CHUNK, dtype=torch.bfloat16)
    list(prefill(model, warm_up, ids[: 2 * CHUNK]))
    del warm_up
    give_back_free_memory()
    before, seconds = process_memory(), []
    assert before is not None, "there is no /proc here to read memory from"
    with PeakSampler() as sampler:
        cache = HybridKVCache(CONFIG, length=tokens, dtype=torch.bfloat16)
        clock = time.process_time()
        for _ in prefill(model, cache, ids, prefill_chunk_size=CHUNK):
            now = time.process_time()
            seconds.append(now - clock)
            clock = now
    assert sampler.peak is not None
    return {
        "tokens": tokens,
        "seconds": seconds,
        "peak_above": sampler.peak.anonymous - before.anonymous,
        "closed_form": peak_bytes(StoreLayout.of(CONFIG, length=tokens, dtype="bfloat16"), tokens, CHUNK).total,
        "operations": reading_operations(CONFIG, 0, tokens).total,
    }


def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit over the longest run; stores each run's deviation from it in the run."""
    before, longest = runs[-2:]
    seconds = longest["seconds"]
    starts = [number * CHUNK for number in range(len(seconds))]
    line = Line.through(starts, seconds)
    fitted = [line.at(start) for start in starts]
    residuals = [value / expected - 1 for value, expected in zip(seconds, fitted, strict=True)]
    for each in runs:
        each["total"] = sum(each["seconds"])
        each["of_fit"] = each["total"] / sum(fitted[: len(each["seconds"])]) - 1
    more = longest["tokens"] - before["tokens"]
    return {
        "constant": line.constant,
        "slope": line.slope,
        "r_squared": statistics.correlation(starts, seconds) ** 2,
        "largest_residual": max(residuals, key=abs),
        "median_residual": statistics.median(map(abs, residuals)),
        "bytes_per_token": (longest["peak_above"] - before["peak_above"]) / more,
        "closed_form_per_token": (longest["closed_form"] - before["closed_form"]) / more,
    }


def show(runs: list[dict[str, Any]], fit: dict[str, Any]) -> None:
    for each in runs:
        print(
            f"{each['tokens']:>9,} tokens: {each['total']:>8.2f} s of CPU time, {each['of_fit']:+.1%} of the fit; "
            f"{each['operations'] / each['total'] / 1e9:.1f} GFLOP/s; peak above the weights "
            f"{human_bytes(each['peak_above'])}: keys and values {human_bytes(each['closed_form'])}, beyond them "
            f"{human_bytes(each['peak_above'] - each['closed_form'])}"
        )
    print(
        f"CPU seconds of a prefill chunk of {CHUNK:,} tokens: {fit['constant']:.3f} + {fit['slope'] * 1e6:.3f} for "
        f"each million tokens before it; R² {fit['r_squared']:.5f}; residuals: median {fit['median_residual']:.1%}, "
        f"largest {fit['largest_residual']:+.1%}"
    )
    print(
        f"memory between the two longest: {fit['bytes_per_token']:.1f} bytes per token; closed form "
        f"{fit['closed_form_per_token']:.1f} ({fit['bytes_per_token'] / fit['closed_form_per_token'] - 1:+.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--threads", type=int, default=1, help="several threads add CPU time by waiting for each other")
    parser.add_argument("--json", action="store_true", help="print JSON, with the seconds of every prefill chunk")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run(args.tokens[0], args.threads)))
        return
    if len(set(args.tokens)) < 2 or max(args.tokens) < 4 * CHUNK or any(tokens % CHUNK for tokens in args.tokens):
        parser.error(f"give at least two multiples of {CHUNK:,}, the largest at least {4 * CHUNK:,}")
    runs = []
    for tokens in sorted(set(args.tokens)):
        command = [
            sys.executable,
            "-m",
            "samples.benchmarks.benchmark_growth",
            "--worker",
            "--tokens",
            str(tokens),
            "--threads",
            str(args.threads),
        ]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    fit = judged(runs)
    if args.json:
        print(json.dumps({"runs": runs, "fit": fit}))
    else:
        show(runs, fit)


if __name__ == "__main__":
    main()
