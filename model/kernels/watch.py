"""Which keys a few queries attend to, from log-sum-exps that attention computes anyway.

A kernel tells the log-sum-exp of each range of keys. Only in ranges that hold a considerable share of a query's
attention are the scores of single keys computed again, while they are at hand: attention is not computed twice. Knows
positions and no documents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HEAVY_RANGE = 0.2
"""Share of a head's attention so far from which on a range's keys are looked at."""

MOST_RANGES = 6
"""Ranges looked at for a query in one call, the heaviest ones."""

FEW = 8
"""Queries that are all compared with a range that one of them attends to."""

LEAST_SHARE = 0.02
"""Of a head's attention: keys with less are not told."""


class Looked(NamedTuple):
    """What one query's heads attend to in one layer: entries of head, position and share of that head's attention.

    `heads`, `positions` and `shares` are (N,). What is missing of each head's whole is spread
    thinly, or lies outside the observed positions.
    """

    heads: Tensor
    positions: Tensor
    shares: Tensor  # float32


class Observer(Protocol):
    """Is told what the queries of one sequence attend to."""

    @property
    def within(self) -> range:
        """Positions of the keys that it wants to know of."""
        ...

    def observe(self, layer: int, position: int, looked: Looked) -> None:
        """Of the query at this position; told again if a draft there was taken back."""
        ...


class Keys(Protocol):
    """The keys (1, H_kv, S, D) of a segment as they are stored, codes with scales (1, H_kv, groups of tokens, D)."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def key_scales(self) -> Tensor | None: ...
    @property
    def positions(self) -> range: ...


class Found(NamedTuple):
    """Scores of single keys, tensors (N,): the number of the query, the head, the position of the key, the score."""

    queries: Tensor
    heads: Tensor
    positions: Tensor
    scores: Tensor

    def split(self, counts: Sequence[int]) -> list[Found]:
        """Those of so many queries each, which are counted from the first of them."""
        order = self.queries.argsort(stable=True)
        sorted_ = [x[order] for x in self]
        stops = torch.tensor(list(itertools.accumulate(counts)))
        ends = torch.searchsorted(sorted_[0], stops).tolist()
        found = list[Found]()
        for count, stop, start, end in zip(counts, stops.tolist(), [0, *ends], ends, strict=False):
            queries, heads, positions, scores = (x[start:end] for x in sorted_)
            found.append(Found(queries - (stop - count), heads, positions, scores))
        return found


class Watch:
    """Follows one attention of queries (1, H, T, D) at `positions` to segments that come one after the other."""

    def __init__(self, queries: Tensor, positions: range, within: range) -> None:
        _, heads, tokens, head_dim = queries.shape
        self._queries = queries[0].float() * head_dim**-0.5  # (H, T, D)
        self._positions, self._within = positions, within
        self._total = torch.full((heads, tokens), -torch.inf)  # log-sum-exp of what was seen
        self._looked: set[tuple[int, int]] = set()  # first keys of ranges, and the first of the queries
        self._found: list[Found] = []

    def saw(self, rows: range, segments: Sequence[Keys], keys_each: int, lse: Tensor) -> None:
        """Segments that are valid now; `lse` (H, len(rows), R) of their ranges of `keys_each` keys, as many of each
        segment; those past a segment's end are -inf."""
        here, lse = slice(rows.start, rows.stop), lse.float().cpu()
        self._total[:, here] = torch.logaddexp(self._total[:, here], lse.logsumexp(-1))
        known = self._total[:, here, None].clamp(min=torch.finfo(torch.float32).min)
        shares = (lse - known).exp_().amax(0)  # (T, R): of the head that has the largest
        heaviest = shares.topk(min(MOST_RANGES, shares.shape[1]))
        wanted: dict[int, list[int]] = {}
        for row, share, numbers in zip(rows, heaviest.values.tolist(), heaviest.indices.tolist(), strict=True):
            for number, one in zip(numbers, share, strict=True):
                if one > HEAVY_RANGE:
                    wanted.setdefault(number, []).append(row)
        each = lse.shape[2] // len(segments)
        looks: dict[tuple[int, ...], list[_Range]] = {}
        for number, queries in wanted.items():
            segment, first = segments[number // each], number % each * keys_each
            start = segment.positions.start + first
            keys = _common(range(start, min(start + keys_each, segment.positions.stop)), self._within)
            if keys and (start, rows.start) not in self._looked:
                self._looked.add((start, rows.start))
                looks.setdefault(tuple(rows if len(rows) <= FEW else queries), []).append(_Range(segment, keys))
        for some, ranges in looks.items():
            self._look(list(some), ranges)

    @property
    def found(self) -> Found:
        nothing = torch.empty(0, dtype=torch.int64)
        return _together(self._found or [Found(nothing, nothing, nothing, torch.empty(0))])

    def _look(self, rows: list[int], ranges: Sequence[_Range]) -> None:
        """Scores of these queries with all keys of some ranges."""
        ranges = list(_joined(ranges))
        is_all = len(rows) == len(self._positions)
        queries = self._queries if is_all else self._queries[:, rows]
        scores = torch.cat([_scores(queries, one) for one in ranges], 2)
        keys = torch.cat([torch.arange(one.keys.start, one.keys.stop) for one in ranges])
        if max(one.keys.stop for one in ranges) > self._positions[rows[0]] + 1:
            at = torch.tensor([self._positions[row] for row in rows])
            scores.masked_fill_(keys > at[:, None], -torch.inf)
        total = self._total if is_all else self._total[:, rows]
        head, query, key = (scores > total[:, :, None] + math.log(LEAST_SHARE)).nonzero(as_tuple=True)
        self._found.append(Found(torch.tensor(rows)[query], head, keys[key], scores[head, query, key]))


class _Range(NamedTuple):
    """Keys of a segment at these positions."""

    segment: Keys
    keys: range


def _joined(ranges: Iterable[_Range]) -> Iterator[_Range]:
    """Ranges that follow each other in a segment as one."""
    last: _Range | None = None
    for one in sorted(ranges, key=lambda one: one.keys.start):
        if last is not None and last.segment is one.segment and last.keys.stop == one.keys.start:
            last = _Range(last.segment, range(last.keys.start, one.keys.stop))
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _scores(queries: Tensor, some: _Range) -> Tensor:
    """Of queries (H, T, D) with a range's keys, (H, T, keys), on the host."""
    first = some.segment.positions.start
    k = _plain_keys(some.segment, some.keys.start - first, some.keys.stop - first)
    heads, tokens, head_dim = queries.shape
    q = queries.to(k.device).reshape(k.shape[0], -1, head_dim)
    return torch.matmul(q, k.transpose(1, 2)).view(heads, tokens, -1).cpu()


def _plain_keys(segment: Keys, first: int, stop: int) -> Tensor:
    """Keys of a segment in float32, (H_kv, stop - first, D)."""
    keys, scales = segment.keys[0, :, first:stop].float(), segment.key_scales
    if scales is None:
        return keys
    group = segment.keys.shape[2] // scales.shape[2]
    return keys * scales[0, :, torch.arange(first, stop, device=scales.device) // group]


def _together(parts: Iterable[Found]) -> Found:
    queries, heads, positions, scores = (torch.cat(some) for some in zip(*parts, strict=True))
    return Found(queries, heads, positions, scores)


def tell(observer: Observer, layer: int, positions: range, lse: Tensor, found: Sequence[Found]) -> None:
    """Tells what the queries at these positions attend to, given the log-sum-exp (H, T) of all their scores."""
    every = found[0] if len(found) == 1 else _together(found)
    shares = (every.scores - lse.float().cpu()[every.heads, every.queries]).exp_()
    told = shares > LEAST_SHARE
    for number, position in enumerate(positions):
        kept = told if len(positions) == 1 else told & (every.queries == number)
        observer.observe(layer, position, Looked(every.heads[kept], every.positions[kept], shares[kept]))
