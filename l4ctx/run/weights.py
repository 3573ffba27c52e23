"""The text model's weights, counted before they are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.planning.published import Form
from l4ctx.planning.weights import StoredWeights, WeightBytes
from model.config import TextConfig
from model.gguf.files import GgufModel
from model.gguf.names import ROPE_FACTORS, weight_name

if TYPE_CHECKING:
    from model.weights.sources import WeightSource

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of GGUF files that are dtypes of torch."""


@dataclass(frozen=True)
class Weights:
    """The text model's weights as they are stored, or will be once they are quantized on loading."""

    stored: StoredWeights
    dtype: str  # of the embeddings; bfloat16 if they are quantized

    @classmethod
    def of(cls, sources: dict[str, WeightSource], config: TextConfig) -> Weights:
        from model.weights.loading import stored_dtype
        from model.weights.quantizing import QuantizedSource
        from model.weights.sources import StoredPart

        parts = (
            WeightBytes.of(name, source.scheme.label, source.parameters, source.num_bytes)
            for name, source in sources.items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        )
        is_made = any(
            isinstance(source, QuantizedSource) or isinstance(tensor, StoredPart)  # parts are put together in memory
            for source in sources.values()
            for tensor in source.tensors.values()
        )
        return cls(StoredWeights.of(config, parts, is_made=is_made), stored_dtype(sources))

    @classmethod
    def of_gguf(cls, model: GgufModel, config: TextConfig) -> Weights:
        """By the headers of GGUF files alone, without torch."""
        parts = (
            WeightBytes.of(
                weight_name(name) or name,
                _PLAIN.get(tensor.kind.name, tensor.kind.name),
                math.prod(tensor.shape),
                tensor.num_bytes,
            )
            for name, tensor in model.tensors.items()
            if name != ROPE_FACTORS
        )
        embeddings = model.tensors.get("token_embd.weight")
        dtype = "bfloat16" if embeddings is None else _PLAIN.get(embeddings.kind.name, "bfloat16")
        return cls(StoredWeights.of(config, parts), dtype)

    @classmethod
    def in_form(cls, form: Form, config: TextConfig, dtype: str) -> Weights:
        """As published in this form, with embeddings in `dtype`, or computed in it."""
        return cls(form.weights(config), dtype)

    @property
    def parameters(self) -> int:
        return self.stored.parameters

    def bytes_in(self, dtype: str) -> int:
        """Bytes when the model computes in `dtype`: stored forms stay, but 32-bit ones are converted to 16 bits."""
        return self.stored.bytes_in(dtype)

    def are_mapped(self, dtype: str) -> bool:
        """Whether all but a few can stay mapped on a CPU."""
        return not self.stored.is_made and not (self.dtype == "float32" and dtype != "float32")
