"""Checkpoints quantized by bitsandbytes compute what their dequantized weights compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.errors import CheckpointError
from model.weights.loading import load_checkpoint
from support.quantized_checkpoints import SINGLE, Quantized, assert_equal_to_dequantized, quantize

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SKIPPED = ("router", "lm_head", "embed_tokens", "vision_model", "multi_modal_projector")  # as transformers does
CONFIG = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def quantized_by(kind: str, is_double: bool, skipped: tuple[str, ...] = SKIPPED) -> Callable[[str, Tensor], Any]:
    def quantize_one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if weight.dim() == 1 or any(part in name for part in skipped):
            return {name: weight}, weight
        if kind == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            stored = {name: codes, f"{name.removesuffix('weight')}SCB": absmax}
            return stored, functional.int8_vectorwise_dequant(codes, absmax)
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=is_double, quant_type=kind)
        packed = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        return {name: codes, **packed}, functional.dequantize_4bit(codes, state)

    return quantize_one


@pytest.mark.parametrize(
    ("kind", "quant_type", "is_double", "is_stacked"),
    [
        ("dense and MoE", "nf4", True, False),
        ("dense and MoE", "fp4", False, True),
        ("MoE, nested", "nf4", True, True),
        ("MoE, nested", "nf4", False, False),
        ("dense and MoE", "int8", False, False),
    ],
)
def test_logits_are_those_of_the_dequantized_weights(
    tmp_path: Path, kind: str, quant_type: str, is_double: bool, is_stacked: bool
) -> None:
    """Experts one by one, as transformers writes them, or stacked, as others do."""
    assert_equal_to_dequantized(
        quantize(tmp_path, kind, quantized_by(quant_type, is_double), is_stacked=is_stacked, **CONFIG)
    )


def test_experts_may_have_been_left_in_16_bits(tmp_path: Path) -> None:
    """Many files called 4-bit are so: the tool did not know fused experts."""
    quantized = quantize(tmp_path, "MoE, nested", quantized_by("nf4", True, (*SKIPPED, ".experts.")), is_stacked=True)
    assert_equal_to_dequantized(quantized)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("bitsandbytes")
    return quantize(folder, "dense and MoE", quantized_by("nf4", True), is_stacked=False, **CONFIG)


EXPERT = "model.layers.1.feed_forward.experts.1.up_proj"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{EXPERT}.weight"), f"tensor {EXPERT}.weight"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(EXPERT)], f"tensor {EXPERT}.weight is missing"),
        (lambda t: t.update({f"{EXPERT}.weight": torch.ones(256, 128)}), f"tensor {EXPERT}.weight"),
        (lambda t: t.update({f"{EXPERT}.activation_fn.scales": torch.ones(1)}), "activation_fn.scales"),
        (lambda t: t.update({f"{EXPERT}.bias": torch.ones(1)}), f"tensor {EXPERT}.bias"),
    ],
)
def test_damage_is_named(
    whole: Quantized, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], what: str
) -> None:
    copy = whole.copy(tmp_path / "copy")
    copy.change(change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy.folder)
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_that_is_cut_short_is_refused(whole: Quantized, tmp_path: Path) -> None:
    copy = whole.copy(tmp_path / "copy")
    file = copy.folder / SINGLE
    assert len(load_file(file)) > 9
    for cut in (1, 1000, file.stat().st_size - 4):
        file.write_bytes((whole.folder / SINGLE).read_bytes()[:-cut])
        with pytest.raises(CheckpointError, match=SINGLE):
            load_checkpoint(copy.folder)
