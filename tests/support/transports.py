"""A stand-in for a device that copies beside what it computes."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from model.weights.device_stream import Copies


class LateTransport:
    """Copies at the last moment, when something waits for it; until then the targets hold NaN.

    `sent` are all copies in order, each with the event that it waits for. Marks are numbered from 0.
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

    def send(self, copies: Copies, after: Any) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert after is None or after < self.marks
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

    def mark(self) -> int:
        self.marks += 1
        return self.marks - 1

    def close(self) -> None:
        self.is_closed = True


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
