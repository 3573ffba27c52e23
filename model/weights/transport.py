"""Copies between host memory and a device, beside what the device computes: of weights, and of keys and values.

The host never waits unless it asks to: events say what has to be done before what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Copies = Sequence[tuple[Tensor, Tensor]]
"""Each a target and its source: all targets on the device and all sources on the host, or the other way around."""


class Transport(Protocol):
    """An event is whatever `send` and `mark` return. Copies are done in any order that their events allow."""

    device: torch.device

    def host_memory(self, num_bytes: int) -> Tensor:
        """Memory (num_bytes,) in uint8 from which copying is quick, if the system gives any."""
        ...

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        """The same; None if the system refuses it."""
        ...

    def send(self, copies: Copies, *after: Any) -> Any:
        """Begins to copy, once these events have happened; returns the event of the end. Any thread may call it."""
        ...

    def mark(self, handed_back: Tensor | None = None) -> Any:
        """The event of the end of all that has been begun to compute: nothing later reads the buffer `handed_back`."""
        ...

    def wait(self, event: Any) -> None:
        """What is computed from now on waits for the event. The host does not."""
        ...

    def finish(self, event: Any) -> None:
        """The host waits for the event."""
        ...

    def close(self) -> None:
        """The host waits for all copies."""
        ...


class CudaTransport:
    """Copies on streams of their own, one in each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to_device, self._to_host = (torch.cuda.Stream(device) for _ in range(2))

    def host_memory(self, num_bytes: int) -> Tensor:
        pinned = self.pinned_memory(num_bytes)  # from other memory the driver copies in steps
        return torch.empty(num_bytes, dtype=torch.uint8) if pinned is None else pinned

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system limits it
            return None

    def send(self, copies: Copies, *after: Any) -> Any:
        stream = self._to_host if copies[0][0].device.type == "cpu" else self._to_device
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
                for tensor in (target, source):
                    if tensor.is_cuda:
                        tensor.record_stream(stream)  # its memory is not used for others before
            return stream.record_event()

    def mark(self, handed_back: Tensor | None = None) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: Any) -> None:
        event.synchronize()

    def close(self) -> None:
        self._to_device.synchronize()
        self._to_host.synchronize()
