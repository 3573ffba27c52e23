"""Attention over segments of keys and values, and the merging of partial results by their log-sum-exp.

A backend computes the attention of some queries to one segment; `attend` walks the segments, computes where their
keys are, and merges in float32 on the queries' device. Softmax attention over disjoint sets of keys is exact under
merging (https://arxiv.org/abs/2205.14135, section 3). Knows nothing of layers, rotary embedding or caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.masks import AttentionMask


class KVSegment(NamedTuple):
    """Consecutive keys and values (B or 1, H_kv, S, D) in the compute dtype, on the device where they are attended."""

    keys: Tensor
    values: Tensor
    start: int  # absolute position of keys[:, :, 0]

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.keys.shape[2])


class AttentionState(NamedTuple):
    """Attention over some of the keys: output (B, H, T, D) and log of the softmax's denominator (B, H, T), float32."""

    out: Tensor
    lse: Tensor


# (queries (B, H, T, D), their positions, segment, mask) -> states for parts of the queries, given as offsets into T
Backend = Callable[[Tensor, range, KVSegment, AttentionMask], Iterator[tuple[range, AttentionState]]]


def attend(queries: Tensor, positions: range, segments: Iterable[KVSegment], mask: AttentionMask,
           backend: Backend) -> Tensor:
    """Attention of `queries` (B, H, T, D) at `positions` to all segments: (B, H, T, D), the queries' dtype.

    The segments together must hold at least one visible key for each query.
    """
    b, h, t, d = queries.shape
    assert len(positions) == t, (positions, queries.shape)
    total: AttentionState | None = None
    for segment in segments:
        local = queries.to(segment.keys.device)
        for rows, part in backend(local, positions, segment, mask):
            part = AttentionState(part.out.to(queries.device), part.lse.to(queries.device))
            if total is None and len(rows) == t:
                total = part
                continue
            if total is None:  # laid out as (B, T, H, D), which is what the output projection reads
                out = torch.zeros(b, t, h, d, dtype=torch.float32, device=queries.device).transpose(1, 2)
                total = AttentionState(out, torch.full((b, h, t), -torch.inf, device=queries.device))
            total = _merge_rows(total, rows, part)
    assert total is not None, "no key is visible"
    return total.out.to(queries.dtype)


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys, in float32. An empty set has lse -inf and output 0."""
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)  # both sets can be empty for a query
    weight = (a.lse - finite).exp_()[..., None], (b.lse - finite).exp_()[..., None]
    return AttentionState(a.out * weight[0] + b.out * weight[1], lse)


def _merge_rows(total: AttentionState, rows: range, part: AttentionState) -> AttentionState:
    if len(rows) == total.lse.shape[2]:
        return merge(total, part)
    if total.out.dtype != torch.float32:  # a kernel's own output, now to be written into
        total = AttentionState(total.out.float(), total.lse)
    here = slice(rows.start, rows.stop)
    merged = merge(AttentionState(total.out[:, :, here], total.lse[:, :, here]), part)
    total.out[:, :, here] = merged.out
    total.lse[:, :, here] = merged.lse
    return total


def eager(queries: Tensor, positions: range, segment: KVSegment,
          mask: AttentionMask) -> Iterator[tuple[range, AttentionState]]:
    """The reference: scores of T x S elements in float32, masked by the predicate alone."""
    b, h, t, d = queries.shape
    _, h_kv, s, _ = segment.keys.shape
    keys, values = segment.keys.float(), segment.values.float()
    grouped = queries.float().reshape(b, h_kv, h // h_kv * t, d)
    scores = (grouped @ keys.transpose(-1, -2) * d**-0.5).view(b, h, t, s)
    q_idx = torch.arange(positions.start, positions.stop, device=keys.device)[:, None]
    kv_idx = torch.arange(segment.start, segment.start + s, device=keys.device)
    scores.masked_fill_(~mask.mask_mod(0, 0, q_idx, kv_idx), -torch.inf)
    lse = scores.logsumexp(-1)  # -inf for a query that sees nothing here
    weights = (scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
    out = (weights.view(b, h_kv, h // h_kv * t, s) @ values).view(b, h, t, d)
    yield range(t), AttentionState(out, lse)


def sdpa(queries: Tensor, positions: range, segment: KVSegment,
         mask: AttentionMask) -> Iterator[tuple[range, AttentionState]]:
    """PyTorch's fused kernels, called tile by tile for their log-sum-exp."""
    for tile in mask.tiles(positions, segment.positions):
        rows = range(tile.queries.start - positions.start, tile.queries.stop - positions.start)
        columns = slice(tile.keys.start - segment.start, tile.keys.stop - segment.start)
        q = _pieces(queries[:, :, rows.start:rows.stop], tile.batch)
        k, v = (x[:, :, columns] for x in (segment.keys, segment.values))
        if tile.batch > 1:
            k, v = (_pieces(x.expand(q.shape[0] // tile.batch, -1, -1, -1), tile.batch) for x in (k, v))
        state = _full(q, k, v) if tile.kind == "full" else _causal_square(q, k, v)
        yield rows, _whole(state, tile.batch)


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "eager": eager}


def _pieces(x: Tensor, batch: int) -> Tensor:
    """(B, H, batch * t, D) -> (B * batch, H, t, D); a view when B is 1."""
    return x if batch == 1 else x.unflatten(2, (batch, -1)).transpose(1, 2).flatten(0, 1)


def _whole(state: AttentionState, batch: int) -> AttentionState:
    """The inverse of `_pieces` for a result."""
    if batch == 1:
        return state
    out = state.out.transpose(1, 2).unflatten(0, (-1, batch)).flatten(1, 2).transpose(1, 2)
    return AttentionState(out, state.lse.unflatten(0, (-1, batch)).transpose(1, 2).flatten(2))


def _full(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Every query sees every key, so query heads of a group, and rows that share keys, are further queries."""
    b, h, t, d = q.shape
    rows, h_kv = k.shape[:2]
    if rows == 1 and b > 1:  # many questions read one context once
        state = _full(q.transpose(0, 1).reshape(1, h, b * t, d), k, v)
        return AttentionState(state.out.view(h, b, t, d).transpose(0, 1), state.lse.view(h, b, t).transpose(0, 1))
    if h == h_kv or (t > 32 and _groups_queries(q.device.type)):
        return _kernel(q, k, v, causal=False)
    out, lse = _kernel(q.reshape(b, h_kv, h // h_kv * t, d), k, v, causal=False)
    return AttentionState(out.reshape(b, h, t, d), lse.reshape(b, h, t))


def _causal_square(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    h, h_kv = q.shape[1], k.shape[1]
    if k.shape[0] != q.shape[0]:
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    if h == h_kv or _groups_queries(q.device.type):
        return _kernel(q, k, v, causal=True)
    grouped = q.unflatten(1, (h_kv, -1))  # one call for each member of the groups: keys are not repeated in memory
    states = [_kernel(grouped[:, :, g], k, v, causal=True) for g in range(h // h_kv)]
    return AttentionState(torch.stack([s.out for s in states], 2).flatten(1, 2),
                          torch.stack([s.lse for s in states], 2).flatten(1, 2))


def _kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> AttentionState:
    """One fused attention that returns its log-sum-exp; `causal` is aligned top-left, hence for squares only.

    The CPU kernel kills the process on empty inputs and returns a log-sum-exp of 0 for a masked row, so neither may
    occur. The branch for accelerators has not been run on one yet.
    """
    assert q.shape[2] > 0 and k.shape[2] > 0, (q.shape, k.shape)
    assert not causal or q.shape[2] == k.shape[2], (q.shape, k.shape)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return AttentionState(out, lse[:, :, :q.shape[2]])


@functools.cache
def _groups_queries(device_type: str) -> bool:
    """Whether the kernel itself takes fewer key heads than query heads, found out by a tiny call."""
    if device_type != "cpu":
        return False
    q = torch.linspace(-1, 1, 4 * 8).view(1, 4, 1, 8)
    k = torch.linspace(-1, 1, 2 * 3 * 8).view(1, 2, 3, 8).sin()
    try:
        out, _ = _kernel(q, k, k, causal=False)
    except RuntimeError:
        return False
    repeated = k.repeat_interleave(2, 1)
    return torch.allclose(out, _kernel(q, repeated, repeated, causal=False).out, atol=1e-5)
