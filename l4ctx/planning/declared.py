"""What a checkpoint is stored as, by its configuration alone: for plans that are made before it is downloaded.

A loaded checkpoint is not read so: there, each tensor says for itself how it is stored. Imports no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from l4ctx.planning.published import Form, Matrix, StoredType, mlx_type
from model.config import TextConfig
from model.errors import CheckpointError
from model.weights.owners import Owner
from model.weights.settings import compiled

SCALE_BYTES = 2


def declared_form(settings: Mapping[str, Any]) -> Form | None:
    """The form that `settings`, of quantization, say the weights have; None if nothing of it, or nothing known."""
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(settings)
    if method == "modelopt":
        known = {"FP8": StoredType("FP8", 1.0), "NVFP4": StoredType("NVFP4", 0.5 + 1 / 16)}
        return _quantized(known.get(str(settings.get("quant_algo"))), settings.get("ignore"))
    if method == "fbgemm_fp8":
        return _quantized(StoredType("FP8", 1.0, bytes_a_row=4), settings.get("modules_to_not_convert"))
    if method == "bitsandbytes":
        is_4bit = bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
        four_bits = StoredType(str(settings.get("bnb_4bit_quant_type", "fp4")).upper(), 0.5 + 1 / 64)
        return _quantized(four_bits if is_4bit else None, settings.get("llm_int8_skip_modules"))
    return _mlx(settings) if method is None else None


def declared_method(settings: Mapping[str, Any]) -> str | None:
    """The name of the method that is declared; None if there is no quantization."""
    return str(settings.get("quant_method", "an unnamed one")) if settings else None


def _quantized(stored: StoredType | None, ignored: object) -> Form | None:
    """Linear modules that are not ignored, stored so; the rest in bfloat16."""
    return None if stored is None else _by_targets([(("Linear",), stored)], ignored)


def _by_targets(groups: Sequence[tuple[Sequence[str], StoredType]], ignored: object) -> Form:
    """Linear modules that are not ignored, each stored as the first group says whose targets name it; the rest in
    bfloat16."""
    plain, left_out = StoredType("bfloat16"), _texts(ignored)

    def type_of(matrix: Matrix, config: TextConfig) -> StoredType:
        if matrix.is_vector or matrix.owner is Owner.EMBEDDINGS or matrix.name == "router":
            return plain
        if _is_any(matrix, left_out):
            return plain
        return next((stored for targets, stored in groups if "Linear" in targets or _is_any(matrix, targets)), plain)

    return Form(", ".join(dict.fromkeys(stored.name for _, stored in groups)), type_of)


def _mlx(settings: Mapping[str, Any]) -> Form | None:
    """All matrices, but for what objects, or false, say of single modules."""
    usual = _mlx_type(settings)
    if usual is None:
        return None

    def type_of(matrix: Matrix, config: TextConfig) -> StoredType:
        said = next((settings[name] for name in _names(matrix) if name in settings), None)
        if matrix.is_vector or said is False:
            return StoredType("bfloat16")
        return (_mlx_type(said) if isinstance(said, Mapping) else None) or usual

    return Form(usual.name, type_of)


def _mlx_type(settings: Mapping[str, Any]) -> StoredType | None:
    bits, group = settings.get("bits"), settings.get("group_size")
    if isinstance(bits, int) and isinstance(group, int) and _is_number(bits) and _is_number(group):
        return mlx_type(bits, group)
    return None


def _texts(values: object) -> list[str]:
    found = values if isinstance(values, Iterable) and not isinstance(values, str) else []
    return [value for value in found if isinstance(value, str)]


def _is_any(matrix: Matrix, patterns: Sequence[str]) -> bool:
    return any(_is_match(name, pattern) for pattern in patterns for name in _names(matrix))


def _names(matrix: Matrix) -> Iterator[str]:
    """The module's possible names in a checkpoint."""
    if matrix.layer is None:
        path = matrix.name if matrix.owner is Owner.HEAD else f"model.{matrix.name}"
    else:
        folder = {
            Owner.ATTENTION: "self_attn",
            Owner.ROUTED: "feed_forward.experts.0",
            Owner.SHARED: "feed_forward.shared_expert",
        }.get(matrix.owner, "feed_forward")
        path = f"model.layers.{matrix.layer}.{folder}.{matrix.name}"
    paths = [path, path.replace(".experts.0.", ".experts.")] if matrix.owner is Owner.ROUTED else [path]
    for path in paths:
        yield from (f"language_model.{path}", path, f"model.language_model.{path.removeprefix('model.')}")


def _is_match(name: str, pattern: str) -> bool:
    """By name, by a regular expression after `re:`, by a glob, or by the last parts of a name."""
    if pattern.startswith("re:"):
        try:
            return compiled(pattern.removeprefix("re:")).match(name) is not None
        except CheckpointError:  # the weights themselves will tell
            return False
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _compressed(settings: Mapping[str, Any]) -> Form | None:
    """compressed-tensors' groups of settings, each for the modules that it targets."""
    groups = settings.get("config_groups")
    found: list[tuple[Sequence[str], StoredType]] = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        stored = _compressed_type(weights) if isinstance(weights, Mapping) else None
        if stored is not None:
            found.append((_texts(group.get("targets")) or ("Linear",), stored))
    found.sort(key=lambda group: "Linear" in group[0])  # a class says less than a name does
    return _by_targets(found, settings.get("ignore")) if found else None


def _compressed_type(weights: Mapping[str, Any]) -> StoredType | None:
    bits, kind = weights.get("num_bits"), weights.get("type")
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if not isinstance(bits, int) or not _is_number(bits):
        return None
    if strategy == "tensor_group":
        return StoredType("NVFP4", bits / 8 + 1 / 16)
    name = f"FP{bits}" if kind == "float" else f"int{bits}"
    if strategy in ("group", None) and isinstance(group, int) and _is_number(group):
        zero_points = 0 if weights.get("symmetric", True) else bits / 8
        name = f"w4a16 ({name}, groups of {group})" if name == "int4" else f"{name} (groups of {group})"
        return StoredType(name, bits / 8 + (SCALE_BYTES + zero_points) / group)
    return StoredType(name, bits / 8, bytes_a_row=SCALE_BYTES if strategy == "channel" else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**16
