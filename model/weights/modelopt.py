"""Weights that NVIDIA's modelopt wrote: NVFP4, and FP8 of fused experts. FP8 of linear layers is read with others'.

Fused experts keep the published layout: FP8 (E, C_in, C_out); NVFP4 (E, C_in / 2, C_out), whose bytes hold two codes
along C_in. https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from model.quantization.float4 import Float4Scheme
from model.weights.companions import Companions, float4_group
from model.weights.fbgemm import fused_float8
from model.weights.sources import Group, StoredTensor, WeightSource


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader."""
    tensors, is_fused = group.tensors, len(group.shape) == 3 and "" in group.tensors
    if is_fused and tensors[""].dtype == "F8_E4M3" and "_weight_scale" in tensors:
        return fused_float8(group, "_weight_scale")
    if is_fused and tensors[""].dtype == "U8":
        return _fused(group)
    if (
        len(group.shape) > 1
        and _dtype(group, ".weight") == "U8"
        and {".weight_scale", ".weight_scale_2"} & tensors.keys()
    ):
        return _linear(group)
    return None


def _linear(group: Group) -> WeightSource:
    parts = Companions(group, "NVFP4 weights")
    codes, scale, factor = _tensors(parts, ".weight", ".weight")
    parts.check_shape(factor, (), (1,), parts.lead, (*parts.lead, 1))
    scheme = Float4Scheme(float4_group(parts, codes, scale))
    parts.finish()
    return WeightSource(group.shape, scheme, {"codes": codes, "scale": scale, "global": factor})


def _fused(group: Group) -> WeightSource:
    parts = Companions(group, "NVFP4 experts")
    codes, scale, factor = _tensors(parts, "", "_weight")
    (inputs, outputs), lead = parts.matrix, parts.lead
    parts.check_shape(codes, (*lead, inputs // 2, outputs))
    parts.check_shape(factor, (), (1,), lead, (*lead, 1), (*lead, 1, 1))
    groups = scale.shape[1] if len(scale.shape) == 3 else 0
    if inputs % 2 or scale.shape != (*lead, groups, outputs) or not groups or inputs % groups:
        raise parts.error(scale, f"has shape {list(scale.shape)}: no groups of {list(group.shape)}, for {parts.form}")
    parts.finish()
    scheme = Float4Scheme(inputs // groups, is_transposed=True)
    return WeightSource(group.shape, scheme, {"codes": codes, "scale": scale, "global": factor})


def _tensors(parts: Companions, codes: str, weight: str) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
    """Codes, scales of groups, and the scale of the whole, by what follows the module's name."""
    return (
        parts.need(codes, ["U8"]),
        parts.need(f"{weight}_scale", ["F8_E4M3"]),
        parts.need(f"{weight}_scale_2", ["F32"]),
    )


def _dtype(group: Group, suffix: str) -> str | None:
    tensor = group.tensors.get(suffix)
    return None if tensor is None else tensor.dtype
