"""Which of torchrun's processes this one is, and what makes many of them behave as one. Imports no torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from l4ctx.machine.processor import usable_cores

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Launch:
    """One of several processes that torchrun started with the same command. The first one speaks."""

    number: int
    count: int
    local_count: int  # of them on this machine
    address: str  # where they meet
    port: int
    is_met: bool  # torchrun itself holds the store there
    local_number: int = 0  # among those on this machine

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch | None:
        """None for a process that torchrun did not start, or started alone."""
        if any(name not in environment for name in _NAMES):
            return None
        try:
            number, count, local_count = (int(environment[name]) for name in _NAMES[:3])
            port, here = int(environment["MASTER_PORT"]), int(environment.get("LOCAL_RANK", number))
        except ValueError:
            return None
        is_met = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address = environment["MASTER_ADDR"]
        return cls(number, count, max(1, local_count), address, port, is_met, here) if count > 1 else None

    @property
    def speaks(self) -> bool:
        return self.number == 0

    def prepare(self) -> None:
        """Shares the machine's cores, and silences all processes but the first. Call it before importing torch.

        torchrun gives each process one thread unless OMP_NUM_THREADS says more, so 1 there means that nobody chose.
        """
        if os.environ.get("OMP_NUM_THREADS") == "1":
            os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // self.local_count))
        if self.speaks:
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once and silently; the first one says what is kept
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
