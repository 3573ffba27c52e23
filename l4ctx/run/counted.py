"""A checkpoint's weights, counted for a plan by what its folder says of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from l4ctx.errors import RequestError
from l4ctx.planning.declared import declared_form, declared_method
from l4ctx.planning.published import Form, plain, quantizing
from l4ctx.run.request import PlanRequest
from l4ctx.run.weights import Weights
from model.bounds import shown
from model.config import TextConfig
from model.gguf.files import find_gguf, read_gguf
from model.weights.settings import quantization_settings

Note = Callable[[str], None]


def counted_weights(request: PlanRequest, config: TextConfig, note: Note) -> Weights:
    """By the headers of GGUF files; for a checkpoint folder by config.json, so that its shards need not be there."""
    file = find_gguf(request.model)
    return published_weights(request, config, note) if file is None else Weights.of_gguf(read_gguf(file), config)


def published_weights(request: PlanRequest, config: TextConfig, note: Note) -> Weights:
    """Counted by config.json, in the dtype that it names, but for those that are quantized on loading."""
    dtype = config.torch_dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        named = "no dtype" if dtype is None else repr(dtype)
        note(f"config.json says {named}; bfloat16 is taken for the weights")
        dtype = "bfloat16"
    form, quantization = _declared_form(request.model, note) or plain(dtype), request.compute.quantization
    weights = Weights.in_form(form, config, dtype)
    if quantization is None:
        return weights
    made = Weights.in_form(quantizing(quantization, form), config, dtype)
    if made.stored.parts == weights.stored.parts:
        raise RequestError(f"--quantize {quantization}: nothing to quantize: stored as {form.name}; leave it out")
    return made


def _declared_form(model: Path, note: Note) -> Form | None:
    """What config.json, or modelopt's own file beside it, says of quantization."""
    settings = quantization_settings(model)
    form, method = declared_form(settings), declared_method(settings)
    if form is None and method is not None:
        note(f"the checkpoint says quantized by {shown(method)}, in a way that is not known: counted as not quantized")
    return form
