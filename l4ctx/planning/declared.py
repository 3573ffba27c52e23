"""What a checkpoint is stored as, by config.json alone: for plans that are made before it is downloaded.

A loaded checkpoint is not read so: there, each tensor says for itself how it is stored. Imports no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from l4ctx.planning.published import Form, Matrix, StoredType, mlx
from model.errors import CheckpointError
from model.weights.owners import Owner
from model.weights.settings import compiled, declared_settings

SCALE_BYTES = 2


def declared_form(raw: Mapping[str, Any]) -> Form | None:
    """The form that `raw`, a config.json, says the weights have; None if it says nothing of it, or nothing known."""
    settings = declared_settings(raw)
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return _quantized(_compressed_type(settings), settings.get("ignore"))
    if method == "modelopt":
        known = {"FP8": StoredType("FP8", 1.0), "NVFP4": StoredType("NVFP4", 0.5 + 1 / 16)}
        return _quantized(known.get(str(settings.get("quant_algo"))), settings.get("ignore"))
    if method == "fbgemm_fp8":
        return _quantized(StoredType("FP8", 1.0, bytes_a_row=4), settings.get("modules_to_not_convert"))
    if method == "bitsandbytes":
        is_4bit = bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
        four_bits = StoredType(str(settings.get("bnb_4bit_quant_type", "fp4")).upper(), 0.5 + 1 / 64)
        return _quantized(four_bits if is_4bit else None, settings.get("llm_int8_skip_modules"))
    if method is None and _is_number(settings.get("bits")) and _is_number(settings.get("group_size")):
        return mlx(settings["bits"], settings["group_size"])
    return None


def declared_method(raw: Mapping[str, Any]) -> str | None:
    """The name of the method that config.json declares; None if it declares no quantization."""
    settings = declared_settings(raw)
    return str(settings.get("quant_method", "an unnamed one")) if settings else None


def _quantized(stored: StoredType | None, ignored: object) -> Form | None:
    """Linear modules that are not ignored, stored so; the rest in bfloat16."""
    if stored is None:
        return None
    patterns = [pattern for pattern in ignored if isinstance(pattern, str)] if isinstance(ignored, Iterable) else []
    plain = StoredType("bfloat16")

    def type_of(matrix: Matrix, layers: int) -> StoredType:
        if matrix.is_vector or matrix.owner is Owner.EMBEDDINGS or matrix.name == "router":
            return plain
        return plain if any(_is_match(name, p) for p in patterns for name in _names(matrix)) else stored

    return Form(stored.name, type_of)


def _names(matrix: Matrix) -> Iterator[str]:
    """The module's possible names in a checkpoint."""
    if matrix.layer is None:
        path = matrix.name
    else:
        folder = {
            Owner.ATTENTION: "self_attn",
            Owner.ROUTED: "feed_forward.experts.0",
            Owner.SHARED: "feed_forward.shared_expert",
        }.get(matrix.owner, "feed_forward")
        path = f"model.layers.{matrix.layer}.{folder}.{matrix.name}"
    yield from (f"language_model.{path}", path, f"model.language_model.{path.removeprefix('model.')}")


def _is_match(name: str, pattern: str) -> bool:
    """By name, by a regular expression after `re:`, by a glob, or by the last parts of a name."""
    if pattern.startswith("re:"):
        try:
            return compiled(pattern.removeprefix("re:")).match(name) is not None
        except CheckpointError:  # the weights themselves will tell
            return False
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _compressed_type(settings: Mapping[str, Any]) -> StoredType | None:
    """Of compressed-tensors' first group of settings that has any for weights."""
    groups = settings.get("config_groups")
    found = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    weights = next((weights for weights in found if isinstance(weights, Mapping)), None)
    if weights is None or not _is_number(weights.get("num_bits")):
        return None
    bits, kind = weights["num_bits"], weights.get("type")
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy == "tensor_group":
        return StoredType("NVFP4", bits / 8 + 1 / 16)
    name = f"FP{bits}" if kind == "float" else f"int{bits}"
    if strategy in ("group", None) and isinstance(group, int) and _is_number(group):
        zero_points = 0 if weights.get("symmetric", True) else bits / 8
        name += f", groups of {group}"
        name = f"w4a16 ({name})" if bits == 4 and kind == "int" else name
        return StoredType(name, bits / 8 + (SCALE_BYTES + zero_points) / group)
    return StoredType(name, bits / 8, bytes_a_row=SCALE_BYTES if strategy == "channel" else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**16
