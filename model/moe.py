"""Feed-forward layers: the gated MLP, and the mixture of experts that computes each token in its own experts only.

Knows nothing of attention, positions or checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TextConfig
from model.layers import Linear, linear

FEW_COPIES = 8
"""Of tokens for experts: so few go to them one by one, without being sorted."""


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class Experts(nn.Module):
    """The routed experts' weights as published: transposed with respect to nn.Linear.

    In memory they may lie as nn.Linear's do, which `model.weights.loading` sees to: one token is then quicker.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        e, c, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, c, 2 * i))
        self.down_proj = nn.Parameter(torch.empty(e, i, c))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x (N + padding, C) sorted by expert, `counts[e]` rows for expert e, N in all: (N, C).

        One product per expert that has rows, of a number of rows that is rounded up by at most `padding`: those further
        rows are the next expert's, which then overwrites what was made of them.
        """
        granularity = len(x) - sum(counts) + 1
        out = torch.empty_like(x)
        start = 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            rows = slice(start, start + -(-count // granularity) * granularity)
            torch.mm(self._gated(x[rows], e), self.down_proj[e], out=out[rows])
            start += count
        return out[:start]

    def one(self, x: Tensor, expert: int) -> Tensor:
        """x (N, C), all of it for one expert: (N, C)."""
        return linear(self._gated(x, expert), self.down_proj[expert].t())

    def _gated(self, x: Tensor, expert: int) -> Tensor:
        gate, up = linear(x, self.gate_up_proj[expert].t()).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class MoE(nn.Module):
    """Top-k routing by logits; the sigmoid of each of the k multiplies its expert's INPUT; plus the shared expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        tokens = x.flatten(0, -2)  # (N, C)
        logits, experts = self.router(tokens).topk(self.top_k, dim=-1)  # (N, k)
        scores = logits.float().sigmoid().to(x.dtype).flatten()
        if len(scores) <= FEW_COPIES:
            return self._token_by_token(tokens, experts, scores).view_as(x)
        order = experts.flatten().argsort(stable=True)  # (N * k,), routed copies sorted by expert
        counts = experts.flatten().bincount(minlength=self.router.out_features).tolist()
        padding = _granularity(x, len(order), len(counts)) - 1
        rows = tokens[torch.cat([order // self.top_k, order.new_zeros(padding)])]
        rows[: len(order)] *= scores[order, None]
        routed = self.experts(rows, counts)
        out = self.shared_expert(tokens)
        if self.top_k == 1:
            out[order] += routed
        else:  # every token's experts side by side, so that the sum's order is fixed
            by_token = torch.empty_like(routed)
            by_token[order] = routed
            out += by_token.view(-1, self.top_k, out.shape[-1]).sum(1)
        return out.view_as(x)

    def _token_by_token(self, tokens: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        """The same for a few tokens (N, C), such as one of an answer, in fewer steps."""
        out = self.shared_expert(tokens)
        for n, expert in enumerate(experts.flatten().tolist()):
            token = slice(n // self.top_k, n // self.top_k + 1)
            out[token] += self.experts.one(tokens[token] * scores[n], expert)
        return out


def _granularity(x: Tensor, routed: int, num_experts: int) -> int:
    """The number of rows that products are rounded up to, so that they come in few shapes: a power of two.

    On a CPU, 16-bit products of every new shape leave some 0.2 MiB behind in the library for good (torch 2.13), which
    over a million tokens is gigabytes. At a sixteenth of an expert's mean share the work grows by a thirty-second.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return 1
    return 1 << (max(1, routed // (16 * num_experts)).bit_length() - 1)
