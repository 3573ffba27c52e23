"""Benchmarks reading with weights larger than memory, against the machine's arithmetic and its disk.

    python -m samples.benchmarks.benchmark_streaming --model DIR --tokens 16384 --weights-memory 16GiB

Reads random tokens with the model in DIR, whose weights stay mapped. Compares the time with the longer of two: the
operations at the rate of an expert's product on this machine, and the bytes of weights at the disk's rate, once a
prefill chunk. Nothing hides more than that: at 1.0, computing and reading run at the same time at full speed. The rate
of products is measured anew around every chunk, and the share of the cores that this process had is shown: on a machine
that others use, both vary. With --processor-time everything is timed by the processor time of this process, which other
programs affect less (set OMP_NUM_THREADS=1; waiting for the disk is not counted then).
With --write CONFIG, a checkpoint with random weights for this config.json is written to DIR first.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from array import array
from contextlib import nullcontext
from pathlib import Path

import torch

from cache.hybrid import HybridKVCache
from l4ctx.bench.weights import write_random_checkpoint
from l4ctx.engine.prefill import DEFAULT_PREFILL_CHUNK_SIZE, prefill
from l4ctx.formatting import human_bytes, parse_size
from l4ctx.machine.memory import available_memory, process_memory
from l4ctx.machine.processor import computing_dtype, default_attention
from l4ctx.planning.speed import measured_speed
from model.config import TextConfig
from model.costs import reading_operations
from model.weights.loading import load_checkpoint
from model.weights.pages import Dropper, mapped_files, num_bytes, ranges_of, read_in
from model.weights.streaming import WeightStream

SAMPLE_BYTES = 2**30


class MemoryPeak:
    """The most resident memory, anonymous and of files together, while it is entered."""

    def __init__(self) -> None:
        self.anonymous = self.file_backed = self.total = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            now = process_memory()
            assert now is not None
            self.anonymous = max(self.anonymous, now.anonymous)
            self.file_backed = max(self.file_backed, now.file_backed)
            self.total = max(self.total, now.anonymous + now.file_backed)


def disk_bytes() -> int:
    """Read from disks by this process so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def disk_rate(model: torch.nn.Module) -> float:
    """Bytes a second from the checkpoint's files, by reading some of them that memory does not hold."""
    ranges, dropper = ranges_of([*model.parameters(), *model.buffers()], mapped_files()), Dropper()
    largest = max(ranges, key=lambda here: here.num_bytes)
    sample = [largest.part(0, min(SAMPLE_BYTES, largest.num_bytes))]
    dropper.drop(sample)
    began = time.perf_counter()
    read_in(sample, lambda: True)
    rate = num_bytes(sample) / (time.perf_counter() - began)
    dropper.drop(sample)
    dropper.close()
    return rate


def drop_all(model: torch.nn.Module) -> None:
    dropper = Dropper()
    dropper.drop(ranges_of([*model.parameters(), *model.buffers()], mapped_files()))
    dropper.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--write", type=Path, metavar="CONFIG")
    parser.add_argument("--layers", type=int, help="with --write: keep so many layers")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--prefill-chunk-size", type=int, default=DEFAULT_PREFILL_CHUNK_SIZE)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--weights-memory", type=parse_size, help="default: what is free, less 6 GiB")
    parser.add_argument("--plain", action="store_true", help="leave it to the system what stays in memory")
    parser.add_argument("--processor-time", action="store_true", help="instead of time that passes")
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="generate N tokens after it")
    args = parser.parse_args()
    if args.processor_time:
        vars(time)["perf_counter"] = time.process_time  # also for what measures speed
    if args.write:
        raw = json.loads(args.write.read_text())
        raw["text_config"] |= {"num_hidden_layers": args.layers} if args.layers else {}
        args.model.mkdir()
        write_random_checkpoint(raw, TextConfig.from_dict(raw), args.model, torch.bfloat16)
    config = TextConfig.from_folder(args.model)
    dtype = computing_dtype(args.dtype, "bfloat16", on_accelerator=False)
    speed = measured_speed(config, dtype, "cpu", args.prefill_chunk_size)
    attention = default_attention(dtype, on_accelerator=False)
    model = load_checkpoint(args.model, dtype=dtype, attention=attention)
    drop_all(model)
    rate = disk_rate(model)
    budget = args.weights_memory or (available_memory() or 0) - 6 * 2**30
    stream = None if args.plain else WeightStream.of(model, budget)
    streamed = 0
    if stream is not None:
        model.watcher, residency = stream, stream.residency
        streamed = residency.read_a_step
        print(
            f"layers {human_bytes(residency.total)}, budget {human_bytes(budget)}: {human_bytes(residency.kept)} stay, "
            f"{human_bytes(streamed)} are read for each prefill chunk"
        )
    print(
        f"{speed.linear / 1e9:.0f} GFLOP/s in products, {speed.attention / 1e9:.0f} in attention, "
        f"{human_bytes(round(rate))}/s from disk, {torch.get_num_threads()} threads, {dtype}, {attention}"
    )
    cache = HybridKVCache(config, length=args.tokens + args.decode + 1, dtype=model.dtype)
    ids = array(
        "i", torch.randint(config.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    )
    limit = done = 0.0
    with MemoryPeak() as peak, stream or nullcontext():
        before, used = disk_bytes(), time.process_time()
        for step in prefill(model, cache, ids, prefill_chunk_size=args.prefill_chunk_size):
            share = (time.process_time() - used) / step.step_seconds / torch.get_num_threads()
            operations = reading_operations(config, step.step.start, step.step.stop)
            read, before = disk_bytes() - before, disk_bytes()
            now = measured_speed(config, dtype, "cpu", args.prefill_chunk_size)
            computing, reading = (speed.seconds(operations) + now.seconds(operations)) / 2, read / rate
            speed, used = now, time.process_time()
            limit, done = limit + max(computing, reading), done + step.step_seconds
            print(
                f"{step.step.start:>7,} to {step.step.stop:,}: {step.step_seconds:6.1f} s; arithmetic "
                f"{computing:6.1f} s, {human_bytes(read)} in {reading:5.1f} s: "
                f"{step.step_seconds / max(computing, reading):.2f} times, with {share:.0%} of the cores",
                flush=True,
            )
        print(
            f"{done:.1f} s, {done / limit:.2f} times the limit; peak {human_bytes(peak.total)}: "
            f"{human_bytes(peak.anonymous)} anonymous, {human_bytes(peak.file_backed)} of files"
        )
        token = torch.tensor([[7]])
        for number in range(args.decode):
            before, began = disk_bytes(), time.perf_counter()
            logits = model(token, cache, logits="last")
            assert logits is not None
            token = logits[0, -1].argmax()[None, None]
            print(
                f"token {number}: {time.perf_counter() - began:.2f} s, {human_bytes(disk_bytes() - before)} read, "
                f"peak {human_bytes(peak.total)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
