"""`l4ctx bench` without a model: options, jobs, processes that fail, medians, ratios, closed forms."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from l4ctx.bench import process
from l4ctx.bench.jobs import Candidate, Measurement, WorkerJob
from l4ctx.bench.peers.llama_cpp import measure
from l4ctx.bench.process import ReportedError, WorkerError, last_line, run_apart, run_worker
from l4ctx.bench.report import BenchReport, BenchRun, best_candidate, figures_of, median_of
from l4ctx.bench.roofline import (
    decode_share,
    decoding_bytes,
    first_token_operations,
    kv_bytes,
    prefill_share,
    visible_tokens,
    weight_bytes,
)
from l4ctx.cli.console import rendered
from l4ctx.cli.tables.bench import bench_table
from l4ctx.errors import INPUT
from model.config import TextConfig
from model.costs import reading_operations
from support.cli_runner import COMMAND, TINY, check_refused, run_here, run_process, text_file

OURS, THEIRS = Candidate("l4ctx", "float32", 8192, attention="sdpa"), Candidate("transformers", "bfloat16", 4096)
TOY = {
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 22,
    "intermediate_size_mlp": 34,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "attention_chunk_size": 7,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 256,
}
SMALL = TextConfig.from_dict(TOY)


# What is refused at once


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([], 2, ["--model DIR", "--config FILE"]),
        (["--model", str(TINY), "--tokens", "0"], 2, ["--tokens: 0 is too few"]),
        (["--model", str(TINY), "--tokens", "64,-3"], 2, ["--tokens: '64,-3' is not a list of numbers"]),
        (["--model", str(TINY), "--tokens", "64,many"], 2, ["--tokens: '64,many' is not a list of numbers"]),
        (["--model", str(TINY), "--tokens", ""], 2, ["--tokens: ''"]),
        (["--model", str(TINY), "--tokens", "64,99999999"], 4, ["99999999", "10,485,760 positions"]),
        (["--model", str(TINY), "--dtype", "int3"], 2, ["--dtype: 'int3'"]),
        (["--model", str(TINY), "--attention", "none"], 2, ["--attention: 'none' is not one of sdpa"]),
        (["--model", str(TINY), "--compare", "vllm"], 2, ["--compare: 'vllm'", "llama.cpp=/path/to/llama-bench"]),
        (["--model", str(TINY), "--compare", "transformers=5"], 2, ["--compare: 'transformers=5'"]),
        (["--model", str(TINY), "--compare", "llama.cpp="], 2, ["--compare: 'llama.cpp='"]),
        (
            ["--model", str(TINY), "--compare", "llama.cpp=/nowhere/llama-bench"],
            2,
            ["/nowhere/llama-bench: no such file"],
        ),
        (["--model", str(TINY), "--compare", f"llama.cpp={TINY / 'config.json'}"], 2, ["cannot be executed"]),
        (["--model", str(TINY), "--gguf", "a.gguf"], 2, ["--gguf is for --compare llama.cpp"]),
        (["--config", "/nowhere/config.json"], 3, ["/nowhere/config.json: no such file"]),
        (["--config", str(TINY / "model-00001-of-00002.safetensors")], 3, ["cannot be read as JSON"]),
        (["--config", str(TINY / "generation_config.json")], 3, ["generation_config.json: model_type"]),
        (["--model", "/nowhere"], 3, ["/nowhere: no such folder"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    arguments: list[str], code: int, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("L4CTX_MODEL", raising=False)
    check_refused(run_here("bench", *arguments), code, *parts)


def test_a_missing_llama_bench_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check_refused(run_here("bench", "--model", str(TINY), "--compare", "llama.cpp"), 2, "on the PATH", "llama.cpp=")


@pytest.mark.parametrize(("package", "peer"), [("transformers", "transformers"), ("gguf", "llama.cpp=/bin/sh")])
def test_a_missing_package_is_named_with_the_command_that_adds_it(
    package: str, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l4ctx.bench.benchmark.find_spec", lambda name: None if name == package else object())
    check_refused(run_here("bench", "--model", str(TINY), "--compare", peer), 2, package, 'pip install "l4ctx[bench]"')


def test_what_the_machine_lacks_is_refused() -> None:
    check_refused(run_here("bench", "--model", str(TINY), "--device", "cuda:77", "--quiet"), 2, "--device cuda:77")


def test_a_run_that_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.bench.candidates.available_memory", lambda: 2**20)
    monkeypatch.setattr(
        "l4ctx.bench.benchmark.run_worker",
        lambda job: {
            "stored_dtype": "float32",
            "parameters": 3_000_000,
            "accelerator_free": None,
            "device": "cpu",
        },
    )
    check_refused(run_here("bench", "--model", str(TINY), "--tokens", "64"), 5, "this run needs")


def test_a_disk_that_does_not_suffice_is_refused_before_files_are_written(tmp_path: Path) -> None:
    from l4ctx.bench.peers.files import check_disk
    from l4ctx.planning.memory_plan import MemoryPlanError

    check_disk(1, tmp_path, "this")
    with pytest.raises(MemoryPlanError, match=r"the comparison needs .* TMPDIR"):
        check_disk(2**60, tmp_path, "the comparison")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['l4ctx', 'bench', '--help']\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, 'rich' in sys.modules))\n"
        "from l4ctx.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "--compare" in done.stdout and done.stdout.endswith("False False\n")


# Processes


def test_jobs_and_measurements_survive_json() -> None:
    job = WorkerJob("l4ctx", config={"a": [1, None]}, dtype="bfloat16", batch_size=7, tokens=5, decode_tokens=3)
    assert WorkerJob.from_json(job.to_json()) == job
    measurement = Measurement(8, 3, 2.0, 0.5, keys_values=9, peak_anonymous=4, peak_file_backed=2, steps=((8, 1.5),))
    assert Measurement.from_dict(measurement.as_dict()) == measurement
    assert (measurement.prefill_rate, measurement.decode_rate, measurement.peak) == (4.0, 6.0, 6)
    assert Measurement(8, 0, 2.0).decode_rate is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (out of memory?)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise ValueError('too\\nbad')", "bad (exit code 1)"),
        ("import sys; sys.exit(3)", "no output (exit code 3)"),
        ("print('garbage')", "no result (no output)"),
        ("pass", "no result (no output)"),
        ("print('[1]')", "no result (no output)"),
        ("import sys; print('{', file=sys.stdout); print('why', file=sys.stderr)", "no result (why)"),
    ],
)
def test_a_worker_that_fails_says_how(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(WorkerError) as caught:
        run_worker(WorkerJob("machine"))
    assert str(caught.value) == message
    with pytest.raises(WorkerError, match="doing this: "):
        caught.value.raise_as_known("doing this")


def test_what_a_user_can_cause_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"error": "no such device", "exit_code": 2}'
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-c", f"print('''{line}''')"))
    with pytest.raises(WorkerError) as caught:
        run_worker(WorkerJob("machine"))
    with pytest.raises(ReportedError, match=r"^no such device$") as reported:
        caught.value.raise_as_known("doing this")
    assert reported.value.exit_code == INPUT
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-c", f"print('''{line}'''.replace('2', '1000'))"))
    with pytest.raises(WorkerError) as caught:
        run_worker(WorkerJob("machine"))
    assert caught.value.known is None


def test_nothing_in_the_current_folder_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("l4ctx", "model", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert run_worker(WorkerJob("machine", config=TOY, device="cpu"))["device"] == "cpu"


def test_a_process_is_watched_and_told_what_to_do() -> None:
    done = run_apart(
        [
            sys.executable,
            "-c",
            "import sys, time; held = bytearray(2**26); time.sleep(0.3); print(sys.stdin.read()[::-1])",
        ],
        "abc",
    )
    assert done.stdout == "cba\n" and done.peak is not None and done.peak.anonymous >= 2**26
    with pytest.raises(WorkerError, match="/nowhere: cannot be started"):
        run_apart(["/nowhere"])
    assert last_line("a\n b \n\n") == "b"


def is_listed(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.matrix)])
def test_an_interruption_ends_the_worker_and_leaves_no_file(number: signal.Signals, tmp_path: Path) -> None:
    program = script(tmp_path / "llama-bench", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    config = text_file(tmp_path / "config.json", json.dumps(TOY))
    (tmp_path / "any.gguf").touch()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [
            *COMMAND,
            "bench",
            "--config",
            str(config),
            "--tokens",
            "9",
            "--compare",
            f"llama.cpp={program}",
            "--gguf",
            str(tmp_path / "any.gguf"),
            "--dtype",
            "bfloat16",
            "--no-ceilings",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    stop_at = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < stop_at and process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert list(scratch.iterdir())
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "") and stderr.endswith("l4ctx: interrupted; nothing is kept\n")
    assert not list(scratch.iterdir())
    stop_at = time.monotonic() + 10
    while is_listed(int((tmp_path / "pid").read_text())):  # it is killed, but may not have been waited for yet
        assert time.monotonic() < stop_at
        time.sleep(0.05)


# llama-bench


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


LLAMA = Candidate("llama.cpp", "bf16", 512, "x.gguf")
WELL = """case "$*" in
*"-d 300"*) echo '{"n_prompt": 0, "n_gen": 4, "n_depth": 300, "avg_ts": 8.0, "build_commit": "abc"}';;
*) echo 'loading'; echo '{"n_prompt": 64, "n_gen": 0, "avg_ts": 7.0}'
echo '{"n_prompt": 300, "n_gen": 0, "n_depth": 0, "avg_ts": 150.0, "build_commit": "abc"}';;
esac"""


def test_figures_of_llama_bench_are_read(tmp_path: Path) -> None:
    program = script(tmp_path / "llama-bench", f'echo "$*" >> {tmp_path}/seen\n{WELL}')
    measured = measure(str(program), LLAMA, 300, 4, threads=3, on_cpu=True, parameters=5)
    assert (measured.first_token_seconds, measured.decode_seconds, measured.version) == (2.0, 0.5, "abc")
    assert (measured.prefill_rate, measured.decode_rate) == (150.0, 8.0)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert all("-m x.gguf -r 1 -fa 1 -b 2048 -ub 512 -t 3 -o jsonl --no-warmup -ngl 0" in line for line in seen)
    assert "-p 64,300 -n 0" in seen[0] and "-p 0 -n 4 -d 300" in seen[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'error: invalid parameter for argument: -fa' >&2; exit 1", "invalid parameter for argument: -fa"),
        ("echo garbage", "printed no readable figures (garbage)"),
        ("true", "printed no readable figures"),
        ('echo \'{"n_prompt": 300, "n_gen": 0, "avg_ts": "fast"}\'', "printed no readable figures"),
        ('echo \'{"n_prompt": 300, "n_gen": 0, "avg_ts": 0}\'', "printed no readable figures"),
        ('echo \'{"n_prompt": 299, "n_gen": 0, "avg_ts": 5}\'; echo 3', "printed no readable figures"),
        (
            'echo \'{"n_prompt": 300, "n_gen": 0, "avg_ts": 5, "model_n_params": 4000}\'',
            "x.gguf is another model: it has 4,000 weights instead of 5",
        ),
        ("kill -9 $$", "killed by SIGKILL"),
    ],
)
def test_a_llama_bench_that_fails_says_how(tmp_path: Path, body: str, message: str) -> None:
    program = script(tmp_path / "llama-bench", body)
    with pytest.raises(WorkerError) as caught:
        measure(str(program), LLAMA, 300, 0, threads=1, on_cpu=False, parameters=5)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Medians and ratios


def run(
    number: int,
    candidate: Candidate,
    seconds: float,
    tokens: int = 12,
    decode_seconds: float | None = None,
    **fields: Any,
) -> BenchRun:
    return BenchRun(number, candidate, Measurement(tokens, 6, seconds, decode_seconds, **fields))


RUNS = [
    run(1, OURS, 1.0, decode_seconds=3.0, peak_anonymous=5, peak_file_backed=1),
    run(1, THEIRS, 4.0, decode_seconds=6.0),
    run(2, OURS, 3.0, decode_seconds=2.0, peak_anonymous=9),
    run(2, THEIRS, 6.0, decode_seconds=1.0),
    run(3, OURS, 2.0, decode_seconds=1.0, peak_anonymous=7),
    run(1, OURS, 9.0, tokens=24),
]


def test_ratios_are_those_of_each_round() -> None:
    theirs, ours = figures_of(RUNS, THEIRS, 12), figures_of(RUNS, OURS, 12)
    assert ours.prefill_rates == [12, 4, 6] and ours.decode_rates == [2, 3, 6] and ours.first_token_seconds == 2
    assert ours.peak == 9 and ours.as_dict()["median_prefill_rates"] == 6
    assert theirs.prefill_rates == [3, 2] and theirs.first_token_seconds == 5 and theirs.peak is None
    assert theirs.prefill_ratios == [4, 2] and theirs.decode_ratios == [2, 0.5]  # round 3 has no pair
    assert theirs.as_dict()["median_prefill_ratios"] == 3
    assert figures_of(RUNS, OURS, 24).decode_rates == []


def test_the_fastest_candidate_of_an_engine_is_chosen() -> None:
    other = Candidate("transformers", "float32", 8192)
    trials = [run(0, OURS, 1.0), run(0, THEIRS, 3.0), run(0, other, 2.0)]
    assert best_candidate(trials, "transformers") == other and best_candidate(trials, "llama.cpp") is None


def test_medians_of_nested_figures() -> None:
    rounds = [
        {"a": {"x": 1.0, "y": None}, "cached": False},
        {"a": {"x": 3.0, "y": 5.0}, "cached": True},
        {"a": {"x": 7.0}, "cached": False},
    ]
    assert median_of(rounds) == {"a": {"x": 3.0, "y": 5.0}, "cached": True}
    assert median_of([None, None]) is None


CEILINGS = {
    "product": {"float32": 1e9},
    "attention": {"sdpa": {"float32": 5e8}, "other": {"float32": None}},
    "read": {"float32": 1e8, "bfloat16": 2e8},
    "copy": 3e8,
    "disk": 4e8,
    "disk_is_cached": True,
}


def report() -> BenchReport:
    return BenchReport(
        SMALL,
        {"path": "x\x1b[31m", "random_weights": True, "parameters": 5},
        {"cpu": "toy", "accelerator": None, "threads": 1, "torch": "2", "date": "today"},
        [12, 24, 48],
        6,
        3,
        runs=list(RUNS),
        chosen={"l4ctx": OURS, "transformers": THEIRS},
        failures=["llama.cpp: it said no\x07"],
        ceilings=[CEILINGS, CEILINGS | {"copy": 5e8}],
    )


def test_the_table_says_all_of_it_in_a_narrow_terminal() -> None:
    shown = rendered(bench_table(report()))
    for part in (
        "12 tokens, median of 3 rounds",
        "24 tokens, median of 1 round",
        "transformers",
        "bfloat16",
        "speedup of l4ctx, prefill",
        "3.00",
        "times its roofline (the kernels alone)",
        "from the system's cache",
        "failed: llama.cpp: it said no",
    ):
        assert part in shown, part
    assert "\x1b" not in shown and "\x07" not in shown


def test_the_report_as_json_has_everything_raw() -> None:
    found = report().as_dict()
    assert [run["round"] for run in found["runs"]] == [1, 1, 2, 2, 3, 1]
    assert found["ceilings"]["median"]["copy"] == 4e8 and found["failures"]
    twelve, _, none = found["lengths"]
    assert [engine["engine"] for engine in twelve["engines"]] == ["l4ctx", "transformers"]
    assert twelve["shares"].keys() == {"prefill", "decode"} and none["engines"] == [] and none["shares"] == {}


# Closed forms


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 29])
def test_operations_to_the_first_token_are_those_of_reading_and_one_more_layer(tokens: int) -> None:
    """The last layer is computed as if it were the last but one, for one query: the difference of two readings."""
    read, all_of_it = reading_operations(SMALL, 0, tokens), first_token_operations(SMALL, tokens)
    c, q, kv, v = 42, 60, 20, 97
    last = 2 * (2 * c * q + 2 * c * kv) + 2 * (c * 5 + 3 * 3 * c * 22) - 2 * 2 * c * kv
    assert all_of_it.linear == read.linear + last + 2 * c * v
    assert all_of_it.full_attention == read.full_attention + 4 * q * tokens
    assert all_of_it.chunked_attention == read.chunked_attention


@pytest.mark.parametrize("position", [0, 6, 7, 20])
def test_bytes_of_a_decoded_token_are_those_of_the_tensors_that_it_needs(position: int) -> None:
    import torch

    from cache.hybrid import HybridKVCache
    from l4ctx.bench.weights import random_model, token_weight_bytes

    model = random_model(SMALL, dtype=torch.bfloat16)
    needed = 0
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".experts." in name:
            share = SMALL.num_experts_per_tok / SMALL.num_local_experts
        elif "embed_tokens" in name:
            share = 1 / SMALL.vocab_size
        needed += round(parameter.nbytes * share)
    cache = HybridKVCache(SMALL, length=64, dtype=torch.bfloat16)
    model(torch.ones(1, position + 1, dtype=torch.int64), cache)
    for layer in range(SMALL.num_hidden_layers):
        seen = visible_tokens(SMALL, layer, position)
        queries = range(position, position + 1)
        cache.offset = position  # as the forward of that token sees it
        held = sum(len(segment.positions) for segment in cache.segments(layer, queries))
        assert held >= seen and (SMALL.uses_rope(layer) or held == position + 1)
        needed += seen * 2 * SMALL.num_key_value_heads * SMALL.head_dim * 2
    weights = weight_bytes(SMALL, 2)
    assert weights == token_weight_bytes(model)
    assert weights + kv_bytes(SMALL, position, 2) == needed
    assert decoding_bytes(SMALL, position, 2, 2) == needed + weights + kv_bytes(SMALL, position + 1, 2)
    assert decoding_bytes(SMALL, position, 2, 2, weights // 4) == decoding_bytes(SMALL, position, 2, 2) - 2 * (
        weights - weights // 4
    )


def test_shares_are_the_measured_time_in_multiples_of_the_predicted_one() -> None:
    operations = first_token_operations(SMALL, 12)
    expected = operations.linear / 1e9 + (operations.chunked_attention + operations.full_attention) / 5e8
    share = prefill_share(SMALL, 12, 3 * expected, CEILINGS, "float32", "sdpa")
    assert share is not None and share["times_predicted"] == pytest.approx(3)
    assert share["predicted_seconds"] == pytest.approx(expected)
    for dtype, backend in (("float16", "sdpa"), ("float32", "other"), ("float32", "eager")):
        assert prefill_share(SMALL, 12, 1.0, CEILINGS, dtype, backend) is None
    decode = decode_share(SMALL, 12, 6, 7.0, CEILINGS, 4)
    assert decode["bytes"] == decoding_bytes(SMALL, 12, 6, 4)
    assert decode["times_predicted"] == pytest.approx(7.0 * 2e8 / decode["bytes"])


def test_a_closed_stdout_is_refused() -> None:
    result = run_process("bench", "--model", str(TINY), shell="1>&-")
    assert result.code == 2 and "standard output is closed" in result.stderr
