"""Weights that compressed-tensors itself packs and dequantizes: the oracle of what is read from its files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor

from support.fused_experts import E2M1


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized: a format of compressed-tensors and its arguments."""

    format: str
    weights: dict[str, Any]
    scale_dtype: torch.dtype = torch.bfloat16
    activations: dict[str, Any] | None = field(default=None)

    @property
    def arguments(self) -> QuantizationArgs:
        return QuantizationArgs(**self.weights)

    @property
    def scheme(self) -> QuantizationScheme:
        return QuantizationScheme(targets=["Linear"], weights=self.arguments, input_activations=self.activations)

    def settings(self, **others: Any) -> dict[str, Any]:
        """What config.json says, in the library's own words."""
        group = self.scheme.model_dump(mode="json")
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.format,
            "config_groups": {"group_0": group},
            "ignore": [],
            "kv_cache_scheme": None,
            **others,
        }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
INT8_TOKENS = TOKENS | {"type": "int"}

RECIPES = {
    "w4a16": Recipe("pack-quantized", INT4 | {"strategy": "group", "group_size": 16}),
    "w4a16_f32": Recipe("pack-quantized", INT4 | {"strategy": "group", "group_size": 16}, torch.float32),
    "w4a16_f16": Recipe("pack-quantized", INT4 | {"strategy": "group", "group_size": 8}, torch.float16),
    "w4a16_asym": Recipe("pack-quantized", INT4 | {"symmetric": False, "strategy": "group", "group_size": 16}),
    "w4a16_channel": Recipe("pack-quantized", INT4 | {"strategy": "channel"}),
    "w4a16_channel_asym": Recipe("pack-quantized", INT4 | {"symmetric": False, "strategy": "channel"}),
    "w8a16": Recipe("pack-quantized", INT8 | {"strategy": "group", "group_size": 16}),
    "w8a16_asym": Recipe("pack-quantized", INT8 | {"symmetric": False, "strategy": "group", "group_size": 16}),
    "w8a16_channel": Recipe("pack-quantized", INT8 | {"strategy": "channel"}, torch.float32),
    "int8": Recipe("int-quantized", INT8 | {"strategy": "channel"}, activations=INT8_TOKENS),
    "int8_tensor": Recipe("int-quantized", INT8 | {"strategy": "tensor"}),
    "int8_asym": Recipe("int-quantized", INT8 | {"symmetric": False, "strategy": "channel"}),
    "fp8_dynamic": Recipe("float-quantized", FP8 | {"strategy": "channel"}, activations=TOKENS),
    "fp8_dynamic_f32": Recipe("float-quantized", FP8 | {"strategy": "channel"}, torch.float32, TOKENS),
    "fp8_tensor": Recipe("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8_block": Recipe("float-quantized", FP8 | {"strategy": "block", "block_structure": [16, 8]}, torch.float32),
    "nvfp4": Recipe("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "symmetric": True,
                                             "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": Recipe("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "symmetric": True,
                                             "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
}  # fmt: skip


def compressed(recipe: Recipe, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that the library stores for a weight (C_out, C_in), by what follows the module's name and a dot."""
    state = {"weight": weight.float(), **parameters(recipe, weight)}
    found = BaseCompressor.get_value_from_registry(recipe.format).compress(state, recipe.scheme)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def parameters(recipe: Recipe, weight: Tensor) -> dict[str, Tensor]:
    """Scales and zero points for a weight (C_out, C_in), by their names in the library, as it takes them."""
    low, high = _ranges(weight.float(), recipe.weights)
    scale, zero = _scale(low, high, recipe)
    if recipe.weights["strategy"] == "tensor_group":
        factor = (448 * 6 / weight.float().abs().max()).reshape(1)
        scale = (scale.float() * factor).to(torch.float8_e4m3fn)
        return {"weight_scale": scale.to(recipe.scale_dtype), "weight_global_scale": factor}
    return {"weight_scale": scale} | ({} if recipe.arguments.symmetric else {"weight_zero_point": zero})


def dequantized(recipe: Recipe, tensors: dict[str, Tensor]) -> Tensor:
    """What the library makes of them (C_out, C_in), in the dtype that it computes in: that of the scales."""
    tensors = dict(tensors)
    return BaseCompressor.get_value_from_registry(recipe.format).decompress(tensors, recipe.scheme)["weight"]


def in_float32(recipe: Recipe, tensors: dict[str, Tensor]) -> Tensor:
    """What the library makes of them if it computes in float32."""
    scale = tensors["weight_scale"]
    if not recipe.format.startswith(("nvfp4", "mxfp4")):
        return dequantized(recipe, tensors | {"weight_scale": scale.float()})
    packed = tensors["weight_packed"].int()  # the library unpacks these to bfloat16
    codes = E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2)]
    scale = 2.0 ** (scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()
    return dequantize(codes, scale, args=recipe.arguments, global_scale=tensors.get("weight_global_scale"))


def _ranges(weight: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest weights that share a scale, never above or below 0."""
    rows, columns = weight.shape
    strategy = arguments["strategy"]
    if strategy == "tensor":
        parts = weight.reshape(1, -1)
        low, high = parts.amin(-1), parts.amax(-1)
    elif strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    elif strategy == "block":
        height, width = arguments["block_structure"]
        padded = torch.zeros(math.ceil(rows / height) * height, math.ceil(columns / width) * width)
        padded[:rows, :columns] = weight
        parts = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(-2)
        low, high = parts.amin(-1), parts.amax(-1)
    else:
        parts = weight.unflatten(1, (-1, arguments["group_size"]))
        low, high = parts.amin(-1), parts.amax(-1)
    return low.clamp(max=0), high.clamp(min=0)


def _scale(low: Tensor, high: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Scales in the recipe's dtype, and int8 zero points."""
    bits, top = recipe.weights["num_bits"], torch.maximum(-low, high).clamp(min=1e-6)
    if recipe.weights["type"] == "float":
        scale = top / (448 if bits == 8 else 6)
        if recipe.format.startswith("mxfp4"):
            scale = 2 ** torch.log2(scale).ceil()
        return scale.to(recipe.scale_dtype), torch.zeros(0)
    if recipe.weights["symmetric"]:
        return (2 * top / (2**bits - 1)).to(recipe.scale_dtype), torch.zeros(0)
    scale = ((high - low).clamp(min=1e-6) / (2**bits - 1)).to(recipe.scale_dtype)
    zero = (-(2 ** (bits - 1)) - low / scale.float()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scale, zero.to(torch.int8)
