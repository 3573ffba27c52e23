"""Tiers of memory that a block of keys and values can lie in: device and (pinned) host.

Moves blocks between tiers and hands them to attention in order, each next one on its way while the last is in use.
Knows nothing of layers or positions. What needs an accelerator has not been run on one yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MAX_TRAVELLING_QUERIES = 16
"""With at most so many queries they go to a host block, and attention is computed there: fewer bytes travel."""

T = TypeVar("T")
U = TypeVar("U")


class Block(NamedTuple):
    """Keys and values of consecutive tokens in one layer, each (B, H_kv, S, D), head-major."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def is_on_host(self) -> bool:
        return self.keys.device.type == "cpu"

    def first(self, tokens: int) -> Block:
        """A view of the first tokens."""
        return Block(self.keys[:, :, :tokens], self.values[:, :, :tokens])

    def copy_from(self, other: Block) -> None:
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


def empty_block(batch_size: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype,
                device: torch.device, *, pinned: bool = False) -> Block:
    shape = (batch_size, heads, tokens, head_dim)
    return Block(*(torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned) for _ in range(2)))


def to_host(block: Block) -> Block:
    """The block in host memory, pinned if it comes from an accelerator; unchanged if it is there already."""
    if block.is_on_host:
        return block
    b, heads, tokens, head_dim = block.keys.shape
    host = empty_block(b, heads, tokens, head_dim, block.keys.dtype, torch.device("cpu"), pinned=True)
    host.copy_from(block)
    return host


def staged(blocks: Iterable[Block], device: torch.device, num_queries: int) -> Iterator[Block]:
    """The blocks where they are to be attended to: on `device`, or on the host for few queries."""
    if device.type == "cpu" or num_queries <= MAX_TRAVELLING_QUERIES:
        yield from blocks
        return
    stream = torch.cuda.Stream(device)

    def load(block: Block) -> tuple[Block, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            copies = Block(*(x.to(device, non_blocking=True) for x in block))
        return copies, stream.record_event()

    for copies, arrived in ahead(blocks, load):
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for x in copies:
            x.record_stream(current)  # its memory is not given away while attention still reads it
        yield copies


def ahead(items: Iterable[T], load: Callable[[T], U]) -> Iterator[U]:
    """load(item) for each item in order, each next one begun before the last is handed out."""
    iterator = iter(items)
    try:
        loaded = load(next(iterator))
    except StopIteration:
        return
    for item in iterator:
        following = load(item)
        yield loaded
        loaded = following
    yield loaded
