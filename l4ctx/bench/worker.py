"""A worker process of the benchmark: reads one job as JSON from standard input, writes one line of JSON.

l4ctx is measured by calling the functions that `l4ctx ask` calls.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l4ctx.bench.jobs import WARM_UP_DECODE, Measurement, TimedRun, WorkerJob
from l4ctx.errors import exit_code_of, one_line
from l4ctx.machine.device import prepare_torch
from l4ctx.machine.memory import PeakSampler, process_memory
from model.config import TextConfig


def main() -> None:
    """Entry point of a worker. What a user can cause is reported as message and exit code, the rest as a traceback."""
    prepare_torch()
    job = WorkerJob.from_json(sys.stdin.read())
    try:
        result = TASKS[job.task](job)
    except Exception as error:  # to look at; what is not a user's doing goes on as it was
        code = exit_code_of(error)
        if code is None:
            raise
        result = {"error": one_line(error), "exit_code": code}
    sys.stdout.write(json.dumps(result) + "\n")


def text_config(job: WorkerJob) -> TextConfig:
    """The configuration of the checkpoint, or of the random weights."""
    if job.config is not None:
        return TextConfig.from_dict(job.config)
    assert job.folder is not None
    return TextConfig.from_folder(Path(job.folder))


def token_ids(config: TextConfig, tokens: int) -> list[int]:
    """Random ids, the same for every engine that accepts ids."""
    import torch

    return torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def measure_machine(job: WorkerJob) -> dict[str, Any]:
    """What torch finds on this machine, and the number and dtype of the checkpoint's weights.

    Raises RequestError for a missing device, CheckpointError and ConfigError.
    """
    import torch

    from l4ctx.machine.device import usable_device
    from model.costs import parameter_count
    from model.weights.loading import checked_sources, stored_dtype, stored_parameters

    config, device = text_config(job), usable_device(job.device)
    parameters, stored = parameter_count(config), config.torch_dtype
    if job.folder is not None:
        sources = checked_sources(Path(job.folder), config)
        stored, parameters = stored_dtype(sources), stored_parameters(sources, config)
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "accelerator_free": torch.cuda.mem_get_info(device)[0] if on_gpu else None,
        "parameters": parameters,
        "stored_dtype": stored if stored in ("float32", "bfloat16", "float16") else "float32",
    }


def measure_l4ctx(job: WorkerJob) -> dict[str, Any]:
    """Loads a checkpoint as `ask` does, or makes random weights; then prefill and decode as in `ask`."""
    import torch

    from cache.hybrid import HybridKVCache
    from l4ctx.bench.weights import random_model, token_weight_bytes
    from l4ctx.engine.generate import generate
    from l4ctx.engine.prefill import prefill
    from l4ctx.engine.row import Row
    from model.weights.loading import load_checkpoint

    began, dtype = time.perf_counter(), getattr(torch, job.dtype)
    if job.folder is not None:
        model = load_checkpoint(
            job.folder, dtype=dtype, device=job.device, attention=job.attention, is_mapped=job.is_mapped
        )
    else:
        model = random_model(text_config(job), dtype=dtype, device=job.device, attention=job.attention)
    load_seconds = time.perf_counter() - began
    ids = token_ids(model.config, job.tokens)

    def run(tokens: int, decode_tokens: int) -> TimedRun:
        cache = HybridKVCache(model.config, length=tokens + decode_tokens + 1, dtype=dtype, device=model.device)
        cache.pin(cache.length)  # as `ask` does before it reads
        began = time.perf_counter()
        steps = [
            (len(step.step), step.step_seconds)
            for step in prefill(model, cache, ids[: tokens - 1], prefill_chunk_size=job.batch_size)
        ]
        row = Row(cache, ids[tokens - 1], max_new_tokens=1 + decode_tokens, stop_tokens=frozenset())
        answer = generate(model, row)
        token = next(answer)
        first = time.perf_counter()
        for _ in answer:
            pass
        held = cache.held()
        return TimedRun(
            first - began,
            time.perf_counter() - first,
            token,
            held.rope_windows + held.nope_device + held.nope_host + held.nope_disk,
            tuple(steps),
        )

    found = measured(job, run, load_seconds, version("l4ctx"))
    return replace(found, token_weight_bytes=token_weight_bytes(model)).as_dict()


def measure_transformers(job: WorkerJob) -> dict[str, Any]:
    import transformers

    from l4ctx.bench.peers.transformers import loaded

    began = time.perf_counter()
    run = loaded(job, token_ids(text_config(job), job.tokens))
    return measured(job, run, time.perf_counter() - began, transformers.__version__).as_dict()


def measured(job: WorkerJob, run: Callable[[int, int], TimedRun], load_seconds: float, version: str) -> Measurement:
    """A short run to warm up, then the measured run. `run` takes the numbers of tokens to read and to decode."""
    import torch

    run(min(job.warm_up_tokens, job.tokens), min(WARM_UP_DECODE, job.decode_tokens))
    before, on_gpu = process_memory(), torch.device(job.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(job.device)
    with PeakSampler() as sampler:
        timed = run(job.tokens, job.decode_tokens)
    memory: dict[str, int] = {}
    if before is not None and (peak := sampler.peak) is not None:
        memory = {
            "peak_anonymous": peak.anonymous,
            "peak_file_backed": peak.file_backed,
            "peak_above_weights": peak.anonymous - before.anonymous,
        }
    if on_gpu:
        memory["peak_accelerator"] = torch.cuda.max_memory_allocated(job.device)
    return Measurement(
        job.tokens,
        job.decode_tokens,
        timed.first_token_seconds,
        timed.decode_seconds if job.decode_tokens else None,
        load_seconds=load_seconds,
        keys_values=timed.keys_values,
        threads=torch.get_num_threads(),
        first_token=timed.first_token,
        version=version,
        steps=timed.steps,
        **memory,
    )


def measure_ceilings(job: WorkerJob) -> dict[str, Any]:
    from l4ctx.bench.ceilings import measure

    return measure(text_config(job), job.device)


def write_checkpoint(job: WorkerJob) -> dict[str, Any]:
    import torch

    from l4ctx.bench.weights import write_random_checkpoint

    assert job.config is not None and job.output is not None
    write_random_checkpoint(job.config, text_config(job), Path(job.output), getattr(torch, job.dtype))
    return {}


def write_gguf(job: WorkerJob) -> dict[str, Any]:
    from l4ctx.bench.peers.gguf import write_gguf

    assert job.folder is not None and job.output is not None
    write_gguf(Path(job.folder), text_config(job), Path(job.output), job.dtype)
    return {}


TASKS = {
    "machine": measure_machine,
    "l4ctx": measure_l4ctx,
    "transformers": measure_transformers,
    "ceilings": measure_ceilings,
    "checkpoint": write_checkpoint,
    "gguf": write_gguf,
}


if __name__ == "__main__":
    main()
