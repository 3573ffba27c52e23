"""Toy checkpoints that compressed-tensors compresses or that modelopt and FBGEMM would write, each with its twin.

The twin holds the same weights dequantized to float32, in the published form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from support.compressed import Recipe, in_float32, parameters
from support.fused_experts import fp8_per_row, nvfp4, turned
from support.toy_checkpoints import BASE, Kind, oracle_model

SIZES = BASE | {"hidden_size": 48, "intermediate_size": 80, "intermediate_size_mlp": 112, "head_dim": 16}
"""Multiples of 16, each different from the others; attention is 96 and 32 wide."""
NOT_TEXT = ["re:.*router", "re:vision_model.*", "re:multi_modal_projector.*"]
STORED = "model.safetensors"


class Apart(nn.Module):
    """Experts as tools that quantize have them: a module for each."""

    def __init__(self, experts: Llama4TextExperts) -> None:
        super().__init__()
        for number, (first, second) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = first.chunk(2, dim=-1)
            expert = nn.Module()
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", second)):
                linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
                linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
                setattr(expert, name, linear)
            self.add_module(str(number), expert)

    def joined(self) -> dict[str, Tensor]:
        """The parameters of the fused form, given that every expert's weights are there as numbers."""
        experts = list(self.children())
        first = [torch.cat([e.gate_proj.weight, e.up_proj.weight]).t() for e in experts]
        return {"gate_up_proj": torch.stack(first), "down_proj": torch.stack([e.down_proj.weight.t() for e in experts])}


def write_compressed(
    folder: Path, kind: Kind, groups: dict[str, tuple[Recipe, list[str]]], ignore: list[str], **saving: Any
) -> None:
    """Writes a toy of this kind, compressed by the library, into `folder / "stored"`, and its twin into `"twin"`.

    `groups`: recipes and their targets by name.
    """
    model = _model(kind)
    for feed_forward in _feed_forwards(model):
        feed_forward.experts = Apart(feed_forward.experts)
    schemes = {
        name: recipe.scheme.model_copy(update={"targets": targets}) for name, (recipe, targets) in groups.items()
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=schemes, ignore=[*NOT_TEXT, *ignore]))
    quantized = {
        module: next(r for r, _ in groups.values() if r.arguments == module.quantization_scheme.weights)
        for module in model.modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    for module, recipe in quantized.items():
        for name, value in parameters(recipe, module.weight.data).items():
            getattr(module, name).data = value
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "stored", **saving)
    compressor.update_config(str(folder / "stored"))
    for module, recipe in quantized.items():
        tensors = dict(module.named_parameters())
        weight = in_float32(recipe, {name: parameter.data for name, parameter in tensors.items()})
        for name in tensors:
            delattr(module, name)
        module.weight = nn.Parameter(weight, requires_grad=False)
    _write_twin(folder / "twin", kind, model)


def write_fused(folder: Path, kind: Kind, form: str, *, has_prefix: bool = True) -> None:
    """Writes a toy of this kind as modelopt ("FP8", "NVFP4") or FBGEMM ("fbgemm_fp8") would, and its twin.

    Without a prefix, the text model's tensors in a nested checkpoint are named as if there were nothing else.
    """
    model = _model(kind)
    _write(model, folder / "stored")
    file = folder / "stored" / STORED
    stored, exact = {}, {}
    for name, tensor in load_file(file).items():
        stored_name = name if has_prefix else name.removeprefix("language_model.")
        if not name.endswith(("_proj", "_proj.weight")) or "vision" in name:
            stored[stored_name] = tensor
            continue
        is_fused = not name.endswith(".weight")
        matrix = tensor.transpose(-1, -2) if is_fused else tensor
        parts, value = _quantized(form, matrix, is_fused, is_down=".down_proj" in name)
        stored |= {stored_name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()}
        exact[name] = value.transpose(-1, -2) if is_fused else value
    save_file(stored, file, {"format": "pt"})
    method = {"quant_method": form} if form == "fbgemm_fp8" else {"quant_method": "modelopt", "quant_algo": form}
    config = json.loads((folder / "stored/config.json").read_text())
    ignored = ["vision_model*", "multi_modal_projector*", "*router", "*lm_head"]
    config["quantization_config"] = method | {"ignore": ignored, "activation_scale_ub": 1200.0}
    (folder / "stored/config.json").write_text(json.dumps(config))
    _write(oracle_model(kind, 0.25, seed=11), folder / "twin")
    twin = load_file(folder / "twin" / STORED)
    save_file(twin | {name: value.contiguous() for name, value in exact.items()}, folder / "twin" / STORED)


def _model(kind: Kind) -> Any:
    """Its parameters in the kind's dtype; rotary frequencies, which are complex numbers, stay as they are."""
    model = oracle_model(kind, 0.25, seed=11)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind.dtype)
    return model


def _quantized(form: str, matrix: Tensor, is_fused: bool, is_down: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a matrix (..., C_out, C_in) by what follows the module's name, and its numbers."""
    joint = "_weight" if is_fused else ".weight"
    base = "" if is_fused else ".weight"
    if form == "NVFP4":
        codes, scale, factor, exact = nvfp4(matrix)
        codes, scale = (turned(codes), turned(scale)) if is_fused else (codes, scale)
        others = {f"{joint}_scale_2": factor, f"{joint.replace('weight', 'input')}_scale": torch.tensor(0.5)}
        return {base: codes, f"{joint}_scale": scale, **others}, exact
    if form == "FP8":
        scale = matrix.float().abs().max() / 448
        codes = (matrix.float() / scale).to(torch.float8_e4m3fn)
        exact = codes.float() * scale
        others = {f"{joint.replace('weight', 'input')}_scale": torch.tensor(0.5)}
        return {base: turned(codes) if is_fused else codes, f"{joint}_scale": scale, **others}, exact
    codes, scale, exact = fp8_per_row(matrix)
    if not is_fused:
        return {base: codes, ".weight_scale": scale.unsqueeze(-1)}, exact
    return {base: turned(codes), "_scale": scale.unsqueeze(-1 if is_down else -2)}, exact


def _write(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]


def _write_twin(folder: Path, kind: Kind, decompressed: nn.Module) -> None:
    twin = oracle_model(kind, 0.25, seed=11)
    for feed_forward, source in zip(_feed_forwards(twin), _feed_forwards(decompressed), strict=True):
        for name, value in source.experts.joined().items():
            getattr(feed_forward.experts, name).data = value.float().contiguous()
        source.experts = nn.Module()
    left = {name: value.float() for name, value in decompressed.state_dict().items()}
    missing, extra = twin.load_state_dict(left, strict=False)
    assert not extra and all(".experts." in name for name in missing), (missing, extra)
    _write(twin, folder)


def _feed_forwards(model: nn.Module) -> Iterator[Any]:
    """Of the layers with experts."""
    yield from (module for module in model.modules() if type(module).__name__ == "Llama4TextMoe")
