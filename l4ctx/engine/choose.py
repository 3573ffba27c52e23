"""Choosing the next token from its logits: the likeliest one, or a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.errors import ModelFailureError


class GenerationError(ModelFailureError):
    """Decoding cannot continue."""


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
