"""The same work in llama.cpp: runs its `llama-bench` and parses the output.

llama-bench draws random tokens of its own; all that this can change is which experts they are routed to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4ctx.bench.jobs import WARM_UP_TOKENS, Candidate, Measurement
from l4ctx.bench.process import Finished, WorkerError, last_line, run_apart
from l4ctx.errors import UsageError

UBATCH_SIZES = (512, 2048)
PROGRAM = "llama-bench"


def check_program(name: str) -> str:
    """The path of llama-bench, as the user named it or as found on the PATH. Raises UsageError."""
    if not name:
        found = shutil.which(PROGRAM)
        if found is None:
            raise UsageError(
                f"--compare llama.cpp: there is no {PROGRAM} on the PATH; name it: "
                f"--compare llama.cpp=/path/to/{PROGRAM}"
            )
        return found
    path = Path(name)
    if path.is_dir():
        path = path / PROGRAM
    if not path.exists():
        raise UsageError(f"--compare llama.cpp: {path}: no such file; name the program {PROGRAM}")
    found = shutil.which(str(path.absolute()))
    if found is None:
        raise UsageError(f"--compare llama.cpp: {path}: cannot be executed; name the program {PROGRAM}")
    return found


def measure(
    program: str,
    candidate: Candidate,
    tokens: int,
    decode_tokens: int,
    *,
    threads: int,
    on_cpu: bool,
    parameters: int,
    warm_up_tokens: int = WARM_UP_TOKENS,
) -> Measurement:
    """A prefill, after one of `warm_up_tokens` tokens; then decoding after `tokens` tokens.

    Raises WorkerError, also if the file's model does not have `parameters` weights.
    """
    assert candidate.file is not None
    common = [
        program,
        "-m",
        candidate.file,
        "-r",
        "1",
        "-fa",
        "1",
        "-b",
        "2048",
        "-ub",
        str(candidate.batch_size),
        "-t",
        str(threads),
        "-o",
        "jsonl",
        "--no-warmup",
        *(["-ngl", "0"] if on_cpu else []),
    ]
    prefill = run_apart([*common, "-p", f"{min(warm_up_tokens, tokens)},{tokens}", "-n", "0"])
    first = _rate(prefill, n_prompt=tokens, n_gen=0)
    told = _records(prefill.stdout.splitlines())[-1]
    commit, there = told.get("build_commit"), told.get("model_n_params", parameters)
    if there != parameters:
        raise WorkerError(f"{candidate.file} is another model: it has {there:,} weights instead of {parameters:,}")
    peaks = [prefill.peak]
    decode_seconds = None
    if decode_tokens:
        decode = run_apart([*common, "-p", "0", "-n", str(decode_tokens), "-d", str(tokens)])
        decode_seconds = decode_tokens / _rate(decode, n_gen=decode_tokens, n_depth=tokens)
        peaks.append(decode.peak)
    known = [peak for peak in peaks if peak is not None]
    return Measurement(
        tokens,
        decode_tokens,
        tokens / first,
        decode_seconds,
        peak_anonymous=max((peak.anonymous for peak in known), default=None),
        peak_file_backed=max((peak.file_backed for peak in known), default=None),
        threads=threads,
        version=commit if isinstance(commit, str) else None,
    )


def _rate(done: Finished, **fields: int) -> float:
    """Tokens a second of the last record with these fields. Raises WorkerError if there is none."""
    rates = [
        record.get("avg_ts")
        for record in _records(done.stdout.splitlines())
        if all(record.get(name) == value for name, value in fields.items())
    ]
    if not rates or not isinstance(rates[-1], int | float) or not 0 < rates[-1] < float("inf"):
        said = last_line(done.stdout or done.stderr)
        raise WorkerError(f"{PROGRAM} printed no readable figures ({said[:200]})")
    return float(rates[-1])


def _records(lines: Sequence[str]) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
