"""A model's configuration from GGUF metadata, as the fields of a config.json. Imports no torch.

What the format does not say is what llama.cpp computes with; `assumed` lists it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from model.bounds import BOUNDS, ROPE_BOUND, Bound, check_bound
from model.errors import ConfigError
from model.folder import open_regular
from model.gguf.files import GgufModel
from model.gguf.header import Strings, TensorInfo, Value
from model.gguf.names import ROPE_FACTORS

CHUNK_SIZE = 8192
NOPE_INTERVAL = 4
FLOOR_SCALE, ATTN_SCALE = 8192, 0.1
EXPERTS_WITHOUT_QK_NORM = 128
"""What llama.cpp computes Llama 4 with, as its files have no fields for it."""

_CHANGES_RESULTS = (
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)
"""Fields of models that are computed otherwise; Llama's files have none of them."""

_BOUNDS: Mapping[str, Bound] = {
    "attention.head_count": BOUNDS["num_attention_heads"],
    "attention.head_count_kv": BOUNDS["num_key_value_heads"],
    "attention.key_length": BOUNDS["head_dim"],
    "attention.layer_norm_rms_epsilon": BOUNDS["rms_norm_eps"],
    "attention.value_length": BOUNDS["head_dim"],
    "block_count": BOUNDS["num_hidden_layers"],
    "context_length": BOUNDS["max_position_embeddings"],
    "embedding_length": BOUNDS["hidden_size"],
    "expert_count": BOUNDS["num_local_experts"],
    "expert_feed_forward_length": BOUNDS["intermediate_size"],
    "expert_used_count": BOUNDS["num_experts_per_tok"],
    "feed_forward_length": BOUNDS["intermediate_size_mlp"],
    "interleave_moe_layer_step": BOUNDS["interleave_moe_layer_step"],
    "rope.dimension_count": BOUNDS["head_dim"],
    "rope.freq_base": BOUNDS["rope_theta"],
    "rope.scaling.factor": ROPE_BOUND,
    "vocab_size": BOUNDS["vocab_size"],
}


@dataclass(frozen=True)
class GgufConfig:
    """What a file says of the model, and what it leaves to the program."""

    fields: Mapping[str, Any]  # as in a config.json of model_type llama4_text
    assumed: tuple[str, ...]  # for people


def config_of(model: GgufModel) -> GgufConfig:
    """The configuration of a model of architecture llama4, or of a dense one of llama. Raises ConfigError."""
    architecture = model.metadata.get("general.architecture")
    if architecture == "clip":
        raise ConfigError(f"{model.path}: a vision tower alone (mmproj); give the file of the text model")
    if architecture not in ("llama4", "llama"):
        raise ConfigError(
            f"{model.path}: general.architecture {architecture!r} is not supported; must be llama4, or llama without "
            "experts"
        )
    get = _Fields(model.path, architecture, model.metadata)
    get.refuse(*_CHANGES_RESULTS)
    return _llama4(model, get) if architecture == "llama4" else _llama(model, get)


def _llama4(model: GgufModel, get: _Fields) -> GgufConfig:
    layers, experts = get.integer("block_count"), get.integer("expert_count")
    fields = _common(model, get) | {
        "intermediate_size": get.integer("expert_feed_forward_length"),
        "num_local_experts": experts,
        "num_experts_per_tok": get.integer("expert_used_count"),
        "interleave_moe_layer_step": get.integer("interleave_moe_layer_step"),
        "use_qk_norm": experts != EXPERTS_WITHOUT_QK_NORM,
    }
    norm = f"queries and keys are {'not ' * (not fields['use_qk_norm'])}normalized, as there are {experts} experts"
    if get.optional("attention.sliding_window") == 0:
        whole = {"attention_chunk_size": fields["max_position_embeddings"]}
        fields |= whole | {"no_rope_layers": [1] * layers, "attn_temperature_tuning": False}
        return GgufConfig(fields, ("RoPE in all layers, no temperature tuning (attention.sliding_window is 0)", norm))
    fields |= {
        "attention_chunk_size": CHUNK_SIZE,
        "no_rope_layers": [int((layer + 1) % NOPE_INTERVAL != 0) for layer in range(layers)],
        "attn_temperature_tuning": True,
        "floor_scale": FLOOR_SCALE,
        "attn_scale": ATTN_SCALE,
    }
    return GgufConfig(
        fields,
        (
            f"attention chunks of {CHUNK_SIZE:,} tokens",
            f"every {NOPE_INTERVAL}th layer is NoPE",
            f"temperature tuning from {FLOOR_SCALE:,} positions on, scale {ATTN_SCALE}",
            norm,
        ),
    )


def _llama(model: GgufModel, get: _Fields) -> GgufConfig:
    """Earlier dense Llamas are Llama 4 with RoPE layers only, in one chunk, without QK norm and temperature."""
    if get.optional("expert_count"):
        raise ConfigError(f"{model.path}: experts in a model of architecture llama are not supported")
    get.refuse("attention.sliding_window")
    fields = _common(model, get)
    fields |= {
        "intermediate_size": fields["intermediate_size_mlp"],
        "num_local_experts": 1,
        "moe_layers": [],
        "use_qk_norm": False,
        "attention_chunk_size": fields["max_position_embeddings"],
        "no_rope_layers": [1] * fields["num_hidden_layers"],
        "attn_temperature_tuning": False,
    }
    return GgufConfig(fields, ())


def _common(model: GgufModel, get: _Fields) -> dict[str, Any]:
    hidden_size, heads = get.integer("embedding_length"), get.integer("attention.head_count")
    head_dim = get.integer("attention.key_length", hidden_size // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := get.integer(key, head_dim)) != head_dim:
            raise ConfigError(f"{model.path}: {get.key(key)}: {size} is not the size of a head, {head_dim}")
    embeddings = model.tensors.get("token_embd.weight")
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    return {
        "model_type": "llama4_text",
        "vocab_size": embeddings.shape[0]
        if embeddings is not None
        else get.integer("vocab_size", len(tokens) if isinstance(tokens, Strings) else None),
        "hidden_size": hidden_size,
        "intermediate_size_mlp": get.integer("feed_forward_length"),
        "num_hidden_layers": get.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get.integer("context_length"),
        "rms_norm_eps": get.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(model, get),
        "tie_word_embeddings": embeddings is not None and "output.weight" not in model.tensors,
    }


def _rope(model: GgufModel, get: _Fields) -> dict[str, Any]:
    theta = {"rope_theta": get.number("rope.freq_base", 10000.0)}
    scaling, factor = get.optional("rope.scaling.type"), get.optional("rope.scaling.factor")
    stored = model.tensors.get(ROPE_FACTORS)
    if scaling == "linear" and factor not in (None, 1.0) and stored is None:
        return theta | {"rope_type": "linear", "factor": get.number("rope.scaling.factor")}
    if scaling not in (None, "none", "linear") or get.optional("rope.scale_linear") not in (None, 1.0):
        raise ConfigError(f"{model.path}: {get.key('rope.scaling.type')}: {scaling!r} is not supported")
    if stored is None:
        return theta | {"rope_type": "default"}
    return theta | {"rope_type": "factors", "factors": _floats(stored)}


def _floats(tensor: TensorInfo) -> list[float]:
    """The numbers of a small tensor. Raises ConfigError."""
    if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.num_bytes > 2**16:
        raise ConfigError(
            f"{tensor.file}: tensor {tensor.name}: {list(tensor.shape)} in {tensor.kind.name} is no short list in F32"
        )
    with BufferedReader(open_regular(tensor.file)) as stream:
        stream.seek(tensor.offset)
        return [_shortest(number) for number in struct.unpack(f"<{tensor.shape[0]}f", stream.read(tensor.num_bytes))]


def _shortest(number: float) -> float:
    """The shortest decimal that a float32 may have been written for: 1e-05 rather than 9.999999747378752e-06."""
    for digits in range(1, 9):
        decimal = float(f"{number:.{digits}g}")
        if abs(decimal) < 1e38 and struct.pack("<f", decimal) == struct.pack("<f", number):
            return decimal
    return number


class _Fields:
    """The metadata of one architecture. Keys are given without its name."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Value]) -> None:
        self.path = path
        self.architecture = architecture
        self.metadata = metadata

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def optional(self, name: str) -> Value | None:
        """A list with the same number for every layer is that number."""
        value = self.metadata.get(self.key(name))
        return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or value <= 0:
            raise self._error(name, "a positive integer")
        self._check_bound(name, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
            raise self._error(name, "a positive number")
        self._check_bound(name, float(value))  # type: ignore[arg-type]
        return _shortest(float(value))  # type: ignore[arg-type]

    def refuse(self, *names: str) -> None:
        """Raises ConfigError if one of them is there and not 0."""
        for name in names:
            if self.optional(name):
                raise ConfigError(f"{self.path}: {self.key(name)} is not supported in this architecture")

    def _check_bound(self, name: str, value: float) -> None:
        try:
            check_bound(self.key(name), value, _BOUNDS[name])
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _value(self, name: str, default: float | None) -> Value | None:
        value = self.optional(name)
        if value is None and default is None:
            raise ConfigError(f"{self.path}: metadata key {self.key(name)} is missing")
        return default if value is None else value

    def _error(self, name: str, wanted: str) -> ConfigError:
        value = self.optional(name)
        shown = value if isinstance(value, int | float | str) else type(value).__name__
        return ConfigError(f"{self.path}: {self.key(name)}: {str(shown)[:60]!r} is not {wanted}")
