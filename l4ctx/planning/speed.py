"""How fast this machine computes: measured by running the kernels of a forward pass for a moment.

Torch is imported only to measure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from l4ctx.machine.processor import default_attention
from model.config import TextConfig
from model.costs import Operations

if TYPE_CHECKING:
    from model.quantization.form import Weight

MEASURED_SECONDS, MEASURED_ROWS, MEASURED_ELEMENTS = 0.15, 512, 2**23
"""Time spent on each kernel, the most rows of its input, and the most elements of its weight."""

MEASURED_ROWS_ON_GPU = 4096


class Speed(NamedTuple):
    """Operations a second, of matrix products and of attention."""

    linear: float
    attention: float

    def seconds(self, operations: Operations) -> float:
        attention = operations.chunked_attention + operations.full_attention
        return operations.linear / self.linear + attention / self.attention


def measured_speed(config: TextConfig, dtype: str, device: str, tokens: int, weight: Weight | None = None) -> Speed:
    """By an expert's share of `tokens` times part of `weight`, and attention to a segment.

    `weight` (C_out, C_in), in whatever form it is stored, may be any matrix of a feed-forward layer; None: one in
    `dtype`. Rows grow from one while products are quick: seconds at the most, whatever the width, dtype and processor.
    """
    import torch

    from l4ctx.machine.timing import Work, growing, growing_rate
    from model.layers import linear

    made = {"dtype": getattr(torch, dtype), "device": device}
    share = -(-tokens * config.num_experts_per_tok // config.num_local_experts) if config.moe_layers else tokens
    if weight is None:
        weight = torch.ones(config.intermediate_size, config.hidden_size, **made)
    rows, part = min(share, MEASURED_ROWS), _part(weight, MEASURED_ELEMENTS).to(device)
    c_out, c_in = part.shape
    x = torch.ones(rows, c_in, **made)

    on_cpu = device == "cpu"
    kernel = default_attention(dtype, on_accelerator=False) if on_cpu else fastest_attention(config, dtype, device)
    with torch.inference_mode():
        products = growing_rate(
            lambda rows: Work(partial(linear, x[:rows], part), 2 * rows * c_in * c_out),
            growing(rows),
            device,
            MEASURED_SECONDS,
        )
        attention = _attention_rate(config, kernel, made, MEASURED_ROWS)
    return Speed(products, attention)


def fastest_attention(config: TextConfig, dtype: str, device: str) -> str:
    """The attention backend to use on a GPU: the fastest there of those that need no compiler, at the sizes of a run.

    Takes a quarter of a second. flex_attention is not among them: it takes seconds to compile, and was no faster.
    """
    import torch

    made = {"dtype": getattr(torch, dtype), "device": device}
    with torch.inference_mode():
        taken = {name: _seconds_on_gpu(config, name, made) for name in ("cudnn", "sdpa")}
    return min(taken, key=lambda name: taken[name])


def _seconds_on_gpu(config: TextConfig, name: str, made: dict[str, Any]) -> float:
    """Of one call at a run's size, after one that loads kernels and makes plans."""
    import torch

    from l4ctx.machine.timing import best_seconds

    rows = MEASURED_ROWS_ON_GPU
    call = _attention_call(config, name, made, rows)
    call(rows)
    torch.cuda.synchronize(made["device"])
    return best_seconds(partial(call, rows), made["device"], MEASURED_SECONDS)


def _attention_rate(config: TextConfig, name: str, made: dict[str, Any], most_rows: int) -> float:
    """Operations a second of a backend, by up to `most_rows` queries."""
    from l4ctx.machine.timing import Work, growing, growing_rate

    call, query_size = _attention_call(config, name, made, most_rows), config.num_attention_heads * config.head_dim
    return growing_rate(
        lambda rows: Work(partial(call, rows), 4 * query_size * rows * 2 * most_rows),
        growing(most_rows),
        made["device"],
        MEASURED_SECONDS,
    )


def _attention_call(config: TextConfig, name: str, made: dict[str, Any], most_rows: int) -> Callable[[int], Any]:
    """Attention of so many queries, at most `most_rows`, to twice `most_rows` keys, all of which they see."""
    import torch

    from model.kernels.attend import KVSegment, attend
    from model.kernels.masks import AttentionMask
    from model.kernels.registry import backend

    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, kernel = torch.ones(1, h, most_rows, d, **made), backend(name)
    keys = torch.ones(1, h_kv, 2 * most_rows, d, **made)
    start, segment = keys.shape[2], KVSegment(keys, keys, 0)

    def attention_of(rows: int) -> Any:
        return attend(queries[:, :, :rows], range(start, start + rows), [segment], AttentionMask(None), kernel)

    return attention_of


def _part(weight: Weight, elements: int) -> Weight:
    """The first rows of a matrix, about so many elements, in the same form."""
    from model.quantization.form import StoredMatrix

    rows = max(1, min(weight.shape[0], elements // weight.shape[1]))
    if not isinstance(weight, StoredMatrix):
        return weight[:rows]
    part = copy.copy(weight)
    part.out_features = rows
    return part
