"""Runs the command many times for the price of one start: a process imports everything once and forks for each run.

A run costs the command's own work and some 10 ms. Limits, an ordinary user or a hook that arms faults take effect in
the fork alone. The server has one thread, as forking needs: torch's kernels run in the thread that calls them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """A run of the command in `folder`: standard input is /dev/null or the file `stdin`.

    `limits` are soft and hard limits by name, such as RLIMIT_AS, set before the command starts; `user` is a numeric id
    to run as. `pipes`: standard output and error are pipes instead of files, whose size RLIMIT_FSIZE limits; then the
    run may write 1 MiB. `before` and `after` are "module:function", called in the fork with `argument`.
    """

    arguments: Sequence[str]
    folder: str
    stdin: str = os.devnull
    limits: dict[str, int] = field(default_factory=dict)
    user: int | None = None
    pipes: bool = False
    before: str | None = None
    after: str | None = None
    argument: Any = None
    seconds: float = 60.0


@dataclass(frozen=True)
class Ended:
    """How a run ended. `code` is negative for a signal, and None where it was killed after `Run.seconds`.

    `told` is what the run's `after` returned.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    told: Any = None


class ForkServer:
    """The server's process. Must be closed; also a context manager.

    `warm_up` are runs to learn from which modules to import before the first fork, `without` are modules that cannot
    be imported there; `environment` is added to ours.
    """

    def __init__(
        self, scratch: Path, warm_up: Sequence[Run] = (), *, without: Sequence[str] = (), **environment: str
    ) -> None:
        self._out, self._err, self._told = (scratch / name for name in ("stdout", "stderr", "told"))
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server", str(self._out), str(self._err), str(self._told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ours, **environment},
            cwd=ROOT,
            start_new_session=True,
        )
        self._ask({"without": list(without)})
        for run in warm_up:
            self.learn(run)

    def run(self, run: Run) -> Ended:
        answer = self._ask({"run": asdict(run)})
        return Ended(
            answer["code"],
            self._out.read_bytes().decode("utf-8", "surrogateescape"),
            self._err.read_bytes().decode("utf-8", "surrogateescape"),
            answer["seconds"],
            json.loads(self._told.read_bytes() or b"null"),
        )

    def learn(self, run: Run) -> None:
        """Imports what a run imports."""
        self._ask({"learn": asdict(run)})

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise AssertionError(f"the server died: {self._process.wait(timeout=60)}")
        return json.loads(answer)


class _Server:
    """The other end: one request, one answer, each a line of JSON."""

    def __init__(self, out: str, err: str, told: str) -> None:
        self.out, self.err, self.told = out, err, told
        self.answers = os.dup(1)  # fork's output goes elsewhere
        os.set_inheritable(self.answers, False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def serve(self) -> None:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            answer: dict[str, Any] = {}
            if "without" in request:
                sys.modules.update(dict.fromkeys(request["without"]))  # type: ignore[arg-type]
                self.import_all(["torch", "l4ctx.run.session"])
            elif "learn" in request:
                code, seconds = self.fork(Run(**request["learn"]), learn=True)
                self.import_all(json.loads(Path(self.told).read_bytes() or b"[]"))
            else:
                code, seconds = self.fork(Run(**request["run"]))
                answer = {"code": code, "seconds": seconds}
            os.write(self.answers, json.dumps(answer).encode() + b"\n")

    @staticmethod
    def import_all(names: list[str]) -> None:
        for name in names:
            if name not in sys.modules and name != "__main__":
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(1)
        _build_once()
        gc.collect()
        gc.freeze()  # a collection in a fork would copy every page
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: a fork may wait for ever for what the others hold"

    def fork(self, run: Run, *, learn: bool = False) -> tuple[int | None, float]:
        began = time.monotonic()
        pipes = {path: _wide_pipe() for path in (self.out, self.err)} if run.pipes else {}
        pid = os.fork()
        if pid == 0:
            for reading, _ in pipes.values():
                os.close(reading)
            self.child(run, {path: writing for path, (_, writing) in pipes.items()}, learn=learn)
        descriptor = os.pidfd_open(pid)
        try:
            done, _, _ = select.select([descriptor], [], [], run.seconds)
        finally:
            os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and whatever it started
        _, status = os.waitpid(pid, 0)
        for path, (reading, writing) in pipes.items():
            os.close(writing)
            with open(reading, "rb") as pipe:
                Path(path).write_bytes(pipe.read())
        return os.waitstatus_to_exitcode(status) if done else None, time.monotonic() - began

    def child(self, run: Run, pipes: dict[str, int], *, learn: bool) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            told = os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self.redirect(run.stdin, pipes)
            os.chdir(run.folder)
            self.confine(run)
            if run.before:
                _function(run.before)(run.argument)
            code = self.command(run.arguments)
            result = sorted(sys.modules) if learn else _function(run.after)(run.argument) if run.after else None
            os.write(told, json.dumps(result).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def redirect(self, stdin: str, pipes: dict[str, int]) -> None:
        """Files or pipes in place of the three streams, opened by Python as an interpreter that starts does."""
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        for number, (path, flags) in enumerate([(stdin, os.O_RDONLY), (self.out, new), (self.err, new)]):
            descriptor = pipes[path] if path in pipes else os.open(path, flags, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(self.answers)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115

    @staticmethod
    def confine(run: Run) -> None:
        for name, limit in run.limits.items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        if run.user is not None:
            os.setgroups([])
            os.setgid(run.user)
            os.setuid(run.user)

    @staticmethod
    def command(arguments: Sequence[str]) -> int:
        """Ends as the interpreter does: an exception is a traceback and exit code 1; threads are waited for."""
        from l4ctx.cli import app

        sys.argv = ["l4ctx", *arguments]
        try:
            app.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            code = code or 120  # as the interpreter's own
        return code


def _wide_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)
    return reading, writing


def _build_once() -> None:
    """What a run builds from the program alone: the parser of arguments, and Jinja's and the documents' patterns."""
    import typer.main

    from l4ctx.checkpoint.chat_environment import chat_environment
    from l4ctx.cli.app import app

    if not hasattr(typer.main.get_command, "cache_info"):
        typer.main.get_command = functools.cache(typer.main.get_command)
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            parameter.get_runtime_param()
    chat_environment().from_string("{{ 1 }}")


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    _Server(*sys.argv[1:]).serve()
