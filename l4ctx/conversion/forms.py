"""The forms that weights are written in, in the terms of compressed-tensors 0.20. Imports no torch.

https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.quantization.choice import CHANNEL, Quantization

GROUP_SIZES = (128, 64, 32)
ITEMSIZES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}

_INTEGER = {"dynamic": False, "symmetric": True, "type": "int"}
_FLOAT = {
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "strategy": "channel",
    "symmetric": True,
    "type": "float",
}
_TOKENS = {**_FLOAT, "dynamic": True, "strategy": "token"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class Form:
    """w4a16 (int4, groups), w8a16 (int8, a scale a row) or fp8 (e4m3, a scale a row).

    Activations stay in 16 bits; of fp8 the configuration says, as published FP8 checkpoints do, that programs with FP8
    products quantize them by token.
    """

    name: str
    with_attention: bool = False
    group_size: int = CHANNEL  # of w4a16

    @property
    def quantization(self) -> Quantization:
        """Which weights it covers."""
        kind = {"w4a16": "int4", "w8a16": "int8", "fp8": "fp8"}[self.name]
        return Quantization(kind, self.with_attention)

    @property
    def label(self) -> str:
        sharing = f"groups of {self.group_size}" if self.name == "w4a16" else "per channel"
        kind = {"w4a16": "int4", "w8a16": "int8", "fp8": "e4m3"}[self.name]
        return f"{self.name} ({kind}, {sharing}{', attention too' if self.with_attention else ''})"

    def entries(self, module: str, rows: int, columns: int) -> tuple[Entry, ...]:
        """The tensors of a matrix (C_out, C_in)."""
        if self.name == "fp8":
            return (
                Entry(f"{module}.weight", "F8_E4M3", (rows, columns)),
                Entry(f"{module}.weight_scale", "BF16", (rows, 1)),
            )
        bits, scales = (4, columns // self.group_size) if self.name == "w4a16" else (8, 1)
        return (
            Entry(f"{module}.weight_packed", "I32", (rows, -(-columns * bits // 32))),
            Entry(f"{module}.weight_scale", "BF16", (rows, scales)),
            Entry(f"{module}.weight_shape", "I64", (2,)),
        )

    def settings(self, ignore: Sequence[str]) -> dict[str, Any]:
        """config.json's quantization_config; `ignore` are the linear modules that are not quantized."""
        weights: dict[str, Any] = _FLOAT
        if self.name == "w4a16":
            weights = {**_INTEGER, "group_size": self.group_size, "num_bits": 4, "strategy": "group"}
        elif self.name == "w8a16":
            weights = {**_INTEGER, "group_size": None, "num_bits": 8, "strategy": "channel"}
        written = "float-quantized" if self.name == "fp8" else "pack-quantized"
        group = {
            "format": written,
            "input_activations": _TOKENS if self.name == "fp8" else None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "config_groups": {"group_0": group},
            "format": written,
            "global_compression_ratio": None,
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.20.0",
        }
