"""Small tensors between host and device without stopping either: tables that a step needs, counts that it finds.

A plain copy from memory that is not pinned makes the host wait until the device has done all that was begun.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory as one on the device: the same tensor on a CPU. The host goes on at once."""
    if device.type != "cuda":
        return x.to(device)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)  # the allocator keeps the pinned memory until it has been copied


class ToHost:
    """A tensor on its way to the host. What is begun before `wait` runs while it travels. Not run on a GPU yet."""

    def __init__(self, x: Tensor) -> None:
        self._copy: Tensor = x.to("cpu", non_blocking=True)  # to pinned memory
        self._arrived: Any = torch.cuda.current_stream(x.device).record_event() if x.device.type == "cuda" else None

    def wait(self) -> Tensor:
        """Stops the host until it has arrived, but not the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
