"""Measuring stays quick where a dtype is slow: work grows from small pieces, and a hopeless candidate is dropped.

Nothing is timed: clocks and workers are pretended ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4ctx.bench import benchmark, candidates, ceilings
from l4ctx.bench.jobs import WorkerJob
from l4ctx.bench.process import WorkerError
from l4ctx.machine import timing
from l4ctx.machine.timing import Work, growing, growing_rate
from l4ctx.planning.speed import measured_speed
from model.config import TextConfig
from support.cli_runner import check_refused, run_here, text_file

WIDE = {
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 640,
    "intermediate_size": 1280,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 1,
    "max_position_embeddings": 1500,
}


class Clock:
    """A processor of a pretended speed: work takes its operations' time and is not done."""

    def __init__(self, rate: float) -> None:
        self.rate, self.passed = rate, 0.0
        self.calls: list[float] = []

    def best_seconds(self, call: Callable[[], Any], device: str, seconds: float = 1.0) -> float:
        took = call() / self.rate
        self.calls.append(took)
        self.passed += took if took > 2 * seconds else took + seconds
        return took


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Clock]:
    def make(rate: float) -> Clock:
        made = Clock(rate)
        monkeypatch.setattr(timing, "best_seconds", made.best_seconds)
        for module in (timing, ceilings):
            monkeypatch.setattr(module, "Work", lambda call, amount: Work(lambda: amount, amount))
        return made

    return make


def test_sizes_grow_to_the_largest() -> None:
    assert growing(1) == (1,) and growing(4) == (1, 4) and growing(5) == (1, 4, 5) and growing(70) == (1, 4, 16, 64, 70)


@pytest.mark.parametrize(("rate", "largest"), [(1e3, 1), (1e4, 4), (1e6, 1024), (1e9, 5000)])
def test_work_grows_while_it_is_quick(rate: float, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand operations a row: the largest size is the last one within four limits of 0.3 s."""
    sizes: list[int] = []

    def timed(call: Callable[[], float], device: str, seconds: float) -> float:
        return call()

    def rows(size: int) -> Work:
        return Work(lambda: sizes.append(size) or 1000 * size / rate, 1000 * size)

    monkeypatch.setattr(timing, "best_seconds", timed)
    assert growing_rate(rows, growing(5000), "cpu", 0.3) == pytest.approx(rate)
    assert max(sizes) == sizes[-1] == largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [3e7, 5e8, 1e11])
def test_a_plan_is_measured_in_seconds_at_any_speed(rate: float, dtype: str, clock: Callable[[float], Clock]) -> None:
    """At the slower rates all rows at once would take minutes."""
    slow = clock(rate)
    speed = measured_speed(TextConfig.from_dict(WIDE), dtype, "cpu", 8192)
    assert speed.linear == pytest.approx(rate) and speed.attention == pytest.approx(rate)
    assert slow.passed < 6
    at_once = 6 * 512 * 640 * 1280 / rate
    assert at_once > 60 or rate > 1e8
    assert max(slow.calls) <= max(4 * 0.15, slow.calls[0]) * 1.001


@pytest.mark.parametrize("rate", [2e8, 1e10])
def test_ceilings_are_measured_in_seconds_at_any_speed(
    rate: float, clock: Callable[[float], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "BYTES", 2**24)
    monkeypatch.setattr(ceilings, "KEYS", 1024)
    slow = clock(rate)
    assert ceilings.product_rate("bfloat16", "cpu") == pytest.approx(rate)
    assert ceilings.attention_rate(TextConfig.from_dict(WIDE), "sdpa", "float32", "cpu") == pytest.approx(rate)
    assert ceilings.read_rate(640, "float32", "cpu") == pytest.approx(rate)
    assert slow.passed < 8


@pytest.mark.parametrize(
    ("rates", "fast"),
    [
        ({"float32": 70e9, "bfloat16": 5e8, "float16": 4e8}, ["float32"]),
        ({"float32": 70e9, "bfloat16": 9e9, "float16": None}, ["float32", "bfloat16"]),
        ({"float32": 5e12, "bfloat16": 9e13, "float16": 8e13}, ["bfloat16", "float16"]),
    ],
)
def test_slow_dtypes_are_measured_no_further(
    rates: dict[str, float | None], fast: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "product_rate", lambda dtype, device: rates[dtype])
    monkeypatch.setattr(ceilings, "attention_rate", lambda *_: 1.0)
    monkeypatch.setattr(ceilings, "read_rate", lambda *_: 1.0)
    monkeypatch.setattr(ceilings, "BYTES", 2**20)
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    found = ceilings.measure(TextConfig.from_dict(WIDE), "cpu")
    assert list(found["product"]) == list(found["read"]) == fast
    assert all(list(by_dtype) == fast for by_dtype in found["attention"].values())
    assert found["slow_product"] == {dtype: rate for dtype, rate in rates.items() if rate and dtype not in fast}


Workers = Callable[[dict[tuple[str, str], float]], list[WorkerJob]]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Workers that pretend to read so many tokens a second, by engine and dtype; 0: they fail. And what they did."""

    def install(rates: dict[tuple[str, str], float]) -> list[WorkerJob]:
        jobs: list[WorkerJob] = []

        def worker(job: WorkerJob) -> dict[str, Any]:
            jobs.append(job)
            if job.task == "machine":
                return {
                    "torch": "2",
                    "threads": 1,
                    "device": "cpu",
                    "accelerator": None,
                    "accelerator_free": None,
                    "parameters": 1000,
                    "stored_dtype": "float32",
                }
            rate = rates[job.task, job.dtype]
            if not rate:
                raise WorkerError("killed by SIGKILL")
            return {"tokens": job.tokens, "decode_tokens": 0, "first_token_seconds": job.tokens / rate, "steps": []}

        monkeypatch.setattr(benchmark, "run_worker", worker)
        monkeypatch.setattr(benchmark, "find_spec", lambda name: object())
        monkeypatch.setattr(candidates, "write_checkpoint", lambda *_: Path("/nowhere"))
        monkeypatch.setattr(candidates, "folder_for_transformers", lambda *_: Path("/nowhere"))
        return jobs

    return install


def config_file(tmp_path: Path, **changes: Any) -> str:
    return str(text_file(tmp_path / "config.json", json.dumps(WIDE | changes)))


def bench(config: str, *options: str) -> Any:
    return run_here("bench", "--config", config, "--rounds", "1", "--decode", "0", "--no-ceilings", "--json", *options)


@pytest.mark.parametrize(
    ("ours", "slow"),
    [
        ({"float32": 300.0, "bfloat16": 2.0}, "bfloat16"),
        ({"float32": 40.0, "bfloat16": 400.0}, "float32"),
        ({"float32": 300.0, "bfloat16": 40.0}, None),
        ({"float32": 300.0, "bfloat16": 0.0}, None),
    ],
)
def test_a_hopeless_dtype_reads_a_few_tokens_only(
    ours: dict[str, float], slow: str | None, tmp_path: Path, workers: Workers
) -> None:
    jobs = workers({("l4ctx", dtype): rate for dtype, rate in ours.items()})
    result = bench(config_file(tmp_path), "--tokens", "1000")
    assert result.code == 0, result.stderr
    read = {dtype: [job.tokens for job in jobs if job.task == "l4ctx" and job.dtype == dtype] for dtype in ours}
    best = max(ours, key=ours.__getitem__)
    assert read.pop(best) == ([64, 1000] if slow else [64, 1000, 1000])  # no trial where no other is left
    assert read == {dtype: [64] if dtype == slow else [64, 1000] for dtype in read}
    report = json.loads(result.stdout)
    assert report["chosen"]["l4ctx"]["dtype"] == best
    if slow:
        (text,) = report["left_out"]
        assert f"l4ctx in {slow} is left out: {ours[slow]:.3g} tokens/s at the first 64 tokens" in text
        assert text in result.stderr
    else:
        assert report["left_out"] == []
    assert all(job.warm_up_tokens < 64 for job in jobs if job.tokens == 64)


def test_dtypes_of_one_engine_say_nothing_of_another(tmp_path: Path, workers: Workers) -> None:
    """An engine that is slow in all it can do is measured all the same; its batch sizes are tried in the dtype left."""
    jobs = workers(
        {
            ("l4ctx", "float32"): 900.0,
            ("l4ctx", "bfloat16"): 800.0,
            ("transformers", "float32"): 20.0,
            ("transformers", "bfloat16"): 1.0,
        }
    )
    config = config_file(tmp_path, max_position_embeddings=20000)
    result = bench(config, "--tokens", "9000", "--compare", "transformers")
    assert result.code == 0, result.stderr
    theirs = [(job.dtype, job.batch_size, job.tokens) for job in jobs if job.task == "transformers"]
    assert theirs == [
        ("float32", 4096, 64),
        ("bfloat16", 4096, 64),
        ("float32", 4096, 8192),
        ("float32", 8192, 8192),
        ("float32", 4096, 9000),
    ]


def test_short_trials_are_made_at_once(tmp_path: Path, workers: Workers) -> None:
    jobs = workers({("l4ctx", "float32"): 900.0, ("l4ctx", "bfloat16"): 1.0})
    assert bench(config_file(tmp_path), "--tokens", "200").code == 0
    assert [job.tokens for job in jobs if job.task == "l4ctx"] == [200, 200, 200]


# Lengths


@pytest.mark.parametrize(
    ("positions", "decode", "lengths", "shortened"),
    [
        (1500, 0, [1499], "1,499 tokens are read instead of 4,096 and 16,384: the model has 1,500 positions"),
        (9000, 20, [4096, 8979], "8,979 tokens are read instead of 16,384: the model has 9,000 positions"),
        (4097, 0, [4096], "4,096 tokens are read instead of 16,384"),
        (16385, 0, [4096, 16384], ""),
    ],
)
def test_default_lengths_are_shortened_to_the_model(
    positions: int, decode: int, lengths: list[int], shortened: str, tmp_path: Path, workers: Workers
) -> None:
    workers({("l4ctx", "float32"): 900.0, ("l4ctx", "bfloat16"): 500.0})
    config = config_file(tmp_path, max_position_embeddings=positions)
    result = bench(config, "--decode", str(decode))
    assert result.code == 0, result.stderr
    assert [row["tokens"] for row in json.loads(result.stdout)["lengths"]] == lengths
    assert shortened in result.stderr and ("instead of" in result.stderr) == bool(shortened)


@pytest.mark.parametrize("options", [("--tokens", "4096,16384"), ("--tokens", "1500"), ("--decode", "1499")])
def test_other_lengths_that_are_too_long_are_refused(
    options: tuple[str, ...], tmp_path: Path, workers: Workers
) -> None:
    jobs = workers({})
    check_refused(bench(config_file(tmp_path), *options), 4, "1,500 positions", as_json=True)
    assert not jobs
