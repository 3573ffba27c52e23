"""Attention by PyTorch's flex_attention, which reads the block masks of model/kernels/masks.py.

Compiled on a GPU, where it visits only blocks that hold a visible pair and applies the predicate only to those that are
partly visible; uncompiled on a CPU, where it computes all scores and is there to be compared with. Knows nothing of how
segments are merged.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.kernels.attend import AttentionState, KVSegment
from model.kernels.masks import AttentionMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = (128, 128)
"""Queries and keys of a block: flex_attention's own default, of which the tiles that its kernels choose are divisors.
Smaller blocks make longer lists, larger ones more partial blocks. The kernel options stay at their defaults:
ROWS_GUARANTEED_SAFE would be wrong, since a query may see nothing of a segment, and so would BLOCKS_ARE_CONTIGUOUS,
since a chunk that starts within a block has partial blocks at both ends."""

MAX_SCORE_BYTES = 64 * 2**20  # of the scores of one call on a CPU; up to four such arrays live at once
MAX_BLOCKS = 2**20  # of one call on a GPU: the lists take some 16 bytes for each
MAX_VARIANTS = 64  # compiled kernels of a process


def flex(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
) -> Iterator[tuple[range, AttentionState]]:
    """flex_attention over one segment; queries without a visible key in it have lse -inf and output 0.

    Long queries are cut into pieces, of which those that see nothing are left out. On a CPU a piece's scores in float32
    (B, H, T, S) stay within MAX_SCORE_BYTES, or are those of one query; keys and values are repeated for the heads of
    a group. On a GPU no scores are stored, and a piece's block lists stay within MAX_BLOCKS; heads must have at least
    16 elements there. The GPU path has not been run on a GPU yet.
    """
    b, h, t, _ = queries.shape
    at_once = _queries_at_once(queries.device.type, b * h, len(segment.positions))
    for first in range(0, t, at_once):
        rows = range(first, min(first + at_once, t))
        seen = positions[rows.start : rows.stop]
        if mask.tiles(seen, segment.positions):
            block_mask = _block_mask(mask, *mask.moved_back(seen, segment.positions), queries.device)
            yield rows, _attend(queries[:, :, rows.start : rows.stop], segment.keys, segment.values, block_mask)


def _queries_at_once(device_type: str, heads: int, s: int) -> int:
    """Queries of one call that meets `s` keys; `heads` of all rows together."""
    if device_type == "cpu":
        return max(1, MAX_SCORE_BYTES // (4 * heads * max(1, s)))
    return BLOCK_SIZE[0] * max(1, MAX_BLOCKS // max(1, -(-s // BLOCK_SIZE[1])))


def _attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> AttentionState:
    """Rows that share one row of keys become further members of each group of heads, which the kernels read at once."""
    b, h, t, d = q.shape
    if k.shape[0] == b:
        return _call(q, k, v, block_mask)
    out, lse = _call(q.transpose(0, 1).reshape(1, h * b, t, d), k, v, block_mask)
    return AttentionState(out[0].unflatten(0, (h, b)).transpose(0, 1), lse[0].unflatten(0, (h, b)).transpose(0, 1))


def _call(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> AttentionState:
    from torch.nn.attention import flex_attention as module  # here: it imports the compiler, half a second

    grouped = q.shape[1] != k.shape[1]
    attention = _uncompiled if q.device.type == "cpu" else _within_limit
    if not hasattr(module, "AuxRequest"):  # torch 2.8
        return AttentionState(*attention(q, k, v, block_mask=block_mask, enable_gqa=grouped, return_lse=True))
    wanted = module.AuxRequest(lse=True)
    out, found = attention(q, k, v, block_mask=block_mask, enable_gqa=grouped, return_aux=wanted)
    return AttentionState(out, found.lse)


def _uncompiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """In float32, as older versions would round scores to a lower precision; newer ones warn that scores are stored."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(q.float(), k.float(), v.float(), **options)


def _within_limit(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Compiled. Past the limit it raises: falling back to scores in memory, as is usual, would fill the GPU."""
    with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS):
        return _compiled()(q, k, v, **options)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """One for the process. Lengths and strides become symbols when they first change, and positions are tensors, so
    that the steps of a run share what was compiled. Compiled apart are both kinds of layer, and lengths of 1, of at
    most one block, and longer: some 14 variants, while dtype and numbers of heads stay the same."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@functools.lru_cache(maxsize=16)
def _block_mask(mask: AttentionMask, queries: range, keys: range, device: torch.device) -> BlockMask:
    """Kept, because layers and older segments of one length share them."""
    return mask.block_mask(queries, keys, BLOCK_SIZE, device)
