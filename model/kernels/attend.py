"""Attention over segments of keys and values, merging partial results by log-sum-exp.

A backend computes attention to one segment; `attend` loops over the segments, computes on the device where each one's
keys are, and merges in float32 on the queries' device. Merging softmax attention over disjoint sets of keys is exact
(https://arxiv.org/abs/2205.14135, section 3). For few queries on a CPU, vector code reads segments as they are stored,
all that lie in memory in one call; a backend that serves as a comparison does without. Up to FEW_ROWS tokens get what
each would get alone, to the last bit, so that a draft is verified by the numbers of single steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model.gpu.available import has_triton
from model.kernels.masks import AttentionMask
from model.kernels.watch import Watch
from model.simd.attending import FewQueries, first_of_few, is_readable, record
from model.simd.products import FEW_ROWS


@dataclass(frozen=True, eq=False)
class KVSegment:
    """Consecutive keys and values (B or 1, H_kv, S, D), on the device that attends to them.

    They are in the compute dtype, or with `unpack` as they are stored: codes then have float32 scales, of keys (B or 1,
    H_kv, groups of tokens, D) and of values (B or 1, H_kv, S, 1). `stays`: valid until the forward ends, not only until
    the next segment is requested.
    """

    keys: Tensor
    values: Tensor
    start: int  # absolute position of keys[:, :, 0]
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    unpack: Callable[[], tuple[Tensor, Tensor]] | None = None
    stays: bool = False

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.keys.shape[2])

    @property
    def plain(self) -> KVSegment:
        """The segment in the compute dtype, valid until the next one is asked for."""
        return self if self.unpack is None else KVSegment(*self.unpack(), self.start)

    @cached_property
    def record(self) -> bytes:
        return record(self)

    def since(self, first: int) -> KVSegment:
        """The keys from position `first` on, of a segment without scales."""
        return self.within(range(first, self.positions.stop))

    def within(self, positions: range) -> KVSegment:
        """The keys at these positions, of a segment without scales."""
        first, stop = max(positions.start, self.start), min(positions.stop, self.positions.stop)
        if range(first, stop) == self.positions:
            return self
        assert self.unpack is None, "stored in a form of its own"
        here = slice(first - self.start, stop - self.start)
        return KVSegment(self.keys[:, :, here], self.values[:, :, here], first, stays=self.stays)


class AttentionState(NamedTuple):
    """Attention over a subset of the keys: output (B, H, T, D) and log-sum-exp of the scores (B, H, T) in float32."""

    out: Tensor
    lse: Tensor


# (queries (B, H, T, D), their positions, segment, mask) -> states, each for a range of query indices into T
Backend = Callable[[Tensor, range, KVSegment, AttentionMask], Iterator[tuple[range, AttentionState]]]

_COMPARISONS: set[Backend] = set()


def comparison(backend: Backend) -> Backend:
    """Marks a backend that computes everything by itself, so that the others can be compared with it."""
    _COMPARISONS.add(backend)
    return backend


def attend(
    queries: Tensor, positions: range, segments: Iterable[KVSegment], mask: AttentionMask, backend: Backend
) -> Tensor:
    """Attention of `queries` (B, H, T, D) at `positions` over all segments: (B, H, T, D) in the queries' dtype.

    Every query must see at least one key in some segment.
    """
    return attention_state(queries, positions, segments, mask, backend).out.to(queries.dtype)


def attention_state(
    queries: Tensor,
    positions: range,
    segments: Iterable[KVSegment],
    mask: AttentionMask,
    backend: Backend,
    watch: Watch | None = None,
) -> AttentionState:
    """What `attend` computes before it is rounded: to be merged with attention over other keys. `watch` sees how it is
    spread over the segments."""
    b, h, t, d = queries.shape
    assert len(positions) == t, (positions, queries.shape)
    total: AttentionState | None = None
    for rows, part in _states(queries, positions, segments, mask, backend, watch):
        if part.out.device != queries.device:
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


def _states(
    queries: Tensor,
    positions: range,
    segments: Iterable[KVSegment],
    mask: AttentionMask,
    backend: Backend,
    watch: Watch | None,
) -> Iterator[tuple[range, AttentionState]]:
    """For ranges of query indices: attention to each segment, or to all those that vector code reads."""
    first_seen = None if backend in _COMPARISONS else mask.first_seen(positions)
    few: FewQueries | None = None
    tokens = len(positions)
    first_few: int | None = None if first_seen is not None else tokens
    for segment in segments:
        rows, heads = segment.keys.shape[:2]
        if first_few is None:
            first_few = first_of_few(queries, positions.start, heads)
        others = first_few if is_readable(segment) else tokens
        if others:
            for seen, part in _by_backend(queries[:, :, :others], positions[:others], segment.plain, mask, backend):
                if watch is not None:
                    watch.saw(seen, [segment], len(segment.positions), part.lse[0, :, :, None])
                yield seen, part
        if others == tokens or first_seen is None:
            continue
        if segment.positions.stop <= first_seen or segment.start >= positions.stop:
            continue
        if few is not None and few.key_rows != rows:
            yield range(first_few, tokens), AttentionState(*few.finish())
            few = None
        if few is None:
            few = FewQueries(queries[:, :, first_few:].cpu(), positions[first_few], rows, heads)
            if watch is not None:
                few.told = functools.partial(watch.saw, range(first_few, tokens))
        few.add(segment.since(first_seen))
        if not segment.stays:
            few.flush()
    if few is not None:
        assert first_few is not None
        yield range(first_few, tokens), AttentionState(*few.finish())


def _by_backend(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask, backend: Backend
) -> Iterator[tuple[range, AttentionState]]:
    """On a CPU few queries one by one: how fused kernels round depends on how many there are."""
    queries = queries.to(segment.keys.device)
    if queries.device.type != "cpu" or backend in _COMPARISONS or len(positions) > FEW_ROWS:
        yield from backend(queries, positions, segment, mask)
        return
    for number in range(len(positions)):
        for _, part in backend(queries[:, :, number : number + 1], positions[number : number + 1], segment, mask):
            yield range(number, number + 1), part


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys, in float32. No visible key means lse -inf and output 0."""
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)  # avoids NaN where a query sees no key in either set
    weight = (a.lse - finite).exp_()[..., None], (b.lse - finite).exp_()[..., None]
    return AttentionState(a.out * weight[0] + b.out * weight[1], lse)


def _merge_rows(total: AttentionState, rows: range, part: AttentionState) -> AttentionState:
    is_in_place = total.lse.device.type == "cuda" and has_triton(total.lse.device)
    if len(rows) == total.lse.shape[2] and not is_in_place:
        return merge(total, part)
    if total.out.dtype != torch.float32:  # a kernel's own output, about to be written in place
        total = AttentionState(total.out.float(), total.lse)
    here = slice(rows.start, rows.stop)
    if is_in_place:
        from model.gpu.merging import merge_into  # here: Triton comes with builds of torch for GPUs only

        merge_into(total.out[:, :, here], total.lse[:, :, here], *part)
        return total
    merged = merge(AttentionState(total.out[:, :, here], total.lse[:, :, here]), part)
    total.out[:, :, here] = merged.out
    total.lse[:, :, here] = merged.lse
    return total
