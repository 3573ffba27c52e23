"""Feed-forward layers: the gated MLP, and the mixture of experts, which runs each token through its top-k only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TextConfig
from model.grouped import ALIGNMENT, group_ends, grouped_product, has_kernel, stored_product
from model.layers import Linear, linear, set_weight
from model.quantization.form import Weight
from model.transfers import ToHost

FEW_COPIES = 8
"""Up to this many token-expert pairs run one by one, without sorting by expert."""


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class RoutedExperts(nn.Module):
    """A layer's routed experts, whatever form their weights have."""

    def one(self, x: Tensor, expert: int) -> Tensor:
        """x (N, C), all routed to one expert -> (N, C)."""
        raise NotImplementedError

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, C) sorted by expert, and where each expert's rows end, (E,) int32 on the device -> (N, C)."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all its matrices."""
        raise NotImplementedError

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x (N + padding, C) sorted by expert, with `counts[e]` rows for expert e and N in total -> (N, C).

        One product per expert that has rows. Its row count is rounded up by at most `padding`; the surplus rows belong
        to the next experts, which overwrite their results.
        """
        granularity = len(x) - sum(counts) + 1
        out = torch.empty_like(x)
        start = 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            rows = slice(start, start + -(-count // granularity) * granularity)
            out[rows] = self.one(x[rows], e)
            start += count
        return out[:start]


class FusedExperts(RoutedExperts):
    """Weights in the published layout, which is transposed relative to nn.Linear.

    `model.weights.loading` may give them nn.Linear's strides in memory, which makes decoding one token faster.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        e, c, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, c, 2 * i))
        self.down_proj = nn.Parameter(torch.empty(e, i, c))

    def one(self, x: Tensor, expert: int) -> Tensor:
        return linear(_gated(linear(x, self.gate_up_proj[expert].t())), self.down_proj[expert].t())

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_product(_gated(grouped_product(x, self.gate_up_proj, ends)), self.down_proj, ends)

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self.gate_up_proj.shape[1:], *self.down_proj.shape[1:])


class SplitExperts(RoutedExperts):
    """Experts that are stored one by one, or in a stored form."""

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def one(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](x)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        def product(name: str, rows: Tensor) -> Tensor:
            return stored_product(rows, [getattr(expert, name) for expert in self.experts], ends)

        if self.experts[0].is_joined:
            return product("down", _gated(product("gate_up", x)))
        return product("down", F.silu(product("gate", x), inplace=True).mul_(product("up", x)))

    @property
    def widths(self) -> tuple[int, ...]:
        first: Any = self.experts[0]
        return (*(first.gate_up if first.is_joined else first.gate).shape, *first.down.shape)


class Expert(nn.Module):
    """One expert's matrices (C_out, C_in): gate and up apart, or joined in this order."""

    def __init__(self, gate: Weight | None, up: Weight | None, gate_up: Weight | None, down: Weight) -> None:
        super().__init__()
        for name, weight in (("gate", gate), ("up", up), ("gate_up", gate_up), ("down", down)):
            if weight is not None:
                set_weight(self, name, weight)
        self.is_joined = gate_up is not None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C)."""
        if self.is_joined:
            gated = _gated(self._product("gate_up", x))
        else:
            gated = F.silu(self._product("gate", x), inplace=True).mul_(self._product("up", x))
        return self._product("down", gated)

    def _product(self, name: str, x: Tensor) -> Tensor:
        weight: Any = getattr(self, name)
        return linear(x, weight)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class MoE(nn.Module):
    """Top-k routing by logits; the sigmoid of each chosen logit scales its expert's INPUT; plus the shared expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts: RoutedExperts = FusedExperts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        tokens = x.flatten(0, -2)  # (N, C)
        logits, experts = self.router(tokens).topk(self.top_k, dim=-1)  # (N, k)
        scores = logits.float().sigmoid().to(x.dtype).flatten()
        if len(scores) <= FEW_COPIES and not self._is_grouped(tokens, len(scores)):
            return self._token_by_token(tokens, experts, scores).view_as(x)
        order = experts.flatten().argsort(stable=True)  # (N * k,), routed copies sorted by expert
        if self._is_grouped(tokens, len(order)):
            ends = group_ends(experts.flatten()[order], self.router.out_features)
            routed = self.experts.grouped(tokens[order // self.top_k] * scores[order, None], ends)
            out = self.shared_expert(tokens)
        elif x.device.type == "cpu":
            counts = experts.flatten().bincount(minlength=self.router.out_features).tolist()
            routed = self._routed(tokens, order, scores, counts)
            out = self.shared_expert(tokens)
        else:  # the counts travel while the device computes the shared expert
            ends_on_host = ToHost(group_ends(experts.flatten()[order], self.router.out_features))
            out = self.shared_expert(tokens)
            last = ends_on_host.wait().tolist()
            counts = [stop - start for start, stop in zip([0, *last], last, strict=False)]
            routed = self._routed(tokens, order, scores, counts)
        if self.top_k == 1:
            out[order] += routed
        else:  # gather each token's experts first, so that they are summed in a fixed order
            by_token = torch.empty_like(routed)
            by_token[order] = routed
            out += by_token.view(-1, self.top_k, out.shape[-1]).sum(1)
        return out.view_as(x)

    def _routed(self, tokens: Tensor, order: Tensor, scores: Tensor, counts: list[int]) -> Tensor:
        """Tokens (N, C) -> their experts' results in this order, (N * k, C)."""
        padding = _granularity(tokens, len(order), len(counts)) - 1
        rows = tokens[torch.cat([order // self.top_k, order.new_zeros(padding)])]
        rows[: len(order)] *= scores[order, None]
        return self.experts(rows, counts)

    def _is_grouped(self, tokens: Tensor, copies: int) -> bool:
        """Whether the device multiplies by groups. To expand all experts for a few copies would take longer."""
        if not has_kernel(tokens.device) or (copies <= FEW_COPIES and isinstance(self.experts, SplitExperts)):
            return False
        return tokens.dtype == torch.bfloat16 and not any(width % ALIGNMENT for width in self.experts.widths)

    def _token_by_token(self, tokens: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        """The same in fewer steps for a few tokens (N, C), as when decoding."""
        out = self.shared_expert(tokens)
        for n, expert in enumerate(experts.flatten().tolist()):
            token = slice(n // self.top_k, n // self.top_k + 1)
            out[token] += self.experts.one(tokens[token] * scores[n], expert)
        return out


def _granularity(x: Tensor, routed: int, num_experts: int) -> int:
    """The multiple, a power of two, that row counts of expert products are rounded up to, so that few shapes occur.

    On a CPU, every new shape of a 16-bit product leaks some 0.2 MiB inside the library (torch 2.13), which adds up to
    gigabytes over a million tokens. At a sixteenth of an expert's mean share, the work grows by a thirty-second.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return 1
    return 1 << (max(1, routed // (16 * num_experts)).bit_length() - 1)
