"""Attention with PyTorch's flex_attention and the block masks of model/kernels/masks.py.

On a GPU it is compiled: it visits only blocks with a visible pair, and applies the predicate only to partial blocks. On
a CPU it is uncompiled and computes all scores, which serves as a comparison.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.kernels.attend import AttentionState, KVSegment, comparison
from model.kernels.masks import AttentionMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = (128, 128)
"""Queries and keys per block: flex_attention's default, which is a multiple of every tile size that its kernels use.
Smaller blocks mean longer lists, larger ones more partial blocks. The kernel options stay at their defaults:
ROWS_GUARANTEED_SAFE would be wrong, since a query may see no key of a segment, and so would BLOCKS_ARE_CONTIGUOUS,
since a chunk that starts inside a block has partial blocks at both ends."""

MAX_SCORE_BYTES = 64 * 2**20  # scores of one call on a CPU; up to four such arrays are live at once
MAX_BLOCKS = 2**20  # blocks of one call on a GPU: the lists take some 16 bytes for each
MAX_VARIANTS = 64  # compiled kernels per process


@comparison
def flex(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
) -> Iterator[tuple[range, AttentionState]]:
    """flex_attention over one segment; queries without a visible key in it get lse -inf and output 0.

    Queries are processed in pieces, skipping pieces that see no key. On a CPU, a piece's float32 scores (B, H, T, S)
    stay within MAX_SCORE_BYTES, unless it is a single query, and keys and values are repeated across each group of
    query heads. On a GPU, no scores are stored, a piece's block lists stay within MAX_BLOCKS, and head_dim must be at
    least 16.
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
    """Queries per call over `s` keys; `heads` counts the heads of all rows together."""
    if device_type == "cpu":
        return max(1, MAX_SCORE_BYTES // (4 * heads * max(1, s)))
    return BLOCK_SIZE[0] * max(1, MAX_BLOCKS // max(1, -(-s // BLOCK_SIZE[1])))


def _attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> AttentionState:
    """Folds rows that share one row of keys into the groups of query heads, so that the kernel reads the keys once."""
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
    """In float32, since older versions round scores to a lower precision; newer ones warn of materialised scores."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(q.float(), k.float(), v.float(), **options)


def _within_limit(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Compiled. Raises past the limit: torch's default, falling back to materialised scores, would exhaust the GPU."""
    with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS):
        return _compiled()(q, k, v, **options)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """One per process. Lengths and strides become symbolic once they change, and positions are tensors, so the steps
    of a run share compiled kernels. Both layer types, and lengths of 1, of at most one block, and longer ones compile
    separately: some 14 variants as long as dtype and head counts stay the same."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@functools.lru_cache(maxsize=16)
def _block_mask(mask: AttentionMask, queries: range, keys: range, device: torch.device) -> BlockMask:
    """Cached, since layers and older segments of equal length share a block mask."""
    return mask.block_mask(queries, keys, BLOCK_SIZE, device)
