"""Attention over segments of keys and values, merging partial results by log-sum-exp.

A backend computes attention to one segment; `attend` loops over the segments, computes on the device where each one's
keys are, and merges in float32 on the queries' device. Merging softmax attention over disjoint sets of keys is exact
(https://arxiv.org/abs/2205.14135, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.masks import AttentionMask


class KVSegment(NamedTuple):
    """Consecutive keys and values (B or 1, H_kv, S, D) in the compute dtype, on the device that attends to them."""

    keys: Tensor
    values: Tensor
    start: int  # absolute position of keys[:, :, 0]

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.keys.shape[2])


class AttentionState(NamedTuple):
    """Attention over a subset of the keys: output (B, H, T, D) and log-sum-exp of the scores (B, H, T) in float32."""

    out: Tensor
    lse: Tensor


# (queries (B, H, T, D), their positions, segment, mask) -> states, each for a range of query indices into T
Backend = Callable[[Tensor, range, KVSegment, AttentionMask], Iterator[tuple[range, AttentionState]]]


def attend(
    queries: Tensor, positions: range, segments: Iterable[KVSegment], mask: AttentionMask, backend: Backend
) -> Tensor:
    """Attention of `queries` (B, H, T, D) at `positions` over all segments: (B, H, T, D) in the queries' dtype.

    Every query must see at least one key in some segment.
    """
    return attention_state(queries, positions, segments, mask, backend).out.to(queries.dtype)


def attention_state(
    queries: Tensor, positions: range, segments: Iterable[KVSegment], mask: AttentionMask, backend: Backend
) -> AttentionState:
    """What `attend` computes before it is rounded: to be merged with attention over other keys."""
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
    return total


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys, in float32. No visible key means lse -inf and output 0."""
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)  # avoids NaN where a query sees no key in either set
    weight = (a.lse - finite).exp_()[..., None], (b.lse - finite).exp_()[..., None]
    return AttentionState(a.out * weight[0] + b.out * weight[1], lse)


def _merge_rows(total: AttentionState, rows: range, part: AttentionState) -> AttentionState:
    if len(rows) == total.lse.shape[2]:
        return merge(total, part)
    if total.out.dtype != torch.float32:  # a kernel's own output, about to be written in place
        total = AttentionState(total.out.float(), total.lse)
    here = slice(rows.start, rows.stop)
    merged = merge(AttentionState(total.out[:, :, here], total.lse[:, :, here]), part)
    total.out[:, :, here] = merged.out
    total.lse[:, :, here] = merged.lse
    return total
