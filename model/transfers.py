"""Small tensors between host and device without stopping either: tables that a step needs, counts that it finds. And
how far a device has come.

A plain copy from memory that is not pinned makes the host wait until the device has done all that was begun.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

POLL_SECONDS = 5e-4
"""How often the host looks whether a device has come as far as it waits for."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory as one on the device: the same tensor on a CPU. The host goes on at once."""
    if device.type != "cuda":
        return x.to(device)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)  # the allocator keeps the pinned memory until it has been copied


class ToHost:
    """A tensor on its way to the host. What is begun before `wait` runs while it travels."""

    def __init__(self, x: Tensor) -> None:
        self._copy: Tensor = x.to("cpu", non_blocking=True)  # to pinned memory
        self._arrived: Any = torch.cuda.current_stream(x.device).record_event() if x.device.type == "cuda" else None

    def wait(self) -> Tensor:
        """Stops the host until it has arrived, but not the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


class Milestone:
    """The end of what has been begun on a device until now. A CPU has always reached it."""

    def __init__(self, device: torch.device) -> None:
        self._end: Any = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Stops the host until it is reached, but not the device. An interrupt ends it at once, since the host sleeps
        in between instead of waiting within the driver."""
        while self._end is not None and not self._end.query():
            time.sleep(POLL_SECONDS)
