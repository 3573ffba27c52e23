"""Tools that break our model on purpose, by patching wrong code into its parts. Used by test_mutations.py.

Each function returns a mutation, which a test applies through pytest's monkeypatch. Given correct code instead, the
same tools must change nothing; tests check that too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.attention
import model.moe
import model.rope
import model.transformer
from model.attention import Attention
from model.config import TextConfig
from model.kernels.masks import AttentionMask
from model.moe import MLP, FusedExperts, MoE
from model.transformer import Transformer
from support.toy_checkpoints import BASE

Mutation = Callable[[pytest.MonkeyPatch], None]
TOY = SimpleNamespace(floor_scale=BASE["floor_scale"], attn_scale=BASE["attn_scale"])


def config_with(**changes: Any) -> Mutation:
    """Reads the config wrongly. A callable value gets the config; `rope` changes the rope parameters."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = TextConfig.from_folder

        def from_folder(folder: Path) -> TextConfig:
            config = original(folder)
            values = {name: value(config) if callable(value) else value for name, value in changes.items()}
            parameters = dataclasses.replace(config.rope_parameters, **values.pop("rope", {}))
            return dataclasses.replace(config, rope_parameters=parameters, **values)

        patch.setattr(TextConfig, "from_folder", from_folder)

    return apply


def temperature(formula: Callable[[Tensor, TextConfig], Tensor], relative: bool = False) -> Mutation:
    """Temperature by `formula`; `relative` counts positions from the forward's start (visible only with a cache)."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def wrong(config: TextConfig, positions: range, device: torch.device) -> Tensor:
            first = 0 if relative else positions.start
            return formula(torch.arange(first, first + len(positions)), config)

        patch.setattr(model.attention, "query_temperature", wrong)

    return apply


def correct_temperature(position: Tensor, config: Any) -> Tensor:
    return torch.log1p(torch.floor((position + 1) / config.floor_scale)) * config.attn_scale + 1


def temperature_on(chosen: Callable[[Attention], bool], keys: bool = False) -> Mutation:
    """Applies temperature in the `chosen` layers, to their queries or their keys, after rotation and norm."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        forward, attend = Attention.forward, model.attention.attend

        def wrong(self: Attention, x: Tensor, step: Any) -> Tensor:
            def at(positions: range) -> Tensor:
                return correct_temperature(torch.arange(positions.start, positions.stop), TOY)[:, None]

            def scaled(q: Tensor, positions: range, segments: Any, mask: Any, backend: Any) -> Tensor:
                if chosen(self) and keys:
                    segments = [dataclasses.replace(s, keys=s.keys * at(s.positions)) for s in segments]
                elif chosen(self):
                    q = q * at(positions)
                return attend(q, positions, segments, mask, backend)

            patch.setattr(model.attention, "attend", scaled)
            return forward(self, x, step._replace(temperature=None))

        patch.setattr(Attention, "forward", wrong)

    return apply


def rotated(wrong: Callable[[Attention, Tensor, Tensor], Tensor]) -> Mutation:
    """Replaces rotation and norm of queries and keys (B, T, H, D)."""
    return lambda patch: patch.setattr(Attention, "_rotated", wrong)


def norm(x: Tensor, attention: Attention) -> Tensor:
    return x if attention.qk_norm_eps is None else F.rms_norm(x, x.shape[-1:], None, attention.qk_norm_eps)


def normed_then_rotated(self: Attention, x: Tensor, rotation: Tensor) -> Tensor:
    return model.attention.rotate(norm(x, self), rotation) if self.uses_rope else x


def normed_across_heads(self: Attention, x: Tensor, rotation: Tensor) -> Tensor:
    if not self.uses_rope:
        return x
    return norm(model.attention.rotate(x, rotation).flatten(2), self).view_as(x)


def rotated_everywhere(self: Attention, x: Tensor, rotation: Tensor) -> Tensor:
    return norm(model.attention.rotate(x, rotation), self)


def attribute(change: Callable[[Attention, TextConfig], None]) -> Mutation:
    """Changes attention layers after their construction."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = Attention.__init__

        def wrong(self: Attention, config: TextConfig, layer: int) -> None:
            original(self, config, layer)
            change(self, config)

        patch.setattr(Attention, "__init__", wrong)

    return apply


def qk_eps(value: float, nope_too: bool = False) -> Mutation:
    def change(attention: Attention, config: TextConfig) -> None:
        if attention.uses_rope or nope_too:
            attention.qk_norm_eps = value

    return attribute(change)


def mask(predicate: Callable[[Tensor, Tensor, int], Tensor], nope_too: bool = False) -> Mutation:
    """Gives RoPE layers a wrong predicate, which the eager backend reads."""

    class Wrong(AttentionMask):
        def mask_mod(self, b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            assert self.chunk_size is not None
            return (q_idx >= kv_idx) & predicate(q_idx, kv_idx, self.chunk_size)

    def change(attention: Attention, config: TextConfig) -> None:
        if attention.uses_rope or nope_too:
            attention.mask = Wrong(config.attention_chunk_size)

    return attribute(change)


def same_chunk(q: Tensor, k: Tensor, size: int) -> Tensor:
    return q // size == k // size


def rotate_with(wrong: Callable[[Tensor, Tensor], Tensor]) -> Mutation:
    return lambda patch: patch.setattr(model.attention, "rotate", wrong)


def rotate_halves(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs (i, i + D / 2) instead of (2i, 2i + 1)."""
    a, b = x.chunk(2, -1)
    cos, sin = rotation.real[:, None], rotation.imag[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def moe(
    score_in: int = 1,
    score_out: int = 0,
    score_shared: int = 0,
    sort_back: bool = True,
    gate: Callable[[Tensor, Tensor], Tensor] = lambda top, logits: top.sigmoid(),
) -> Mutation:
    """A naive MoE, expert by expert.

    The `score_` exponents say where and how often scores are applied. `sort_back` restores the order of the tokens.
    `gate` gets the top-k and all logits.
    """

    def forward(self: MoE, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        top, chosen = logits.topk(self.top_k, -1)
        scores = gate(top, logits)
        out = self.shared_expert(tokens * scores[:, :1] ** score_shared)
        for k in range(self.top_k):
            score = scores[:, k, None]
            result, order = torch.empty_like(tokens), []
            for e in range(self.router.out_features):
                rows = (chosen[:, k] == e).nonzero()[:, 0]
                gated, up = (tokens[rows] * score[rows] ** score_in @ self.experts.gate_up_proj[e]).chunk(2, -1)
                result[rows] = F.silu(gated) * up @ self.experts.down_proj[e]
                order.append(rows)
            out = out + (result if sort_back else result[torch.cat(order)]) * score**score_out
        return out.view_as(x)

    return lambda patch: patch.setattr(MoE, "forward", forward)


def weights(change: Callable[[Transformer], None]) -> Mutation:
    """Changes the model's weights after loading."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = model.transformer.Transformer.eval

        def wrong(self: Transformer) -> Transformer:
            change(self)
            return original(self)

        patch.setattr(model.transformer.Transformer, "eval", wrong)

    return apply


def each(kind: type, change: Callable[[Any], None]) -> Mutation:
    def change_all(transformer: Transformer) -> None:
        for module in transformer.modules():
            if isinstance(module, kind):
                change(module)

    return weights(change_all)


def swap_gate_and_up(experts: FusedExperts) -> None:
    experts.gate_up_proj.data = experts.gate_up_proj.data.roll(experts.gate_up_proj.shape[-1] // 2, -1)


def swap_dense_gate_and_up(mlp: MLP) -> None:
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def interleave_gate_and_up(experts: FusedExperts) -> None:
    experts.gate_up_proj.data = experts.gate_up_proj.data.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def transpose(experts: FusedExperts) -> None:
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight.data = weight.data.transpose(1, 2).reshape(weight.shape)


def drop_bias(name: str) -> Mutation:
    return each(Attention, lambda attention: attention.get_submodule(name).bias.data.zero_())


def tie_to_embeddings(transformer: Transformer) -> None:
    transformer.lm_head.weight = transformer.model.embed_tokens.weight


def frequencies(change: Callable[[TextConfig, Tensor, float], tuple[Tensor, float]]) -> Mutation:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = model.rope.rotary_frequencies
        patch.setattr(
            model.rope, "rotary_frequencies", lambda config, length: change(config, *original(config, length))
        )

    return apply


def llama3_without_division_guard(rope: Any, unscaled: Tensor) -> Tensor:
    """The smooth factor of Llama 3.1's reference, without a guard for low == high: 0 / 0 or worse."""
    turns = rope.original_max_position_embeddings * unscaled / (2 * torch.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return unscaled * (smooth + (1 - smooth) / rope.factor)


def llama3_without_smoothing(rope: Any, unscaled: Tensor) -> Tensor:
    turns = rope.original_max_position_embeddings * unscaled / (2 * torch.pi)
    return torch.where(turns > rope.low_freq_factor, unscaled, unscaled / rope.factor)


def phases_from_the_forwards_start(patch: pytest.MonkeyPatch) -> None:
    original = model.rope.phases
    patch.setattr(
        model.attention, "phases", lambda config, start, stop, *rest: original(config, 0, stop - start, *rest)
    )


def longrope_table_by_the_forwards_length(patch: pytest.MonkeyPatch) -> None:
    original = model.rope.phases
    patch.setattr(
        model.attention,
        "phases",
        lambda config, start, stop, length, device: original(config, start, stop, stop - start, device),
    )


def unscaled_scores(patch: pytest.MonkeyPatch) -> None:
    attend = model.attention.attend
    patch.setattr(model.attention, "attend", lambda q, *rest: attend(q * q.shape[-1] ** 0.5, *rest))


def wrong_group_order(patch: pytest.MonkeyPatch) -> None:
    """Query head h reads key head h % H_kv instead of h // (H / H_kv)."""
    attend = model.attention.attend

    def wrong(q: Tensor, positions: range, segments: Any, mask: Any, backend: Any) -> Tensor:
        segments = list(segments)
        groups = (segments[0].keys.shape[1], -1)
        q = q.unflatten(1, groups[::-1]).transpose(1, 2).flatten(1, 2)
        return attend(q, positions, segments, mask, backend).unflatten(1, groups).transpose(1, 2).flatten(1, 2)

    patch.setattr(model.attention, "attend", wrong)


def gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.moe, "F", SimpleNamespace(silu=lambda x, inplace=False: F.gelu(x)))


def reversed_flags(config: TextConfig) -> tuple[int, ...]:
    return tuple(1 - flag for flag in config.no_rope_layers)
