"""One layer's self-attention: projections, rotary embedding, QK norm, temperature tuning; and the KV cache interface.

Attention has no branch on the kind of cache: the cache stores what `append` is given, and `segments` yields what the
queries may attend to, wherever it was kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TextConfig
from model.kernels.attend import Backend, KVSegment, attend
from model.kernels.masks import AttentionMask
from model.layers import Linear, in_pieces
from model.rope import phases, rotate


class KVCache(Protocol):
    """The interface that the model needs from a KV cache. All rows of a batch share one offset; there is no padding."""

    offset: int
    """Number of committed tokens, which is the absolute position of the first token of this forward."""

    length: int
    """The most tokens that the run will hold; rope_type longrope chooses its table by it."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, H_kv, T, D) of the new tokens at `offset`; visible to `segments` immediately."""

    def segments(self, layer: int, queries: range) -> Iterable[KVSegment]:
        """Yields what queries at these absolute positions may need, oldest first.

        A segment is valid until the next one is requested.
        """
        ...

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens in all layers."""


class Step(NamedTuple):
    """What is the same for all layers in one forward."""

    positions: range  # absolute positions of the new tokens
    rotation: Tensor  # (T, D // 2) complex64, for RoPE layers
    temperature: Tensor | None  # (T,) float32, for NoPE layers
    backend: Backend
    cache: KVCache | None

    @classmethod
    def at(
        cls, config: TextConfig, positions: range, backend: Backend, cache: KVCache | None, device: torch.device
    ) -> Step:
        length = max(positions.stop, cache.length) if cache is not None else positions.stop
        rotation = phases(config, positions.start, positions.stop, length, device)
        return cls(positions, rotation, query_temperature(config, positions, device), backend, cache)


def query_temperature(config: TextConfig, positions: range, device: torch.device) -> Tensor | None:
    """Scale of NoPE queries by absolute position, (T,) float32: 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).

    None when the checkpoint does not use it. Source: https://arxiv.org/abs/2501.19399.
    """
    if not config.attn_temperature_tuning:
        return None
    position = torch.arange(positions.start, positions.stop, device=device)
    return torch.log1p(((position + 1) // config.floor_scale).float()) * config.attn_scale + 1


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.uses_rope = config.uses_rope(layer)
        self.qk_norm_eps = config.rms_norm_eps if config.use_qk_norm and self.uses_rope else None
        self.mask = AttentionMask(config.attention_chunk_size if self.uses_rope else None)
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * d, c, bias=bias)

    def forward(self, x: Tensor, step: Step, queries: range) -> Tensor | None:
        """x (B, T, C) -> attention output for the positions `queries`, (B, len(queries), C); None if there are none."""
        keys = self._rotated(self._heads(self.k_proj(x)), step.rotation).transpose(1, 2)
        values = self._heads(self.v_proj(x)).transpose(1, 2)
        if step.cache is not None:
            step.cache.append(self.layer, keys, values)
        if not queries:
            return None
        rows = slice(queries.start - step.positions.start, queries.stop - step.positions.start)
        q = self._rotated(self._heads(self.q_proj(x[:, rows])), step.rotation[rows])
        if not self.uses_rope and step.temperature is not None:
            temperature = step.temperature[rows, None, None]
            q = in_pieces(q, lambda piece, here: (piece * temperature[here]).to(piece.dtype))
        segments: Iterable[KVSegment] = [KVSegment(keys, values, step.positions.start)]
        if step.cache is not None:
            segments = step.cache.segments(self.layer, queries)
        out = attend(q.transpose(1, 2), queries, segments, self.mask, step.backend)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)

    def _rotated(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Applies rotary embedding to x (B, T, H, D), then QK norm over each head. In RoPE layers only."""
        if not self.uses_rope and self.qk_norm_eps is None:
            return x
        return in_pieces(x, lambda piece, here: self._rotated_piece(piece, rotation[here]))

    def _rotated_piece(self, x: Tensor, rotation: Tensor) -> Tensor:
        if self.uses_rope:
            x = rotate(x, rotation)
        return x if self.qk_norm_eps is None else F.rms_norm(x, (self.head_dim,), None, self.qk_norm_eps)
