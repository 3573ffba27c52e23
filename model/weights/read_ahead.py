"""Read-ahead: loads started before they are needed; and tensors viewed as bytes."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], load: Callable[[T], U], depth: int = 1) -> Iterator[U]:
    """Yields load(item) for each item in order, having started the next `depth` loads before yielding."""
    begun: deque[U] = deque()
    for item in items:
        begun.append(load(item))
        if len(begun) > depth:
            yield begun.popleft()
    yield from begun


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, as a view that can be read or written in place."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu", (tensor.shape, tensor.stride(), tensor.device)
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fills the buffer from `offset` in the file; returns the number of bytes read, fewer only at its end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
