"""The reference attention backend: the textbook formula in float32, with the full mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.kernels.attend import AttentionState, KVSegment, comparison
from model.kernels.masks import AttentionMask


@comparison
def eager(
    queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
) -> Iterator[tuple[range, AttentionState]]:
    """Materialises T x S scores in float32, masked by the predicate alone."""
    b, h, t, d = queries.shape
    _, h_kv, s, _ = segment.keys.shape
    keys, values = segment.keys.float(), segment.values.float()
    grouped = queries.float().reshape(b, h_kv, h // h_kv * t, d)
    scores = (grouped @ keys.transpose(-1, -2) * d**-0.5).view(b, h, t, s)
    q_idx = torch.arange(positions.start, positions.stop, device=keys.device)[:, None]
    kv_idx = torch.arange(segment.start, segment.start + s, device=keys.device)
    scores.masked_fill_(~mask.mask_mod(0, 0, q_idx, kv_idx), -torch.inf)
    lse = scores.logsumexp(-1)  # -inf for a query that sees no key in this segment
    weights = (scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
    out = (weights.view(b, h_kv, h // h_kv * t, s) @ values).view(b, h, t, d)
    yield range(t), AttentionState(out, lse)
