"""Sampling and the decode loop: a generator of token ids. Detokenization is left to the caller."""

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
    """Decoding cannot continue."""


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
    """Continues from `token`, the prompt's last token, which is not in the KV cache yet.

    Yields token ids as they are chosen. Returns "stop" at a stop token (which is not yielded), "repetition" when
    `guard` detects a loop, or "length" after `max_new_tokens`. Raises GenerationError if the logits are not finite.
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
    """Samples a token id from logits (V,): temperature, then top-k, then top-p; ties go to the lowest id.

    Raises GenerationError if the logits are not finite.
    """
    smallest, largest = logits.aminmax()  # NaN if any logit is
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise GenerationError("the model's logits are not finite numbers; try --dtype float32, or check the weights")
    if sampling.temperature == 0:
        return int((logits == largest).nonzero()[0])  # faster than argmax on a CPU
    logits = logits.float().cpu()
    order = logits.argsort(descending=True, stable=True)
    ranked = logits[order].double()
    scaled = (ranked - ranked[0]) / sampling.temperature  # the largest is 0 at any temperature
    if sampling.top_k > 0:
        scaled = scaled[: sampling.top_k]
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total probability of all likelier tokens
    probabilities[before >= sampling.top_p] = 0
    probabilities[0] = probabilities[0].clamp(min=torch.finfo(torch.float64).tiny)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
