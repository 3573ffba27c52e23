"""Weights as MLX quantizes them: `.weight` in words of 32 bits, with `.scales` and `.biases` for groups of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from model.quantization.mlx_affine import BITS, GROUP_SIZES, MlxAffine
from model.weights.checks import damaged, no_others, require
from model.weights.sources import Group, StoredTensor, WeightSource

WORD_BITS = 32
SCALE_DTYPES = ("F32", "F16", "BF16")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader. The shapes say how wide codes and groups are; config.json must not differ."""
    weight, scales = group.tensors.get(".weight"), group.tensors.get(".scales")
    if weight is None or (scales is None and weight.dtype != "U32"):
        return None
    scales = require(group, ".scales", (*SCALE_DTYPES, "U8"))
    require(group, ".weight", ("U32",))
    no_others(group, (".weight", ".scales", ".biases"))
    bits, group_size = _widths(group, weight, scales)
    if scales.dtype == "U8":
        raise damaged(weight, f"is in one of MLX's modes {', '.join(MODES[1:])}, which are not read; affine ones are")
    if group_size not in GROUP_SIZES:
        raise damaged(scales, f"has shape {list(scales.shape)}, groups of {group_size}; MLX has {_listed(GROUP_SIZES)}")
    biases = require(group, ".biases", (scales.dtype,), scales.shape)
    scheme = MlxAffine(bits, group_size)
    _check_settings(group, weight, scheme)
    return WeightSource(group.shape, scheme, {"weight": weight, "scales": scales, "biases": biases})


def _widths(group: Group, weight: StoredTensor, scales: StoredTensor) -> tuple[int, int]:
    """Bits of a code and weights of a group. Raises CheckpointError unless they are whole numbers."""
    *rows, width = group.shape
    for tensor in (weight, scales):
        if tensor.shape[:-1] != tuple(rows) or not rows or not tensor.shape[-1]:
            raise damaged(tensor, f"has shape {list(tensor.shape)}, which does not fit weights {list(group.shape)}")
    bits, rest = divmod(weight.shape[-1] * WORD_BITS, width)
    if rest or bits not in BITS:
        raise damaged(
            weight,
            f"has {weight.shape[-1]} words for {width} weights a row, which is none of {_listed(BITS)} bits a weight",
        )
    group_size, rest = divmod(width, scales.shape[-1])
    if rest:
        raise damaged(scales, f"has {scales.shape[-1]} groups a row, which do not divide {width} weights")
    return bits, group_size


def _check_settings(group: Group, weight: StoredTensor, scheme: MlxAffine) -> None:
    """config.json has one object for all weights, and in it others, or false, by the names of modules."""
    if "quant_method" in group.settings:  # another tool's
        return
    own = group.settings.get(weight.name.removesuffix(".weight"), group.settings)
    if own is False:
        raise damaged(weight, f"is quantized ({scheme.label}), though config.json says that it is not")
    if not isinstance(own, Mapping):
        raise damaged(weight, f"is quantized, and config.json says {own!r:.40} of it, which is not an object")
    found = {"bits": scheme.bits, "group_size": scheme.group_size, "mode": "affine"}
    for name, value in found.items():
        wanted = own.get(name, value)
        if wanted != value:
            raise damaged(weight, f"has {name} {value} by its shape, though config.json says {wanted!r:.40}")


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"
