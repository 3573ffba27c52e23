"""The text configuration of a Llama 4 checkpoint.

Reads every published form of `config.json` into frozen dataclasses that keep the checkpoint's own field names. Imports
no torch, so that planning and errors are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bounds import BOUNDS, ROPE_BOUND, check_bound, shown
from model.checkpoint_files import CheckpointFiles, checkpoint_files
from model.errors import ConfigError
from model.folder import CONFIG, UNREADABLE, read_json, reason_of

ARCHITECTURES = {"Llama4ForConditionalGeneration": "llama4", "Llama4ForCausalLM": "llama4_text"}
BACKEND_NAMES = ("sdpa", "cudnn", "matmul", "flex", "eager")
"""Attention backends, implemented in model/kernels/."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "factors")
"""Those of transformers, and "factors": a divisor for each frequency, as GGUF files have for any type."""
TABLES = ("short_factor", "long_factor", "factors")
"""Rope parameters that are lists, with a number for each frequency."""


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding parameters, named as in `rope_parameters` (5.x files); None where a type lacks one."""

    rope_type: str = "default"
    rope_theta: float = 500000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TextConfig:
    """Configuration of Llama 4's text model. Sizes are in elements, positions and chunk sizes in tokens.

    `no_rope_layers[i]` is 1 where layer i USES rotary embedding (RoPE, chunked attention) and 0 where it does not
    (NoPE, full attention), as in the published files.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_chunk_size: int
    use_qk_norm: bool
    attn_temperature_tuning: bool
    attn_scale: float
    floor_scale: int
    no_rope_layers: tuple[int, ...]
    moe_layers: tuple[int, ...]
    num_local_experts: int
    num_experts_per_tok: int
    attention_bias: bool
    tie_word_embeddings: bool
    rope_parameters: RopeParameters
    torch_dtype: str | None = None

    @property
    def num_rope_layers(self) -> int:
        return sum(self.no_rope_layers)

    @property
    def num_nope_layers(self) -> int:
        return self.num_hidden_layers - self.num_rope_layers

    def uses_rope(self, layer: int) -> bool:
        return self.no_rope_layers[layer] == 1

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    @classmethod
    def from_folder(cls, path: Path) -> TextConfig:
        """Reads `config.json` in a checkpoint folder, or the metadata of a GGUF file. Raises ConfigError."""
        files = checkpoint_files(path)
        return cls._named(read_config(files, no_config(path)), files.place(CONFIG))

    @classmethod
    def from_file(cls, file: Path, missing: str) -> TextConfig:
        """Reads a config.json. Raises ConfigError, with the message `missing` if there is no such file."""
        return cls._named(_read(file, missing, read_json), file)

    @classmethod
    def _named(cls, raw: Any, file: Path) -> TextConfig:
        """From what a file holds, which errors name."""
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Any) -> TextConfig:
        """From a parsed config.json: nested (`llama4`) or flat (`llama4_text`), with 4.x or 5.x rope fields."""
        if not isinstance(raw, Mapping):
            raise ConfigError("the top level is not an object")
        text = _text_part(raw)
        get = FieldReader(text)
        layers = get.integer("num_hidden_layers", 48)
        heads = get.integer("num_attention_heads", 40)
        hidden_size = get.integer("hidden_size", 5120)
        config = cls(
            vocab_size=get.integer("vocab_size", 202048),
            hidden_size=hidden_size,
            intermediate_size=get.integer("intermediate_size", 8192),
            intermediate_size_mlp=get.integer("intermediate_size_mlp", 16384),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=get.integer("num_key_value_heads", heads if "num_key_value_heads" in text else 8),
            head_dim=get.integer("head_dim", hidden_size // heads if "head_dim" in text else 128),
            max_position_embeddings=get.integer("max_position_embeddings", 131072),
            rms_norm_eps=get.number("rms_norm_eps", 1e-5),
            attention_chunk_size=_chunk_size(text),
            use_qk_norm=get.boolean("use_qk_norm", True),
            attn_temperature_tuning=get.boolean("attn_temperature_tuning", True),
            attn_scale=get.number("attn_scale", 0.1),
            floor_scale=get.integer("floor_scale", 8192),
            no_rope_layers=_no_rope_layers(text, layers),
            moe_layers=_moe_layers(text, layers),
            num_local_experts=get.integer("num_local_experts", 16),
            num_experts_per_tok=get.integer("num_experts_per_tok", 1),
            attention_bias=get.boolean("attention_bias", False),
            tie_word_embeddings=get.boolean("tie_word_embeddings", False),
            rope_parameters=_rope_parameters(text),
            torch_dtype=_stored_dtype(raw, text),
        )
        _check(config, text)
        return config


def no_config(folder: Path) -> str:
    return f"{folder}: no {CONFIG} there; expected a checkpoint folder"


def read_config(files: CheckpointFiles, missing: str) -> Any:
    """The content of config.json. Raises ConfigError, with the message `missing` if there is no such file."""
    return _read(files.place(CONFIG), missing, lambda _: files.json(CONFIG))


def _read(file: Path, missing: str, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(missing) from None
    except UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({reason_of(error)})") from None


class FieldReader:
    """Typed access to configuration fields: null means the default.

    ConfigError, with the name, for a wrong type and for a number beyond its bound in model.bounds.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name}: {shown(value)} is not a positive integer")
        check_bound(name, value)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ConfigError(f"{name}: {shown(value)} is not a non-negative number")
        check_bound(name, value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Accepts integers too: released files have `attn_temperature_tuning: 4`, which means true."""
        value = self.value(name, default)
        if not isinstance(value, bool | int):
            raise ConfigError(f"{name}: {shown(value)} is neither true nor false")
        return bool(value)


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields. In a nested file only these count, as in the reference."""
    names = raw.get("architectures") or []
    if not isinstance(names, list) or any(name not in list(ARCHITECTURES) for name in names):
        raise ConfigError(f"architectures: {shown(names)} is not supported; must be {' or '.join(ARCHITECTURES)}")
    model_type = raw.get("model_type", ARCHITECTURES[names[0]] if names else None)
    if model_type not in list(ARCHITECTURES.values()):
        raise ConfigError(f"model_type: {shown(model_type)} is not supported; must be llama4 or llama4_text")
    text = raw if model_type == "llama4_text" else raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("text_config: missing, though model_type is llama4")
    return text


def _stored_dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """Same lookup order as the reference: top level first, and `dtype` (5.x files) before `torch_dtype` (4.x files)."""
    found = (part.get(name) for part in (raw, text) for name in ("dtype", "torch_dtype"))
    stored = next((dtype for dtype in found if dtype is not None), None)
    return stored if isinstance(stored, str) else None


def _chunk_size(text: Mapping[str, Any]) -> int:
    if "attention_chunk_size" in text and text["attention_chunk_size"] is None:
        raise ConfigError(
            "attention_chunk_size: null means RoPE layers without chunks, which transformers rejects, "
            "too; the released checkpoints use 8192, and the value of max_position_embeddings gives "
            "a single chunk"
        )
    return FieldReader(text).integer("attention_chunk_size", 8192)


def _no_rope_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """One flag per layer, 1 for RoPE. If absent, null or empty, every `no_rope_layer_interval`-th layer is NoPE."""
    flags = text.get("no_rope_layers")
    if not flags:
        interval = FieldReader(text).integer("no_rope_layer_interval", 4)
        flags = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise ConfigError(f"no_rope_layers: not a list of at least {layers} zeros and ones")
    return tuple(int(flag) for flag in flags[:layers])


def _moe_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Indices of MoE layers. Absent or null means every `interleave_moe_layer_step`-th layer; an empty list, none."""
    listed = text.get("moe_layers")
    if listed is None:
        step = FieldReader(text).integer("interleave_moe_layer_step", 1)
        listed = list(range(step - 1, layers, step))
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in listed):
        raise ConfigError("moe_layers: not a list of layer numbers")
    return tuple(sorted({i for i in listed if i < layers}))


def _rope_parameters(text: Mapping[str, Any]) -> RopeParameters:
    """From `rope_parameters` (5.x files) or `rope_theta` with `rope_scaling` (4.x files)."""
    fields: dict[str, Any] = dict(_mapping(text, "rope_scaling"))
    fields |= _mapping(text, "rope_parameters")
    rope_type = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_type: {shown(rope_type)} is not supported; must be one of {', '.join(ROPE_TYPES)}")
    for where in (fields, text):
        if where.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError("partial_rotary_factor: only 1.0 is supported")
    if text.get("original_max_position_embeddings") is not None:
        raise ConfigError("original_max_position_embeddings: supported only among the rope parameters")
    if fields.get("rope_theta") is None:
        fields["rope_theta"] = text.get("rope_theta") or 500000.0
    known = {name: value for name, value in fields.items() if name in RopeParameters.__dataclass_fields__}
    for name, value in known.items():
        known[name] = _positive(name, value)
    if known.get("truncate") is None:
        known.pop("truncate", None)
    parameters = RopeParameters(rope_type=rope_type, **known)
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("original_max_position_embeddings",),
        "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "factors": ("factors",),
    }.get(rope_type, ())
    for name in needed:
        if not getattr(parameters, name):
            raise ConfigError(f"rope_parameters.{name}: missing, though rope_type is {rope_type}")
    for of, name in (("yarn", "rope_theta"), ("longrope", "original_max_position_embeddings")):
        if rope_type == of and getattr(parameters, name) == 1:  # whose logarithm is a divisor
            raise ConfigError(f"rope_parameters.{name}: 1 is not supported where rope_type is {rope_type}")
    return parameters


def _positive(name: str, value: Any) -> Any:
    """Returns a rope parameter unchanged, lists as tuples, after checking that its numbers are positive and finite."""
    is_table = name in TABLES
    if value is None or (isinstance(value, bool) and name == "truncate"):
        return value
    if is_table != isinstance(value, list):
        raise ConfigError(f"rope_parameters.{name}: {shown(value)} is {'not a list' if is_table else 'not a number'}")
    smallest = 0.0 if name in ("mscale", "mscale_all_dim") else 1e-30  # 0 there means: not used
    for number in value if is_table else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= smallest:
            raise ConfigError(f"rope_parameters.{name}: {shown(number)} is not a positive number")
        check_bound(f"rope_parameters.{name}", number, BOUNDS.get(name, ROPE_BOUND))
    return tuple(value) if is_table else value


def _mapping(text: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = text.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: not an object")
    return value


def _check(config: TextConfig, text: Mapping[str, Any]) -> None:
    """Raises ConfigError for fields that are inconsistent or that would be computed incorrectly."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads: {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim: {config.head_dim} is odd, so it cannot be rotated in pairs")
    if config.num_experts_per_tok > config.num_local_experts:
        raise ConfigError(f"num_experts_per_tok: {config.num_experts_per_tok} of {config.num_local_experts} experts")
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act: {shown(text['hidden_act'])} is not supported; must be silu")
    for name in TABLES:
        factors = getattr(config.rope_parameters, name)
        if factors is not None and len(factors) != config.head_dim // 2:
            raise ConfigError(f"rope_parameters.{name}: {len(factors)} factors for {config.head_dim // 2} pairs")
    layer_types = text.get("layer_types")
    if layer_types is not None:
        expected = ["chunked_attention" if flag else "full_attention" for flag in config.no_rope_layers]
        if not isinstance(layer_types, list) or layer_types[: len(expected)] != expected:
            raise ConfigError(
                "layer_types: disagrees with no_rope_layers; only RoPE layers with chunked attention "
                "and NoPE layers with full attention are supported"
            )
