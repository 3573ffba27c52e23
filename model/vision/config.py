"""The vision configuration of a Llama 4 checkpoint, with closed-form sizes and operation counts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bounds import shown
from model.checkpoint_files import checkpoint_files
from model.config import FieldReader, no_config, read_config
from model.errors import ConfigError
from model.folder import CONFIG

TILES_AT_A_TIME = 4
"""Image tiles per forward of the vision tower."""

MAX_GRID = 1024
"""Most patches along a side of a tile; the released checkpoints have 24."""


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of Llama 4's vision model and projector. Sizes in elements, image and patch sides in pixels.

    There is no `norm_eps`: the reference's layer norms use PyTorch's default of 1e-5 whatever the file says. Nor does
    the reference use `vision_feature_layer`, and dropout matters only in training.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    intermediate_size: int
    vision_output_dim: int
    image_size: int
    patch_size: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    rope_theta: float
    image_token_index: int

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.grid**2

    @property
    def shuffle(self) -> int:
        """Patches along one side of the squares that pixel shuffle merges."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.patches_per_tile // self.shuffle**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_folder(cls, path: Path) -> VisionConfig | None:
        """Reads `config.json` in a checkpoint folder, or a GGUF file's metadata; None for a text-only checkpoint.

        Raises ConfigError.
        """
        files = checkpoint_files(path)
        raw = read_config(files, no_config(path))
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{files.place(CONFIG)}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Any) -> VisionConfig | None:
        """Builds it from a parsed config.json, 4.x or 5.x; None without a vision part. Raises ConfigError."""
        if not isinstance(raw, Mapping):
            raise ConfigError("the top level is not an object")
        vision = raw.get("vision_config")
        if raw.get("model_type") == "llama4_text" or vision is None:
            return None
        if not isinstance(vision, Mapping):
            raise ConfigError("vision_config: not an object")
        image_token = FieldReader(raw).integer("image_token_index", 200092)
        try:
            return cls._from_fields(vision, image_token)
        except ConfigError as error:
            raise ConfigError(f"vision_config.{error}") from None

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any], image_token: int) -> VisionConfig:
        get = FieldReader(fields)
        config = cls(
            hidden_size=get.integer("hidden_size", 768),
            num_hidden_layers=get.integer("num_hidden_layers", 34),
            num_attention_heads=get.integer("num_attention_heads", 16),
            num_channels=get.integer("num_channels", 3),
            intermediate_size=get.integer("intermediate_size", 5632),
            vision_output_dim=get.integer("vision_output_dim", 7680),
            image_size=_side(fields, "image_size", 448),
            patch_size=_side(fields, "patch_size", 14),
            pixel_shuffle_ratio=_shuffle_ratio(get),
            projector_input_dim=get.integer("projector_input_dim", 4096),
            projector_output_dim=get.integer("projector_output_dim", 4096),
            rope_theta=_rope_theta(fields),
            image_token_index=image_token,
        )
        _check_supported(get)
        _check_sizes(config)
        return config


def _side(fields: Mapping[str, Any], name: str, default: int) -> int:
    """The side of a square; 5.x files may list both sides."""
    value = fields.get(name)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ConfigError(f"{name}: {shown(value)} is not a square; must be one number, or two equal ones")
        value = value[0]
    return FieldReader({name: value}).integer(name, default)


def _shuffle_ratio(get: FieldReader) -> float:
    ratio = get.number("pixel_shuffle_ratio", 0.5)
    if not 1 / MAX_GRID <= ratio <= 1 or 1 / round(1 / ratio) != ratio:
        raise ConfigError(f"pixel_shuffle_ratio: {ratio} is not 1/n for a whole number n of 1 to {MAX_GRID}")
    return ratio


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """From `rope_parameters` (5.x files) or `rope_theta` (4.x files)."""
    parameters = fields.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError("rope_parameters: not an object")
    rope_type = parameters.get("rope_type") or "default"
    if rope_type != "default":
        raise ConfigError(f"rope_parameters.rope_type: {shown(rope_type)} is not supported; must be default")
    where = fields if parameters.get("rope_theta") is None else parameters
    theta = FieldReader(where).number("rope_theta", 10000.0)
    if theta <= 0:
        raise ConfigError(f"rope_theta: {theta} is not a positive number")
    return theta


def _check_supported(get: FieldReader) -> None:
    """Raises ConfigError for settings that the reference ignores or does not implement."""
    for name, supported in (("hidden_act", "gelu"), ("vision_feature_select_strategy", "default")):
        value = get.fields.get(name)
        if value not in (None, supported):
            raise ConfigError(f"{name}: {shown(value)} is not supported; must be {supported}")
    if get.boolean("multi_modal_projector_bias", False):
        raise ConfigError("multi_modal_projector_bias: true is not supported")


def _check_sizes(config: VisionConfig) -> None:
    """Raises ConfigError for sizes that contradict each other."""
    c, heads, joined = config.hidden_size, config.num_attention_heads, config.shuffle**2
    if config.num_channels != 3:
        raise ConfigError(f"num_channels: {config.num_channels} is not supported; must be 3 (red, green, blue)")
    if c % heads:
        raise ConfigError(f"hidden_size: {c} is not a multiple of num_attention_heads ({heads})")
    if config.head_dim % 4:
        raise ConfigError(
            f"hidden_size: {c} in {heads} heads of {config.head_dim}, which is not a multiple of 4, "
            "so a head cannot be rotated by column and by row in pairs"
        )
    if config.image_size % config.patch_size:
        raise ConfigError(f"image_size: {config.image_size} is not a multiple of patch_size ({config.patch_size})")
    if config.grid > MAX_GRID:
        raise ConfigError(f"image_size: {config.image_size} is more than {MAX_GRID} patches of {config.patch_size}")
    if config.grid % config.shuffle:
        raise ConfigError(
            f"pixel_shuffle_ratio: {config.pixel_shuffle_ratio} does not divide a side of {config.grid} patches"
        )
    if config.intermediate_size != c * joined:
        raise ConfigError(
            f"intermediate_size: {config.intermediate_size} is not {c * joined}, the hidden_size of "
            f"{joined} joined patches, though the adapter takes intermediate_size elements"
        )
    if config.projector_input_dim != config.projector_output_dim:
        raise ConfigError(
            f"projector_input_dim: {config.projector_input_dim} is not projector_output_dim "
            f"({config.projector_output_dim})"
        )
    if config.vision_output_dim != config.projector_output_dim:
        raise ConfigError(
            f"vision_output_dim: {config.vision_output_dim} is not projector_output_dim ({config.projector_output_dim})"
        )


def vision_parameter_count(config: VisionConfig, text_hidden_size: int) -> int:
    """Number of weights in the vision model and its projector."""
    c = config.hidden_size
    biases_and_norms = 4 * c + config.intermediate_size + c + 4 * c
    embeddings = _patch_weights(config) + c + (config.patches_per_tile + 1) * c
    return (
        embeddings
        + 2 * 2 * c
        + config.num_hidden_layers * (_layer_weights(config) + biases_and_norms)
        + _adapter_weights(config, text_hidden_size)
    )


def vision_operations(config: VisionConfig, text_hidden_size: int, tiles: int) -> int:
    """Floating-point operations in matrix products and attention for `tiles` tiles; a multiply-add counts as 2."""
    positions = config.patches_per_tile + 1
    attention = 2 * positions**2 * config.hidden_size
    multiply_adds = (
        config.patches_per_tile * _patch_weights(config)
        + config.num_hidden_layers * (positions * _layer_weights(config) + attention)
        + config.tokens_per_tile * _adapter_weights(config, text_hidden_size)
    )
    return 2 * tiles * multiply_adds


def vision_activation_bytes(config: VisionConfig, tiles: int, itemsize: int) -> int:
    """Upper estimate of peak memory in a forward of `tiles` tiles besides weights and result, in bytes.

    The pixels in the compute dtype, plus the largest of patch embedding, attention (residual stream, its norm,
    projections and output; one rotation in float32), feed-forward and adapter.
    """
    c, positions = config.hidden_size, config.patches_per_tile + 1
    pixels = config.num_channels * config.image_size**2 * itemsize
    embedding = pixels + 3 * positions * c * itemsize
    attention = positions * (7 * c * itemsize + 12 * c)
    feed_forward = positions * (3 * c + 2 * config.intermediate_size) * itemsize
    adapter = (3 * positions * c + 3 * config.tokens_per_tile * config.projector_output_dim) * itemsize
    rotation = positions * config.head_dim * 16
    return tiles * (pixels + max(embedding, attention, feed_forward, adapter)) + rotation


def _patch_weights(config: VisionConfig) -> int:
    return config.num_channels * config.patch_size**2 * config.hidden_size


def _layer_weights(config: VisionConfig) -> int:
    """Number of weights in the matrices of one layer."""
    return 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size


def _adapter_weights(config: VisionConfig, text_hidden_size: int) -> int:
    """Number of weights in the adapter's two matrices and the projector."""
    d = config.projector_output_dim
    return config.intermediate_size * d + d * d + d * text_hidden_size
