"""Toy checkpoints rewritten in quantized forms, and what their libraries dequantize them to in the published layout.

What quantizes and what saves are the callers' affair.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import TextConfig
from model.quantization.form import StoredMatrix, Weight
from model.transformer import Transformer
from model.weights.loading import checked_sources, load_checkpoint
from support.toy_checkpoints import MAVERICK, SCOUT, VOCABULARY, Kind, write_kind

SIZES = {  # whole groups of 64 in every row, and whole groups of scales in an expert; still all different
    "hidden_size": 128,
    "intermediate_size": 256,
    "intermediate_size_mlp": 320,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "num_local_experts": 3,
}
KINDS = {
    "dense and MoE": Kind(SIZES | MAVERICK),
    "MoE, nested": Kind(SIZES | SCOUT, nested=True),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Quantize = Callable[[str, Tensor], tuple[Mapping[str, Any], Tensor]]
"""A weight's name and its matrix or stack -> its tensors by full name, and their float32 dequantization."""


@dataclass(frozen=True)
class Quantized:
    folder: Path
    plain: Path  # the same weights, dequantized to float32 and fused as published
    weights: Mapping[str, Tensor]  # dequantized, by the names of the parts

    def copy(self, folder: Path) -> Quantized:
        """A copy of the quantized folder, to be damaged."""
        return replace(self, folder=Path(shutil.copytree(self.folder, folder)))

    def change(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        """Changes the stored tensors, by full name, and saves them."""
        tensors = {name: tensor.clone() for name, tensor in load_file(self.folder / SINGLE).items()}
        edit(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, self.folder / SINGLE, {"format": "pt"})

    def configure(self, **fields: Any) -> None:
        file = self.folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def quantize(
    folder: Path,
    kind: str,
    quantize_one: Quantize,
    *,
    is_stacked: bool,
    save: Callable[[dict[str, Any], Path], object] = lambda tensors, file: save_file(tensors, file, {"format": "pt"}),
    std: float = 0.05,
    **config: Any,
) -> Quantized:
    """Writes `folder`/quantized and `folder`/plain. Experts are stacked by kind, or stored one by one."""
    source, out = folder / "source", Quantized(folder / "quantized", folder / "plain", {})
    write_kind(source, kind, KINDS[kind], std, seed=7)
    stored: dict[str, Any] = {}
    plain: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(source / SINGLE).items():
        parts = _apart(name, tensor, is_stacked=is_stacked)
        for part, weight in parts.items():
            tensors, weights[part] = quantize_one(part, weight.contiguous())
            stored |= tensors
        plain[name] = _joined([weights[part] for part in parts], tensor).float().contiguous()
    for copy in (out.folder, out.plain):
        shutil.copytree(source, copy)
        (copy / SINGLE).unlink()
    save(stored, out.folder / SINGLE)
    save_file(plain, out.plain / SINGLE, {"format": "pt"})
    out.configure(**config)
    return Quantized(out.folder, out.plain, weights)


def _apart(name: str, tensor: Tensor, *, is_stacked: bool) -> dict[str, Tensor]:
    """Fused experts (E, C_in, C_out) as stacks or matrices (C_out, C_in), all of a kind after each other."""
    experts, _, fused = name.rpartition(".")
    if not experts.endswith(".experts"):
        return {name: tensor}
    kinds = ("down",) if fused == "down_proj" else ("gate", "up")
    stacks = dict(zip(kinds, tensor.transpose(1, 2).chunk(len(kinds), dim=1), strict=True))
    if is_stacked:
        return {f"{experts}.{kind}_proj.weight": stack for kind, stack in stacks.items()}
    return {f"{experts}.{e}.{kind}_proj.weight": m for kind, stack in stacks.items() for e, m in enumerate(stack)}


def _joined(parts: list[Tensor], fused: Tensor) -> Tensor:
    """The opposite of `_apart`, given the tensor that was taken apart."""
    if len(parts) == 1 and parts[0].shape == fused.shape:
        return parts[0]
    e, c_in = fused.shape[:2]
    rows = parts[0].shape[-2]  # of one kind
    stacks = torch.cat([part.reshape(-1, rows, c_in) for part in parts]).view(-1, e, rows, c_in)
    return torch.cat(list(stacks), dim=1).transpose(1, 2)


def assert_equal_to_dequantized(quantized: Quantized) -> None:
    """In float32: the same weights bit for bit, and logits within 1e-5, for a batch, its rows and single tokens.

    And every stored tensor of the text model is part of just one weight.
    """
    sources = checked_sources(quantized.folder, TextConfig.from_folder(quantized.folder)).values()
    used = [tensor.name for source in sources for tensor in source.tensors.values()]
    stored = {
        key for key in load_file(quantized.folder / SINGLE) if not key.startswith(("vision_model", "multi_modal"))
    }
    assert len(used) == len(set(used)) and stored == set(used)
    model = load_checkpoint(quantized.folder, dtype=torch.float32)
    expected = load_checkpoint(quantized.plain, dtype=torch.float32)
    for name, weight in quantized.weights.items():
        if not name.startswith(("vision_model", "multi_modal_projector")):
            assert torch.equal(_loaded(model, name.removeprefix("language_model.")), weight.float()), name
    ids = torch.randint(VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
    wanted = expected(ids)
    assert (model(ids) - wanted).abs().max() <= 1e-5
    for row in range(2):
        assert (model(ids[row : row + 1]) - wanted[row]).abs().max() <= 1e-5
        assert (model(ids[row : row + 1, :1]) - wanted[row, :1]).abs().max() <= 1e-5


def _loaded(model: Transformer, name: str) -> Tensor:
    """A loaded weight in float32, by its name in the file."""
    path, _, parameter = name.rpartition(".")
    experts, between, part = path.partition(".experts.")
    if not between:
        return _expanded(getattr(model.get_submodule(path), parameter))
    loaded = model.get_submodule(f"{experts}.experts")
    *number, kind = part.removesuffix("_proj").split(".")
    chosen = [loaded.experts[int(number[0])]] if number else loaded.experts
    found = [_expanded(getattr(expert, kind)) for expert in chosen]
    return found[0] if number else torch.stack(found)


def _expanded(weight: Weight) -> Tensor:
    return weight.expanded() if isinstance(weight, StoredMatrix) else weight.float()
