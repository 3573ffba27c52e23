"""What inspect says of a quantized checkpoint: its format, its schemes, and what is not quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import TextConfig
from model.costs import parameter_count
from support.inspection_checks import inspected, whats
from support.quantized_checkpoints import Quantized, quantize

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from support.mlx_arrays import from_torch, to_torch  # noqa: E402

SETTINGS = {"bits": 4, "group_size": 64}


def quantize_one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """MLX with 4 bits; attention is left as it is."""
    if weight.dim() == 1 or "self_attn" in name:
        return {name: weight}, weight
    path, parts = name.removesuffix(".weight"), mx.quantize(from_torch(weight), bits=4, group_size=64)
    return {
        f"{path}.{part}": to_torch(a) for part, a in zip(("weight", "scales", "biases"), parts, strict=True)
    }, weight


@pytest.fixture
def quantized(tmp_path: Path) -> Quantized:
    return quantize(tmp_path, "dense and MoE", quantize_one, is_stacked=True, quantization=SETTINGS)


def test_forms_are_named_and_counted(quantized: Quantized) -> None:
    report, text = inspected(quantized.folder)
    weights, config = report["weights"], TextConfig.from_folder(quantized.folder)
    int4, plain = "int4 (affine, groups of 64)", "float32"
    assert weights["stored_as"] == f"MLX: {int4}; not quantized: attention"
    assert weights["parameters"] == parameter_count(config)
    assert sum(share["bytes"] for share in weights["by_owner"]) == weights["bytes"]
    forms: dict[str, Any] = {share["owner"]: share for share in weights["by_owner"] if share["stored"] == int4}
    assert list(forms) == [
        "shared experts",
        "routed experts",
        "dense layers",
        "routers, norms, biases",
        "embeddings",
        "head",
    ]
    routed = forms["routed experts"]
    assert routed["bytes"] == routed["parameters"] * (4 + 2 * 32 / 64) / 8  # float32 scales and biases
    lines = text.splitlines()
    assert f"stored as        MLX: {int4}; not quantized: attention" in lines
    assert any(line.startswith("by owner         attention ") and line.endswith(plain) for line in lines)


def test_experts_left_in_16_bits_are_told(tmp_path: Path) -> None:
    """Many files called 4-bit are so, and several times as large as their names say."""

    def all_but_experts(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return ({name: weight.bfloat16()}, weight.bfloat16()) if ".experts." in name else quantize_one(name, weight)

    made = quantize(tmp_path, "dense and MoE", all_but_experts, is_stacked=True, quantization=SETTINGS)
    report, _ = inspected(made.folder)
    line = report["weights"]["stored_as"]
    assert line == "MLX: int4 (affine, groups of 64); not quantized: attention, routed experts"
    (routed,) = (share for share in report["weights"]["by_owner"] if share["owner"] == "routed experts")
    assert routed["stored"] == "bfloat16" and routed["bytes"] == 2 * routed["parameters"]
    weights = sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    assert 0 <= weights - report["weights"]["bytes"] < 0.02 * weights  # but the header


def test_damage_is_reported_once_and_by_its_tensor(quantized: Quantized) -> None:
    path = "model.layers.1.feed_forward.experts.up_proj"
    quantized.change(lambda tensors: tensors.update({f"{path}.scales": torch.ones(3, 256, 1)}))
    report, text = inspected(quantized.folder)
    assert report["weights"]["stored_as"] is None and report["weights"]["by_owner"] == []
    (damage,) = (what for what in whats(report) if path in what)
    assert damage.endswith(f"tensor {path}.biases has shape [3, 256, 2] instead of [3, 256, 1]")
    assert "stored as" not in text
