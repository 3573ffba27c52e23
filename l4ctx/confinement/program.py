"""Runs a program that strangers' documents are fed to: it reads standard input, writes standard output, and can do
nothing else.

One process for each run, confined before it becomes the program (`l4ctx.confinement.sandbox.confine_program`).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from l4ctx.confinement.becoming import NOT_STARTED
from l4ctx.confinement.process import ENDED, LARGE, SLOW, ChildFailedError, Limits, NoChildError, isolated_command

_PIECE = 1 << 16  # bytes
_MOST_MESSAGES = 1 << 16  # bytes of standard error that are kept
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from l4ctx.confinement.becoming import become; become(sys.argv[1])"


@dataclass(frozen=True)
class Output:
    """What a program has written, and how it ended."""

    code: int
    text: bytes
    messages: bytes  # the beginning of its standard error


def run_program(command: Sequence[str], body: bytes, limits: Limits, readable: Sequence[str] = ()) -> Output:
    """Runs `command`, whose first part is the path of a statically linked program, with `body` as standard input.

    It can open nothing but the files `readable`. Of `limits`, `left` has no meaning here. Raises NoChildError, and
    ChildFailedError where a signal ended it or it exceeds a limit.
    """
    asked = json.dumps([list(command), list(readable), limits.memory, limits.processor_seconds])
    try:
        process = subprocess.Popen(
            isolated_command(_PROGRAM, asked),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # gets no Ctrl-C
            env={"LC_ALL": "C.UTF-8"},
        )
    except OSError as error:
        raise NoChildError(f"cannot be started: {error.strerror}") from None
    with process:
        try:
            output, messages = _exchange(process, body, limits)
            code = process.wait()
        finally:
            process.kill()
    if code == NOT_STARTED:
        raise NoChildError(messages.decode("utf-8", "replace"))
    if code < 0:
        raise ChildFailedError(SLOW if -code in (signal.SIGXCPU, signal.SIGKILL) else ENDED)
    return Output(code, output, messages)


def _exchange(process: subprocess.Popen[bytes], body: bytes, limits: Limits) -> tuple[bytes, bytes]:
    """Feeds and reads it until it closes its pipes. Raises ChildFailedError."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + limits.seconds
    left, output, messages = memoryview(body), bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for pipe, kept in ((process.stdout, output), (process.stderr, messages)):
            selector.register(pipe, selectors.EVENT_READ, kept)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready and time.monotonic() >= deadline:
                raise ChildFailedError(SLOW)
            for key, _ in ready:
                if key.data is None:
                    with suppress(BrokenPipeError):
                        left = left[os.write(key.fd, left[:_PIECE]) :]
                        if left:
                            continue
                    selector.unregister(process.stdin)
                    process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.data is output or len(messages) < _MOST_MESSAGES:
                    key.data.extend(piece)
                if len(output) > limits.reply:
                    raise ChildFailedError(LARGE)
    return bytes(output), bytes(messages)
