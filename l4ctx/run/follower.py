"""What all ranks but the first do: nothing but compute what the first one is about to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.context import Continuation, continuation
from l4ctx.contexts.restoring import Held
from l4ctx.machine.device import device_of_rank, prepare_torch
from l4ctx.machine.memory import PeakSampler, process_memory, return_large_blocks
from l4ctx.machine.ranks import Launch
from l4ctx.run.channel import EMBED, END, FORWARD, RAGGED, REPORT, RESTORE, TAIL, Channel
from l4ctx.run.ranks import DTYPES, LOGITS, Job, report, restore, stop_saving, tail
from model.config import TextConfig
from model.errors import RankLostError, UserError

COLUMNS = 5
"""Of the table of forks: number, capacity, offset, tokens fed, and of how many of them logits are wanted."""


def follow(launch: Launch) -> None:
    """Raises RankLostError when another rank ends early, and what loading a checkpoint raises."""
    prepare_torch()
    return_large_blocks()
    channel = Channel(launch)
    try:
        said = channel.hear_json()
        if said is not None:
            job = Job(**said)
            with PeakSampler() as sampler:
                Follower(channel, job, device_of_rank(launch, job.device), sampler).run()
        channel.close()
    except RankLostError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        channel.say_failure(f"rank {launch.number} failed: {what}")
        raise


class Follower:
    """One of the other ranks, which `run` until the leader ends the work."""

    def __init__(
        self,
        channel: Channel,
        job: Job,
        device: torch.device | str = "cpu",
        sampler: PeakSampler | None = None,
    ) -> None:
        """`sampler` tells the peak of this process's memory."""
        self._channel, self._job, self._sampler = channel, job, sampler
        self._before = process_memory()
        self._model = job.load(*channel.mesh(job.context_ranks), device=device)
        self._whole = TextConfig.from_folder(Path(job.model))
        self._scratch = job.scratch()
        self._rows = job.saved_rows(channel, self._whole) if job.is_saved else None
        self._cache = job.cache(self._model, self._scratch, self._rows)
        self._cache.pin(job.length, all_on_disk=job.all_on_disk)
        self._forks: dict[int, Continuation] = {}

    def run(self) -> None:
        while True:
            kind, *numbers = self._channel.hear()
            if kind == END:
                return
            if kind in (FORWARD, EMBED):
                *shape, dtype, state = numbers
                x = torch.zeros([size for size in shape if size], dtype=DTYPES[dtype], device=self._model.device)
                self._compute(kind, self._channel.exchange.from_first(x), state)
            elif kind == RAGGED:
                self._compute_forks(*numbers[:2])
            elif kind == RESTORE:
                restore(Held.from_dict(self._channel.hear_json()), self._cache, self._channel, self._whole)
            elif kind == TAIL:
                assert self._rows is not None
                tail(self._rows, self._cache)
            elif kind == REPORT:
                peak = None if self._sampler is None else self._sampler.peak
                report(self._channel, self._job, self._model, self._cache, self._before, peak)
            else:  # UNSAVED
                stop_saving(self._cache, self._scratch)

    def _compute(self, kind: int, x: Tensor, state: int) -> None:
        if kind == EMBED:
            self._model.embed(x)
            return
        offset, logits = divmod(state, len(LOGITS))
        _rewind(self._cache, offset)
        wanted: Any = LOGITS[logits]
        self._model(x, self._cache, logits=wanted)

    def _compute_forks(self, rows: int, tokens: int) -> None:
        said = self._channel.hear(COLUMNS * rows + tokens)
        table, ids = [said[n : n + COLUMNS] for n in range(0, COLUMNS * rows, COLUMNS)], said[COLUMNS * rows :]
        before, self._forks = self._forks, {}
        fed, counts = [], []
        caches: list[Any] = []
        for number, capacity, offset, count, wanted in table:
            fork = self._forks[number] = before.get(number) or continuation(self._cache, capacity)
            _rewind(fork, offset)
            if count:
                fed.append(ids[:count])
                caches.append(fork)
                counts.append(wanted)
                del ids[:count]
        self._model.forward_ragged(fed, caches, counts)


def _rewind(cache: Any, offset: int) -> None:
    if offset != cache.offset:
        cache.rewind(offset)  # tokens of a draft that were wrong
