"""Attention by plain matrix products, for processors whose 16-bit products are much faster than the fused kernels.

A tile is processed in blocks of scores that stay in the processor's caches: one product, an in-place exponential, row
sums, one product. The offset that the softmax subtracts is chosen once per query from a sample of the keys, and is
subtracted inside the product through two extra elements per head. So the scores that carry weight are near 0, where 16
bits are precise, and no pass over the scores is needed to find a maximum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model.kernels.attend import AttentionState, KVSegment, merge
from model.kernels.masks import AttentionMask
from model.kernels.sdpa import by_tiles, causal_square, full, shared_rows

KEY_BLOCK = 1024
"""Keys per block of scores."""

QUERY_BLOCK = 1024
"""Queries per block of scores and thread: with KEY_BLOCK keys 2 MiB in 16 bits."""

DIAGONAL = 512
"""Side of the squares on the diagonal, half of which is wasted work; divides KEY_BLOCK."""

FEWEST_QUERIES = 512
"""With fewer queries per key head, the fused kernels are as fast."""

SAMPLED_KEYS = 64

LARGEST_SUM = 2.0**24
"""Limit on a query's sum of weights: above it the sample was unrepresentative, scores are far from 0, and the fused
kernels are the fallback."""

LOG2_E = math.log2(math.e)


def matmul(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
) -> Iterator[tuple[range, AttentionState]]:
    """Matrix products for large tiles, the fused kernels for small ones."""
    return by_tiles(queries, positions, segment, mask, _rectangle, _square)


def _rectangle(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Every query sees every key. Keys after the last whole block go to the fused kernel: fewer product shapes."""
    if k.shape[0] != q.shape[0]:
        return shared_rows(_rectangle, q, k, v)
    b, h, t, _ = q.shape
    h_kv, whole = k.shape[1], k.shape[2] // KEY_BLOCK * KEY_BLOCK
    if not _is_worth_it(q, h // h_kv * t) or whole == 0:
        return full(q, k, v)
    products, state = _Products(k[:, :, :whole], v[:, :, :whole]), _empty_state(q)
    grouped, out, lse = (x.reshape(b, h_kv, h // h_kv * t, *x.shape[3:]) for x in (q, *state))
    for row, head in itertools.product(range(b), range(h_kv)):
        for here in _cut(h // h_kv * t, products.most_queries):
            part = products.attend(row, head, grouped[row, head, here], whole)
            out[row, head, here], lse[row, head, here] = part
    return state if whole == k.shape[2] else merge(state, full(q, k[:, :, whole:], v[:, :, whole:]))


def _square(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Each query sees the keys up to its own position. The first and the last few queries go to the fused kernel."""
    b, h, t, d = q.shape
    h_kv, whole = k.shape[1], t // DIAGONAL * DIAGONAL
    if not _is_worth_it(q, h // h_kv * DIAGONAL) or whole < 2 * DIAGONAL:
        return causal_square(q, k, v)
    k, v = (x.expand(b, -1, -1, -1) for x in (k, v))
    first, rest = slice(0, DIAGONAL), slice(whole, t)
    state = _empty_state(q)
    state.out[:, :, first], state.lse[:, :, first] = causal_square(*(x[:, :, first] for x in (q, k, v)))
    if whole < t:
        newest = causal_square(*(x[:, :, rest] for x in (q, k, v)))
        older = _rectangle(q[:, :, rest], k[:, :, :whole], v[:, :, :whole])
        state.out[:, :, rest], state.lse[:, :, rest] = merge(older, newest)
    products = _Products(k[:, :, :whole], v[:, :, :whole])
    grouped, out, lse = (x.unflatten(1, (h_kv, -1)) for x in (q, *state))
    groups = list(_cut(h // h_kv, max(1, products.most_queries // DIAGONAL)))
    for row, head, start, group in itertools.product(range(b), range(h_kv), range(DIAGONAL, whole, DIAGONAL), groups):
        here = (row, head, group, slice(start, start + DIAGONAL))
        part = products.attend(row, head, grouped[here].reshape(-1, d), start + DIAGONAL, is_causal=True)
        out[here], lse[here] = (x.unflatten(0, (-1, DIAGONAL)) for x in part)
    return state


def _is_worth_it(q: Tensor, queries: int) -> bool:
    """Whether products pay off, given the `queries` per key head. Sums of weights would overflow float16."""
    return q.device.type == "cpu" and q.dtype != torch.float16 and queries >= FEWEST_QUERIES


class _Products:
    """Attention to one tile's keys and values (B, H_kv, S, D), reusing one buffer of scores."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.keys = torch.cat([k, k.new_ones(1).expand(*k.shape[:3], 2)], -1)
        self.values = v
        self.most_queries = QUERY_BLOCK * torch.get_num_threads()
        self._scores = k.new_empty(self.most_queries * KEY_BLOCK)
        self._scale = k.shape[-1] ** -0.5

    def attend(self, row: int, head: int, q: Tensor, stop: int, *, is_causal: bool = False) -> AttentionState:
        """Attention of queries (N, D) to the first `stop` keys of one head: out (N, D) and lse (N,) in float32.

        If causal, the queries are the newest DIAGONAL positions of some heads: the i-th sees the newest DIAGONAL keys
        up to the i-th, and all keys before those.
        """
        keys, values = self.keys[row, head, :stop], self.values[row, head, :stop]
        seen_by_all = stop - DIAGONAL * is_causal
        levelled, level = self._levelled(q, keys[: seen_by_all : max(1, seen_by_all // SAMPLED_KEYS), : q.shape[1]])
        out, total, product = torch.zeros(q.shape), torch.zeros(len(q)), torch.empty_like(q)
        for block in _cut(stop, KEY_BLOCK):
            weights = self._scores[: len(q) * (block.stop - block.start)].view(len(q), -1)
            torch.addmm(weights, levelled, keys[block].t(), beta=0, alpha=self._scale * LOG2_E, out=weights)
            weights.exp2_()
            if is_causal and block.stop == stop:
                weights[:, -DIAGONAL:].unflatten(0, (-1, DIAGONAL)).tril_()
            total += weights.sum(1)
            out += torch.mm(weights, values[block], out=product)
        if bool((total < LARGEST_SUM).all()):
            return AttentionState(out.div_(total[:, None]), total.log_().add_(level))
        return _fused(q, keys[:, : q.shape[1]], values, is_causal)

    def _levelled(self, q: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (N, D + 2) whose last two elements, times the keys' ones, subtract a level per query; and the levels.

        The levels (N,) are near the scores of the keys that carry the weight: for normally distributed scores, the mean
        plus the variance, capped at the sample's maximum so that an odd sample cannot underflow all weights.
        """
        scores = (q @ sample.t()).float()
        largest, mean = scores.amax(1), scores.mean(1)
        variance = scores.square_().mean(1) - mean.square()
        level = torch.minimum(mean + variance * self._scale, largest)  # before scaling
        coarse = level.to(q.dtype)
        fine = (level - coarse).to(q.dtype)
        levelled = torch.cat([q, -coarse[:, None], -fine[:, None]], 1)
        return levelled, (coarse.float() + fine.float()) * self._scale


def _fused(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> AttentionState:
    """The fallback of `_Products.attend`, with the fused kernels."""
    if not is_causal:
        state = full(q[None, None], k[None, None], v[None, None])
        return AttentionState(state.out[0, 0].float(), state.lse[0, 0])
    q, k, v = q.view(1, -1, DIAGONAL, q.shape[1]), k[None, None], v[None, None]
    newest = causal_square(q, k[:, :, -DIAGONAL:], v[:, :, -DIAGONAL:])
    state = merge(full(q, k[:, :, :-DIAGONAL], v[:, :, :-DIAGONAL]), newest)
    return AttentionState(state.out[0].flatten(0, 1), state.lse[0].flatten())


def _empty_state(q: Tensor) -> AttentionState:
    return AttentionState(torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:3], dtype=torch.float32))


def _cut(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
