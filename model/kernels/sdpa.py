"""Attention with PyTorch's fused kernels, tile by tile: no materialised mask, and the log-sum-exp with the output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.attend import AttentionState, KVSegment
from model.kernels.masks import AttentionMask

Kernel = Callable[[Tensor, Tensor, Tensor], AttentionState]
"""Attention of queries (B, H, T, D) to keys and values (B or 1, H_kv, S, D) in one tile."""

FEW_QUERIES = 32
"""Up to this many, a group of query heads is folded into the query axis, so that its keys are read once."""


def sdpa(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
) -> Iterator[tuple[range, AttentionState]]:
    """PyTorch's fused kernels, called directly since the public function returns no log-sum-exp."""
    return by_tiles(queries, positions, segment, mask, full, causal_square)


def by_tiles(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask, on_full: Kernel, on_square: Kernel
) -> Iterator[tuple[range, AttentionState]]:
    """Implements a backend from one kernel for each kind of tile."""
    for tile in mask.tiles(positions, segment.positions):
        rows = range(tile.queries.start - positions.start, tile.queries.stop - positions.start)
        columns = slice(tile.keys.start - segment.start, tile.keys.stop - segment.start)
        q = _pieces(queries[:, :, rows.start : rows.stop], tile.batch)
        k, v = (x[:, :, columns] for x in (segment.keys, segment.values))
        if tile.batch > 1:
            k, v = (_pieces(x.expand(q.shape[0] // tile.batch, -1, -1, -1), tile.batch) for x in (k, v))
        yield rows, _whole(on_full(q, k, v) if tile.kind == "full" else on_square(q, k, v), tile.batch)


def _pieces(x: Tensor, batch: int) -> Tensor:
    """(B, H, batch * t, D) -> (B * batch, H, t, D); a view when B is 1."""
    return x if batch == 1 else x.unflatten(2, (batch, -1)).transpose(1, 2).flatten(0, 1)


def _whole(state: AttentionState, batch: int) -> AttentionState:
    """The inverse of `_pieces` for a result."""
    if batch == 1:
        return state
    out = state.out.transpose(1, 2).unflatten(0, (-1, batch)).flatten(1, 2).transpose(1, 2)
    return AttentionState(out, state.lse.unflatten(0, (-1, batch)).transpose(1, 2).flatten(2))


def full(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Every query sees every key, so the query heads of a group can be folded into the query axis."""
    if k.shape[0] != q.shape[0]:
        return shared_rows(full, q, k, v)
    b, h, t, d = q.shape
    h_kv = k.shape[1]
    if h == h_kv or (t > FEW_QUERIES and _groups_queries(q)):
        return _kernel(q, k, v, causal=False)
    out, lse = _kernel(q.reshape(b, h_kv, h // h_kv * t, d), k, v, causal=False)
    return AttentionState(out.reshape(b, h, t, d), lse.reshape(b, h, t))


def shared_rows(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Folds rows that share keys, all of them visible, into the query axis: many questions read a context once."""
    b, h, t, d = q.shape
    state = kernel(q.transpose(0, 1).reshape(1, h, b * t, d), k, v)
    return AttentionState(state.out.view(h, b, t, d).transpose(0, 1), state.lse.view(h, b, t).transpose(0, 1))


def causal_square(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Each query sees the keys up to its own position; there are as many keys as queries."""
    h, h_kv = q.shape[1], k.shape[1]
    if k.shape[0] != q.shape[0]:
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    if h == h_kv or _groups_queries(q):
        return _kernel(q, k, v, causal=True)
    grouped = q.unflatten(1, (h_kv, -1))  # one call per member of a group, so that keys are not repeated in memory
    states = [_kernel(grouped[:, :, g], k, v, causal=True) for g in range(h // h_kv)]
    return AttentionState(
        torch.stack([s.out for s in states], 2).flatten(1, 2), torch.stack([s.lse for s in states], 2).flatten(1, 2)
    )


def _kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> AttentionState:
    """One fused attention call with its log-sum-exp; `causal` is aligned top-left, so it is valid for squares only.

    The CPU kernel kills the process on empty inputs and returns a log-sum-exp of 0 for a fully masked row, so neither
    may occur.
    """
    assert q.shape[2] > 0 and k.shape[2] > 0, (q.shape, k.shape)
    assert not causal or q.shape[2] == k.shape[2], (q.shape, k.shape)
    aten, d = torch.ops.aten, q.shape[-1]
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return AttentionState(out, lse)
    q, k, v = (_aligned(x) for x in (q, k, v))
    if _has_flash(q):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=d**-0.5)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=d**-0.5)
    return AttentionState(out[..., :d], lse[:, :, : q.shape[2]])


def _aligned(x: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 elements a head, which kernels for GPUs want."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _has_flash(q: Tensor) -> bool:
    """Whether a GPU has flash attention for queries of this dtype."""
    return q.dtype in (torch.float16, torch.bfloat16)


def _groups_queries(q: Tensor) -> bool:
    """Whether the kernel supports grouped-query attention natively."""
    return _groups_queries_on_cpu() if q.device.type == "cpu" else _has_flash(q)


@functools.cache
def _groups_queries_on_cpu() -> bool:
    """Probed with a tiny call."""
    q = torch.linspace(-1, 1, 4 * 8).view(1, 4, 1, 8)
    k = torch.linspace(-1, 1, 2 * 3 * 8).view(1, 2, 3, 8).sin()
    try:
        out, _ = _kernel(q, k, k, causal=False)
    except RuntimeError:
        return False
    repeated = k.repeat_interleave(2, 1)
    return torch.allclose(out, _kernel(q, repeated, repeated, causal=False).out, atol=1e-5)
