"""Stand-ins for a device that copies beside what it computes: one that is late, and one that does as it likes."""

from __future__ import annotations

import ctypes
import random
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.weights.transport import Copies


class LateTransport:
    """Copies at the last moment, when something waits for it; until then the targets hold NaN.

    `sent` are all copies in order, each with the events that it waits for. Marks are numbered from 0.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[tuple[Copies, Any]] = []
        self.marks = 0
        self.host_bytes = 0
        self.is_closed = False
        self.fails_at: int | None = None  # this copy
        self._done = 0
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        return len(self.sent) - self._done

    def host_memory(self, num_bytes: int) -> Tensor:
        self.host_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        return self.host_memory(num_bytes)

    def send(self, copies: Copies, *after: Any) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert all(event < self.marks for event in after)
        with self._lock:
            if len(self.sent) == self.fails_at:
                self.fails_at = None
                raise OSError("unreadable")
            for target, _ in copies:
                _bytes(target).fill_(255)
            self.sent.append((copies, after))
            return len(self.sent)

    def wait(self, event: int) -> None:
        with self._lock:
            while self._done < event:
                for target, source in self.sent[self._done][0]:
                    target.copy_(source)
                self._done += 1

    def mark(self, handed_back: Tensor | None = None) -> int:
        self.marks += 1
        return self.marks - 1

    def close(self) -> None:
        self.is_closed = True

    def finish(self, event: int) -> None:
        self.wait(event)


@dataclass(eq=False)
class _Copy:
    pairs: Copies
    after: tuple[Any, ...]
    read: list[Tensor] | None = None  # what was found at the sources
    is_done: bool = False


class UnrulyTransport:
    """The CPU as the device. Copies are done at a random time, in any order that their events allow.

    Targets hold bytes of ones, which are NaN, until something waits for the copy, and buffers again once they are
    handed back. Computing is done at once; a copy that does not wait for the end of what reads its target fails.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.copies: list[_Copy] = []
        self.finished = 0  # how often the host waited
        self._chance = random.Random(seed)
        self._read_until: dict[
            int, int | None
        ] = {}  # by memory: the mark at which it was handed back, None if it is read
        self._marks = 0
        self._lock = threading.RLock()

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        return self.host_memory(num_bytes)

    def send(self, copies: Copies, *after: Any) -> _Copy:
        with self._lock:
            sent = _Copy(list(copies), after)
            for place in {_memory(target) for target, _ in copies}:
                if place in self._read_until:
                    mark = self._read_until.pop(place)
                    assert mark is not None and mark in after, "overwrites what is being computed with"
                for other in self.copies:
                    if not other.is_done and any(_memory(target) == place for target, _ in other.pairs):
                        assert other in after, "two copies to one place, in any order"
            for target, _ in copies:
                _bytes(target).fill_(255)
            self.copies.append(sent)
            self._do_some()
            return sent

    def mark(self, handed_back: Tensor | None = None) -> int:
        with self._lock:
            self._marks += 1
            if handed_back is not None:
                self._read_until[_memory(handed_back)] = self._marks
                _bytes(handed_back).fill_(255)
            self._do_some()
            return self._marks

    def wait(self, event: Any) -> None:
        self._land(event)
        if isinstance(event, _Copy):
            for target, _ in event.pairs:
                self._read_until[_memory(target)] = None

    def finish(self, event: Any) -> None:
        self.finished += 1
        self._land(event)

    def close(self) -> None:
        for copy in self.copies:
            self._land(copy)

    def _do_some(self) -> None:
        waiting = [copy for copy in self.copies if copy.read is None]
        for copy in self._chance.sample(waiting, self._chance.randint(0, len(waiting))):
            self._do(copy)

    def _do(self, copy: _Copy) -> None:
        """Reads the sources. The targets get it when something waits for it, or depends on it."""
        if copy.read is None:
            for event in copy.after:
                self._land(event)
            copy.read = [source.clone() for _, source in copy.pairs]

    def _land(self, event: Any) -> None:
        with self._lock:
            if isinstance(event, _Copy) and not event.is_done:
                self._do(event)
                assert event.read is not None
                with torch.inference_mode():  # as what sent it, whatever thread waits for it
                    for (target, _), data in zip(event.pairs, event.read, strict=True):
                        target.copy_(data)
                event.is_done = True
                self.copies.remove(event)


class PinningTransport(UnrulyTransport):
    """Counts what it is asked for, pins `most` bytes, and knows slots by their addresses alone, as a device does.

    A slot that is given back is overwritten, unless a copy that has been begun still reads or writes it.
    """

    def __init__(self, seed: int, most: int | None = None) -> None:
        super().__init__(seed)
        self.slot_bytes = 0  # to overwrite
        self.asked: list[int] = []
        self.outside = 0  # times that memory was taken which is no slab
        self.poisoned = 0
        self._most = most
        self._slabs: list[Tensor] = []

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        self.asked.append(num_bytes)
        if self._most is not None and sum(self.asked) > self._most:
            return None
        self._slabs.append(super().host_memory(num_bytes))
        return self._slabs[-1]

    def host_memory(self, num_bytes: int) -> Tensor:
        self.outside += 1
        return super().host_memory(num_bytes)

    def send(self, copies: Copies, *after: Any) -> Any:
        return super().send([(self._unowned(target), self._unowned(source)) for target, source in copies], *after)

    def give_back(self, free: Any, slab: Tensor, address: int) -> None:
        pending = [tensor for copy in self.copies for pair in copy.pairs for tensor in pair]
        if address not in [tensor.untyped_storage().data_ptr() for tensor in pending]:
            ctypes.memset(address, 255, self.slot_bytes)
            self.poisoned += 1
        free.append((slab, address))

    def _unowned(self, tensor: Tensor) -> Tensor:
        """A view that keeps no slot."""
        base = tensor.untyped_storage().data_ptr()
        if not any(slab.data_ptr() <= base < slab.data_ptr() + slab.nbytes for slab in self._slabs):
            return tensor
        data = (ctypes.c_ubyte * tensor.untyped_storage().nbytes()).from_address(base)
        view = torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype)
        return view.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
