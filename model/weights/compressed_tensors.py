"""Weights that compressed-tensors wrote: packed and plain integers, FP8, NVFP4 and MXFP4.

FP8 weights of linear layers look alike in compressed-tensors, modelopt, FBGEMM and DeepSeek's files: all are read here.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.errors import CheckpointError
from model.quantization.affine import AffineScheme
from model.quantization.float4 import Float4Scheme
from model.quantization.float8 import Float8Scheme
from model.weights.companions import FLOATS, Companions, float4_group, grain
from model.weights.sources import Group, Scheme, StoredTensor, WeightSource
from model.weights.targets import weights_settings

_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_BITS = (4, 8)
_WORD = 32


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader."""
    if len(group.shape) < 2:
        return None
    packed, weight = group.tensors.get(".weight_packed"), group.tensors.get(".weight")
    if packed is not None:
        _check_settings(group, packed)
        return _float4(group) if packed.dtype == "U8" else _packed_integers(group)
    if weight is not None and weight.dtype == "F8_E4M3":
        _check_settings(group, weight)
        return _float8(group)
    if weight is not None and weight.dtype == "I8" and ".weight_scale" in group.tensors:
        _check_settings(group, weight)
        return _integers(group)
    if ".weight_scale" in group.tensors and weight is None and "" not in group.tensors:
        scale = group.tensors[".weight_scale"]
        raise CheckpointError(f"{scale.file}: tensor {scale.name} is there without the weight that it belongs to")
    return None


def _packed_integers(group: Group) -> WeightSource:
    parts, settings = Companions(group, "packed integer weights"), weights_settings(group)
    codes = parts.need(".weight_packed", ["I32"])
    _check_type(parts, codes, settings, "int")
    bits = _bits(parts, codes, settings.get("num_bits"))
    scale, zero = parts.need(".weight_scale", FLOATS), parts.get(".weight_zero_point", ["I32", "I8"])
    parts.get(".weight_shape", ["I64", "I32"])  # says what the model's shape says
    rows, columns = parts.matrix
    scheme = AffineScheme(bits, grain(parts, scale, (rows, columns)), True, zero is not None)
    if zero is not None:
        words = (-(-rows * bits // _WORD), *parts.of_matrix(scale)[1:])
        parts.check_shape(zero, (*parts.lead, *words) if zero.dtype == "I32" else scale.shape)
    return _integer_source(parts, scheme, codes, scale, zero, settings.get("symmetric"))


def _integers(group: Group) -> WeightSource:
    parts, settings = Companions(group, "int8 weights"), weights_settings(group)
    codes, scale = parts.need(".weight", ["I8"]), parts.need(".weight_scale", FLOATS)
    parts.check_shape(codes, group.shape)
    _check_type(parts, codes, settings, "int")
    zero = parts.get(".weight_zero_point", ["I8"])
    rows, columns = parts.matrix
    scheme = AffineScheme(
        8, grain(parts, scale, (rows, columns), settings.get("block_structure")), False, zero is not None
    )
    if zero is not None:
        parts.check_shape(zero, scale.shape)
    return _integer_source(parts, scheme, codes, scale, zero, settings.get("symmetric"))


def _integer_source(
    parts: Companions,
    scheme: AffineScheme,
    codes: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor | None,
    symmetric: object,
) -> WeightSource:
    if zero is None and symmetric is False:
        parts.need(".weight_zero_point", ["I32", "I8"])
    tensors = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    return _source(parts, scheme, tensors)


def _float8(group: Group) -> WeightSource:
    parts = Companions(group, "FP8 weights")
    codes = parts.need(".weight", ["F8_E4M3"])
    parts.check_shape(codes, group.shape)
    settings = weights_settings(group)
    _check_type(parts, codes, settings, "float")
    blocks = settings.get("block_structure") or group.settings.get("weight_block_size")
    inverse = ".weight_scale_inv" in parts.tensors  # DeepSeek's name for the same: it multiplies, too
    scale = parts.need(".weight_scale_inv" if inverse else ".weight_scale", (*FLOATS, "U8"))
    rows, columns = parts.matrix
    return _source(parts, Float8Scheme(grain(parts, scale, (rows, columns), blocks)), {"codes": codes, "scale": scale})


def _float4(group: Group) -> WeightSource:
    is_mx = group.tensors.get(".weight_global_scale") is None and _dtype(group, ".weight_scale") == "U8"
    parts = Companions(group, "MXFP4 weights" if is_mx else "NVFP4 weights")
    codes, scale = parts.need(".weight_packed", ["U8"]), parts.need(".weight_scale", ["U8" if is_mx else "F8_E4M3"])
    _check_type(parts, codes, weights_settings(group), "float")
    size = float4_group(parts, codes, scale)
    tensors = {"codes": codes, "scale": scale}
    if not is_mx:
        tensors["global"] = parts.need(".weight_global_scale", ["F32"])
        parts.check_shape(tensors["global"], (1,), (), parts.lead, (*parts.lead, 1))
    return _source(parts, Float4Scheme(size, divides=True, has_global=not is_mx), tensors)


def _check_type(parts: Companions, codes: StoredTensor, settings: Mapping[str, Any], kind: str) -> None:
    """Raises CheckpointError if the configuration takes the codes for another type of numbers than their dtype says."""
    said = settings.get("type", kind)
    if said != kind:
        raise parts.error(codes, f"has dtype {codes.dtype}, though config.json says that its type is {said!r}")


def _source(parts: Companions, scheme: Scheme, tensors: dict[str, StoredTensor]) -> WeightSource:
    parts.finish()
    return WeightSource((*parts.lead, *parts.matrix), scheme, tensors)


def _bits(parts: Companions, codes: StoredTensor, said: object) -> int:
    """Bits of a packed code, by the number of words; the configuration's where several would fit."""
    rows, columns = parts.matrix
    fitting = [bits for bits in range(1, 9) if codes.shape == (*parts.lead, rows, -(-columns * bits // _WORD))]
    if said in fitting:
        fitting = [bits for bits in fitting if bits == said]
    bits = next((bits for bits in _BITS if bits in fitting), None)
    if bits is None and fitting:
        raise parts.error(codes, f"holds codes of {fitting[-1]} bits; those of 4 and 8 are read")
    if bits is None:
        parts.check_shape(codes, *((*parts.lead, rows, -(-columns * bits // _WORD)) for bits in _BITS))
        raise AssertionError
    return bits


def _check_settings(group: Group, tensor: StoredTensor) -> None:
    """Raises CheckpointError for what changes the weights' meaning and is not read."""
    if (order := group.tensors.get(".weight_g_idx")) is not None:
        raise CheckpointError(
            f"{order.file}: tensor {order.name}: groups in the order of activations (actorder) are not read; look for "
            "the model without, or in GGUF"
        )
    form = group.settings.get("format")
    if isinstance(form, str) and group.settings.get("quant_method") == "compressed-tensors" and form not in _FORMATS:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is in the format {form!r}, which is not read")
    transform = group.settings.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: rotated weights (transform_config in config.json) are not read"
        )


def _dtype(group: Group, suffix: str) -> str | None:
    tensor = group.tensors.get(suffix)
    return None if tensor is None else tensor.dtype
