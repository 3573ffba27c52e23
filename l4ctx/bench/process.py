"""Runs the benchmark's processes one at a time: hands over a job, samples memory, reports how one failed.

A process that is running when the benchmark is interrupted is ended first.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from l4ctx.bench.jobs import WorkerJob
from l4ctx.errors import CODES_OF_ERRORS, ModelFailureError
from l4ctx.machine.memory import ProcessMemory, process_memory
from l4ctx.machine.processor import without_sharing
from model.errors import UserError

WORKER = (sys.executable, "-P", "-m", "l4ctx.bench.worker")  # -P: not from the current folder
SAMPLING_SECONDS = 0.02


class ReportedError(UserError):
    """What a user can cause, as a worker reported it: its message and its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorkerError(ModelFailureError):
    """A process of the benchmark failed; the message says how, in one line."""

    def __init__(self, message: str, known: int | None = None) -> None:
        super().__init__(message)
        self.known = known
        """Exit code of what the worker raised, if a user can cause it."""

    def raise_as_known(self, doing: str = "") -> NoReturn:
        """Raises ReportedError for what a user can cause; otherwise one like itself that says at what it failed."""
        if self.known is None:
            raise WorkerError(f"{doing}: {self}" if doing else str(self)) from None
        raise ReportedError(str(self), self.known) from None


@dataclass(frozen=True)
class Finished:
    """What a process wrote, and its peak resident memory; None where the system does not report it."""

    stdout: str
    stderr: str
    peak: ProcessMemory | None


def run_worker(job: WorkerJob) -> dict[str, Any]:
    """The result of the job, run in a fresh process. Raises WorkerError."""
    done = run_apart(WORKER, job.to_json(), is_ours=job.task != "transformers")
    try:
        result = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(result, dict)
    except (IndexError, ValueError, AssertionError):
        raise WorkerError(f"no result ({last_line(done.stderr)})") from None
    if (message := result.get("error")) is not None:
        code = result.get("exit_code")
        raise WorkerError(str(message), code if code in CODES_OF_ERRORS else None)
    return result


def run_apart(command: Sequence[str], text: str = "", *, is_ours: bool = False) -> Finished:
    """Runs a command with `text` as its standard input, another program's in the user's own environment.

    Raises WorkerError if it cannot start or fails.
    """
    environment = None if is_ours else without_sharing()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(text.encode())
        stdin.seek(0)
        try:
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment)
        except OSError as error:
            raise WorkerError(f"{command[0]}: cannot be started ({error.strerror})") from None
        try:
            peak = _wait(process)
        finally:
            process.kill()
            process.wait()
        written, complaints = _content(stdout), _content(stderr)
    if process.returncode < 0:
        raise WorkerError(
            f"killed by {_signal_name(-process.returncode)}"
            + (" (out of memory?)" if process.returncode == -signal.SIGKILL else "")
        )
    if process.returncode > 0:
        raise WorkerError(f"{last_line(complaints)} (exit code {process.returncode})")
    return Finished(written, complaints, peak)


def _wait(process: subprocess.Popen[bytes]) -> ProcessMemory | None:
    """Waits for the process to end; returns its peak memory as sampled."""
    peak: ProcessMemory | None = None
    while True:
        try:
            process.wait(SAMPLING_SECONDS)
            return peak
        except subprocess.TimeoutExpired:
            now = process_memory(process.pid)
            if now is not None:
                peak = now if peak is None else peak.most(now)


def _content(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")


def last_line(text: str) -> str:
    """The last line of an error output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
