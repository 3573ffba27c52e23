"""What a confined process and its parent agree on: the frames between them, and what a kind of work consists of."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FRAME = struct.Struct("!IQ")  # bytes of the header, bytes of the body
MOST_HEADER = 1 << 20  # bytes

Send = Callable[..., None]  # a header, and a body if there is one
Receive = Callable[[], bytes]  # the body of the request
Last = tuple[dict[str, Any], bytes | bytearray]  # the last reply


class Refusal(Exception):
    """A request that cannot be carried out; the message is the reason, in one line."""


@dataclass(frozen=True)
class Work:
    """One kind of work. A module that serves it has a function `work()`, which imports all that it takes.

    After that, nothing can be opened but what is below the folders `readable`, for reading.
    """

    serve: Callable[[dict[str, Any], Receive, Send], Last]
    """Takes a request's header, and receives its body or, where it has that, sends {"received": True} instead.

    After that it may send replies before the last one. Raises Refusal.
    """
    readable: tuple[str, ...] = ()
    kept: Callable[[], int] = lambda: 0
    """Bytes that are held for the next request."""
    rest_after: float | None = None
    """Seconds without a request after which `rest` is called."""
    rest: Callable[[], None] = lambda: None


def packed(header: dict[str, Any], body_bytes: int) -> bytes:
    """A message up to its body."""
    raw = json.dumps(header).encode()
    return FRAME.pack(len(raw), body_bytes) + raw
