"""Sampling and the decode loop: a generator of token ids.

Knows nothing of text: detokenization is the tokenizer's, printing the CLI's.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Literal

import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.loop_guard import LoopGuard
from l4ctx.engine.prefill import as_batch
from l4ctx.errors import ModelFailureError
from model.transformer import Transformer

StopReason = Literal["stop", "length", "repetition"]


class GenerationError(ModelFailureError):
    """Decoding that cannot go on."""


def generate(
    model: Transformer,
    cache: HybridKVCache,
    token: int,
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    sampling: Sampling = Sampling(),
    guard: LoopGuard | None = None,
) -> Generator[int, None, StopReason]:
    """Continues from `token`, the prompt's last, which the cache does not hold yet.

    Yields token ids as they are chosen; returns "stop" at a stop token (which is not yielded), "repetition" when
    `guard` has found a loop, or "length" after `max_new_tokens`. Raises GenerationError when the logits are not
    numbers.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    for _ in range(max_new_tokens):
        logits = model(as_batch([token], model.device), cache, logits="last")
        token = choose(logits[0, -1], sampling, generator)
        if token in stop_tokens:
            return "stop"
        yield token
        if guard is not None and guard.push(token):
            return "repetition"
    return "length"


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id by its logits (V,). Order of the filters: temperature, top-k, top-p; ties go to the lowest id."""
    smallest, largest = logits.aminmax()  # NaN if any is
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise GenerationError("the model's logits are not finite numbers; try --dtype float32, or check the weights")
    if sampling.temperature == 0:
        return int((logits == largest).nonzero()[0])  # quicker than argmax on a CPU
    logits = logits.float().cpu()
    order = logits.argsort(descending=True, stable=True)
    ranked = logits[order].double()
    scaled = (ranked - ranked[0]) / sampling.temperature  # the largest is 0 at any temperature
    if sampling.top_k > 0:
        scaled = scaled[: sampling.top_k]
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier ones
    probabilities[before >= sampling.top_p] = 0
    probabilities[0] = probabilities[0].clamp(min=torch.finfo(torch.float64).tiny)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
