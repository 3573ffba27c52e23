"""Checkpoints written by MLX compute what their dequantized weights compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.weights.loading import load_checkpoint
from support.quantized_checkpoints import KINDS, Quantized, assert_equal_to_dequantized, quantize

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from support.mlx_arrays import from_torch, to_torch  # noqa: E402


def quantized_by(bits: int, group_size: int, **others: dict[str, int] | bool) -> Callable[[str, Tensor], Any]:
    """`others`: how weights whose names end so, with _ for dots, are quantized."""

    def quantize_one(name: str, weight: Tensor) -> tuple[dict[str, Any], Tensor]:
        how: Any = next(
            (how for end, how in others.items() if name.removesuffix(".weight").replace(".", "_").endswith(end)),
            {"bits": bits, "group_size": group_size},
        )
        if weight.dim() == 1 or how is False or "vision" in name or "multi_modal" in name:
            return {name: from_torch(weight)}, weight.float()
        path, arrays = name.removesuffix(".weight"), mx.quantize(from_torch(weight.bfloat16()), **how)
        wide = [array if array.dtype == mx.uint32 else array.astype(mx.float32) for array in arrays]
        stored = {f"{path}.{part}": a for part, a in zip(("weight", "scales", "biases"), arrays, strict=True)}
        return stored, to_torch(mx.dequantize(*wide, **how))

    return quantize_one


def written(
    folder: Path, kind: str, bits: int, group_size: int, others: dict[str, dict[str, int] | bool], **config: Any
) -> Quantized:
    return quantize(
        folder,
        kind,
        quantized_by(bits, group_size, **others),
        is_stacked=True,
        save=lambda tensors, file: mx.save_safetensors(str(file), tensors, {"format": "mlx"}),
        **config,
    )


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "others", "config"),
    [
        ("dense and MoE", 4, 64, {}, {"quantization": {"group_size": 64, "bits": 4}}),
        ("MoE, nested", 4, 32, {}, {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}),
        ("MoE, nested", 8, 64, {}, {"quantization_config": {"group_size": 64, "bits": 8}}),
        ("dense and MoE", 6, 64, {}, {}),
        ("dense and MoE", 3, 64, {}, {"quantization": {"group_size": 64, "bits": 3}}),
        (
            "MoE, nested",
            4,
            64,
            {"embed_tokens": {"bits": 6, "group_size": 32}, "router": False, "lm_head": {"bits": 8, "group_size": 64}},
            {
                "quantization": {
                    "group_size": 64,
                    "bits": 4,
                    "language_model.model.embed_tokens": {"group_size": 32, "bits": 6},
                    "language_model.lm_head": {"group_size": 64, "bits": 8},
                    "language_model.model.layers.0.feed_forward.router": False,
                }
            },
        ),
    ],
)
def test_logits_are_those_of_the_dequantized_weights(
    tmp_path: Path, kind: str, bits: int, group_size: int, others: dict[str, Any], config: dict[str, Any]
) -> None:
    """Attention, router, embeddings and head are quantized, too, unless they are excepted."""
    assert kind in KINDS
    quantized = written(tmp_path, kind, bits, group_size, others, **config)
    assert_equal_to_dequantized(quantized)
    rounded = load_checkpoint(quantized.folder)
    assert rounded(torch.tensor([[3, 1]])).dtype == torch.bfloat16  # what quantized weights are computed in by default
