"""What the processes of one request tell one another, and how they end together.

The exchange within a forward is `model.parallel`'s; what is said here is said between forwards.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from l4ctx.machine.ranks import Launch
from model.division import TensorRank
from model.errors import RankLostError
from model.parallel import GroupContextExchange, GroupExchange, mesh_exchanges

FOREVER = timedelta(days=30)
"""A leader may wait for a reader of its answer; torchrun sees which processes end."""

SECONDS_TO_SAY_WHY, SECONDS_BETWEEN_LOOKS = 1.0, 0.05
END, FORWARD, EMBED, RAGGED, RESTORE, TAIL, UNSAVED, REPORT = range(8)
"""What all ranks do next."""

NUMBERS = 6
"""That are told before each of them."""

_FAILURE = "failure"


class Channel:
    """One process's end of what all of them tell one another. The leader tells, and the others hear as much."""

    def __init__(self, launch: Launch) -> None:
        """Waits until all are there."""
        self._store = PrefixStore(
            "l4ctx",
            TCPStore(
                launch.address,
                launch.port,
                is_master=launch.speaks and not launch.is_met,
                timeout=FOREVER,
                wait_for_workers=False,
            ),
        )
        self._store.set(_here(launch.number), "")
        others = [_here(number) for number in range(launch.count)]
        while not self._store.check(others):
            time.sleep(SECONDS_BETWEEN_LOOKS)  # and not in the store's own wait, which no signal ends
        dist.init_process_group(
            _backends(), store=self._store, rank=launch.number, world_size=launch.count, timeout=FOREVER
        )
        self.exchange = GroupExchange(TensorRank(launch.number, launch.count))

    def mesh(self, context_ranks: int) -> tuple[GroupExchange | None, GroupContextExchange | None]:
        """What the model exchanges: with the ranks that share its layers, and with those that share the sequence.

        Called by all ranks at the same time.
        """
        if context_ranks == 1:
            return self.exchange, None
        tensor_ranks = self.exchange.rank.count // context_ranks
        exchange, context = mesh_exchanges(tensor_ranks, context_ranks, FOREVER)
        return exchange if tensor_ranks > 1 else None, context

    def announce(self, kind: int, *numbers: int) -> None:
        self.tell([kind, *numbers, *[0] * (NUMBERS - 1 - len(numbers))])

    def tell(self, numbers: list[int]) -> None:
        self.exchange.from_first(torch.tensor(numbers))

    def hear(self, count: int = NUMBERS) -> list[int]:
        return self.exchange.from_first(torch.zeros(count, dtype=torch.int64)).tolist()

    def tell_json(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.tell([len(text)])
        self.exchange.from_first(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def hear_json(self) -> Any:
        (size,) = self.hear(1)
        return json.loads(bytes(self.exchange.from_first(torch.zeros(size, dtype=torch.uint8)).tolist()))

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, as many from each, on the first one; elsewhere nothing."""
        own, rank = torch.tensor(numbers), self.exchange.rank
        if rank.number:
            self.exchange.to_first(own)
            return []
        found = [torch.empty_like(own) for _ in range(rank.count)]
        self.exchange.to_first(own, found)
        return [x.tolist() for x in found]

    def say_failure(self, message: str) -> None:
        with suppress(RuntimeError):
            self._store.set(_FAILURE, message)

    def failure(self) -> str | None:
        """What another rank said before it ended; None if it ended without a word."""
        end = time.monotonic() + SECONDS_TO_SAY_WHY
        with suppress(RuntimeError):
            while time.monotonic() < end:
                if self._store.check([_FAILURE]):
                    return str(self._store.get(_FAILURE).decode(errors="replace"))
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return None

    def close(self) -> None:
        dist.destroy_process_group()


def _here(number: int) -> str:
    return f"rank {number} is here"


def _backends() -> str:
    """By what tensors travel, by their device; the same on all ranks, whatever they compute on."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


@contextmanager
def leading(launch: Launch, job: Any, kept: Callable[[], str]) -> Iterator[Channel]:
    """Meets the other ranks and gives them their work (None: there is none), which ends with this context.

    Raises RankLostError when one of them ends before: it says why, and what is `kept` of the work.
    """
    channel = Channel(launch)
    before = signal.signal(signal.SIGTERM, _ended_by_torchrun)
    try:
        channel.tell_json(job)
        yield channel
        if job is not None:
            channel.announce(END)
        channel.close()
        signal.signal(signal.SIGTERM, before)
    except RankLostError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's may come while this is being told
        raise RankLostError(f"{channel.failure() or error}; {kept()}") from None


def _ended_by_torchrun(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
    raise RankLostError("another rank has ended, or torchrun was: so all ranks end")
