"""Processes started as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.cli_runner import COMMAND


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def started(*arguments: str, folders: Sequence[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """A process in each of these current folders, the first of which leads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*COMMAND, *arguments],
                    env={**os.environ, **environment(number, len(folders), port)},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for number, folder in enumerate(folders)
        ]
        for process in processes:
            stack.callback(process.kill)
        yield processes
