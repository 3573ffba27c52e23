"""How fast this machine computes: measured by running the kernels of a forward pass for a moment.

Torch is imported only to measure.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from l4ctx.machine.processor import default_attention
from model.config import TextConfig
from model.costs import Operations

MEASURED_SECONDS, MEASURED_ROWS, MEASURED_ELEMENTS = 0.15, 512, 2**24
"""Time spent on each kernel, the most rows of its input, and the most elements of its weight."""


class Speed(NamedTuple):
    """Operations a second, of matrix products and of attention."""

    linear: float
    attention: float

    def seconds(self, operations: Operations) -> float:
        attention = operations.chunked_attention + operations.full_attention
        return operations.linear / self.linear + attention / self.attention


def measured_speed(config: TextConfig, dtype: str, device: str, tokens: int) -> Speed:
    """By an expert's feed-forward on its share of `tokens`, and attention to a segment.

    Both start with one row and grow while they are quick: seconds at the most, whatever the width, dtype and processor.
    """
    import torch
    from torch.nn.functional import silu

    from l4ctx.machine.timing import Work, growing, growing_rate
    from model.kernels.attend import KVSegment, attend
    from model.kernels.masks import AttentionMask
    from model.kernels.registry import backend

    made = {"dtype": getattr(torch, dtype), "device": device}
    share = -(-tokens * config.num_experts_per_tok // config.num_local_experts) if config.moe_layers else tokens
    rows, c = min(share, MEASURED_ROWS), config.hidden_size
    width = max(1, min(config.intermediate_size, MEASURED_ELEMENTS // c))
    x, up, down = (torch.ones(shape, **made) for shape in ((rows, c), (c, 2 * width), (width, c)))

    def feed_forward(rows: int) -> Any:
        a, b = (x[:rows] @ up).chunk(2, dim=-1)
        return silu(a).mul_(b) @ down

    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    kernel = backend(default_attention(dtype, on_accelerator=device != "cpu"))
    queries = torch.ones(1, h, MEASURED_ROWS, d, **made)
    keys = torch.ones(1, h_kv, 2 * MEASURED_ROWS, d, **made)
    start, segment = keys.shape[2], KVSegment(keys, keys, 0)

    def attention_of(rows: int) -> Any:
        return attend(queries[:, :, :rows], range(start, start + rows), [segment], AttentionMask(None), kernel)

    with torch.inference_mode():
        linear = growing_rate(
            lambda rows: Work(partial(feed_forward, rows), 6 * rows * c * width),
            growing(rows),
            device,
            MEASURED_SECONDS,
        )
        attention = growing_rate(
            lambda rows: Work(partial(attention_of, rows), 4 * h * d * rows * start),
            growing(MEASURED_ROWS),
            device,
            MEASURED_SECONDS,
        )
    return Speed(linear, attention)
