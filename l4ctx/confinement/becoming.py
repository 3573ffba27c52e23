"""Confines a process and becomes a program in it. Imports little: it runs once for each document that is converted."""

from __future__ import annotations

import json
import os
import sys

from l4ctx.confinement.sandbox import confine_program, limit_memory, limit_processor_time

NOT_STARTED = 126  # the exit code, as a shell has it


def become(asked: str) -> None:
    """`asked` is in JSON: the command, what may be read, bytes of memory, and seconds of processor time."""
    command, readable, memory, seconds = json.loads(asked)
    confine_program(command[0], readable)
    limit_memory(memory)
    limit_processor_time(seconds)
    try:
        os.execve(command[0], command, {"LC_ALL": "C.UTF-8"})
    except OSError as error:
        sys.stderr.write(f"cannot be started: {error.strerror}")
        sys.exit(NOT_STARTED)
