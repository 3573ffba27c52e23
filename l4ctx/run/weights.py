"""The text model's weights, counted before they are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cache.layout import KV_DTYPES
from l4ctx.planning.published import Form
from l4ctx.planning.weights import StoredWeights, WeightBytes
from model.config import TextConfig
from model.gguf.files import GgufModel
from model.gguf.names import ROPE_FACTORS, weight_name

if TYPE_CHECKING:
    from model.weights.sources import WeightSource


@dataclass(frozen=True)
class Weights:
    """The text model's weights as they are stored."""

    parameters: int
    dtype: str  # of the embeddings; bfloat16 if they are quantized
    kept_bytes: int  # of those that keep their stored form
    converted: int = 0  # number of the others: norms, biases, routers
    quantized: int = 0  # number of those that will be quantized on loading
    quantized_bytes: int = 0  # once they are; among `kept_bytes`
    stored: StoredWeights | None = None  # by owner and layer, unless they are quantized on loading

    @classmethod
    def of(cls, sources: dict[str, WeightSource], config: TextConfig) -> Weights:
        from model.weights.loading import stored_dtype
        from model.weights.quantizing import QuantizedSource

        quantized = [source for source in sources.values() if isinstance(source, QuantizedSource)]
        parts = (
            WeightBytes.of(name, source.scheme.label, source.num_bytes, source.parameters)
            for name, source in sources.items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        )
        weights = cls._counted(StoredWeights.of(config, parts), stored_dtype(sources))
        if not quantized:
            return weights
        return replace(
            weights,
            quantized=sum(source.parameters for source in quantized),
            quantized_bytes=sum(source.num_bytes for source in quantized),
            stored=None,
        )

    @classmethod
    def of_gguf(cls, model: GgufModel, config: TextConfig) -> Weights:
        """By the headers of GGUF files alone, without torch."""
        parts = (
            WeightBytes.of(weight_name(name) or name, tensor.kind.name, tensor.num_bytes, math.prod(tensor.shape))
            for name, tensor in model.tensors.items()
            if name != ROPE_FACTORS
        )
        embeddings = model.tensors.get("token_embd.weight")
        dtypes = {"F32": "float32", "F16": "float16"}
        dtype = "bfloat16" if embeddings is None else dtypes.get(embeddings.kind.name, "bfloat16")
        return cls._counted(StoredWeights.of(config, parts), dtype)

    @classmethod
    def in_form(cls, form: Form, config: TextConfig, dtype: str) -> Weights:
        """As published in this form, with embeddings in `dtype`, or computed in it."""
        return cls._counted(form.weights(config), dtype)

    @classmethod
    def _counted(cls, stored: StoredWeights, dtype: str) -> Weights:
        converted = [part for part in stored.parts if part.is_converted]
        return cls(
            stored.parameters,
            dtype,
            stored.num_bytes - sum(part.num_bytes for part in converted),
            sum(part.parameters for part in converted),
            stored=stored,
        )

    def bytes_in(self, dtype: str) -> int:
        """Bytes when the model computes in `dtype`: stored forms stay, but 32-bit ones are converted to 16 bits."""
        if self.dtype == "float32" and dtype != "float32":
            return (self.parameters - self.quantized) * KV_DTYPES[dtype] + self.quantized_bytes
        return self.kept_bytes + self.converted * KV_DTYPES[dtype]

    def are_mapped(self, dtype: str) -> bool:
        """Whether all but a few can stay mapped on a CPU."""
        return not self.quantized and not (self.dtype == "float32" and dtype != "float32")
