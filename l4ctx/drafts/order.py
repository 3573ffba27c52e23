"""Sorts the positions of a text by the tokens before them, for `l4ctx.drafts.index`.

By prefix doubling (Manber and Myers, https://doi.org/10.1137/0222058) of the text read backwards, no deeper than DEPTH.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from l4ctx.drafts.index import DEPTH, SEGMENT_TOKENS

KEY_BITS = 63


def text_order(ids: array[int] | memoryview) -> array[int]:
    """The order of 32-bit token ids, none negative, that `IndexedText` searches: as many 32-bit positions.

    Takes SORTING_BYTES of memory beside it.
    """
    order = array("i", bytes(4 * len(ids)))
    if not ids:
        return order
    text, positions = torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(order, dtype=torch.int32)
    bits = (int(text.max()) + 1).bit_length()
    for start in range(0, len(ids), SEGMENT_TOKENS):
        stop = min(start + SEGMENT_TOKENS, len(ids))
        lead = min(start, DEPTH)
        positions[start:stop] = _sorted(text[start - lead : stop], lead, bits).add_(start)
    return order


def _sorted(text: Tensor, lead: int, bits: int) -> Tensor:
    """The positions `lead` and up of `text`, less `lead`, by the DEPTH tokens before each, then by position.

    Ids plus 1 have at most `bits` bits. A missing token comes before all others.
    """
    depth = min(DEPTH, KEY_BITS // bits)
    keys = torch.zeros(len(text), dtype=torch.int64)
    for back in range(1, depth + 1):
        keys <<= bits
        keys[back:] += text[:-back].to(torch.int64).add_(1)
    while depth < DEPTH:
        ranks = _ranks(keys)
        deeper = min(DEPTH, 2 * depth)
        back, depth = deeper - depth, deeper
        keys = ranks * (len(text) + 1)
        keys[back:] += ranks[:-back].add_(1)
        del ranks
    return keys[lead:].sort(stable=True).indices.to(torch.int32)


def _ranks(keys: Tensor) -> Tensor:
    """How many distinct keys are smaller than each, int64."""
    values, places = keys.sort()
    steps = torch.zeros_like(values)
    torch.ne(values[1:], values[:-1], out=steps[1:])
    torch.cumsum(steps, 0, out=values)
    return steps.scatter_(0, places, values)
