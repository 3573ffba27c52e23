"""Loads safetensors shards of a published checkpoint into a Transformer or a VisionTower built on the meta device.

Headers are checked before any tensor is read: missing or extra tensors, wrong shapes, truncated files. On a CPU,
tensors already stored in the requested dtype stay memory-mapped; others are converted one at a time, so that peak
memory is the weights plus one tensor. Checkpoints are untrusted: no pickle, and no path outside the folder.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.config import TextConfig
from model.errors import CheckpointError
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.vision.tower import VisionTower
from model.weights.linearized import ExpertPart, empty_fused, expert_parts, missing_part, surplus_part
from model.weights.shards import DTYPES, EMBEDDINGS, text_tensors, vision_tensors
from model.weights.sources import StoredTensor


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    is_mapped: bool = True,
) -> Transformer:
    """Loads the text model of the checkpoint folder `path`.

    `dtype` is a torch.dtype, its name, or "auto", which keeps the dtype of the stored embeddings. On a CPU, weights
    stored in that dtype stay memory-mapped, unless `is_mapped` is false; per-expert weights are fused in memory.
    Raises CheckpointError and ConfigError.
    """
    folder = Path(path)
    config = TextConfig.from_folder(folder)
    model, stored = _checked_text(folder, config, attention)
    _fill(model, stored, _wanted_dtype(dtype, stored[EMBEDDINGS]), device, is_mapped)
    if config.tie_word_embeddings:
        _tie(folder, model, "lm_head.weight" in stored)
    return model.eval()


def load_vision(
    path: str | Path,
    config: VisionConfig,
    text_hidden_size: int,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    is_mapped: bool = True,
) -> VisionTower:
    """Loads the vision tower of the checkpoint folder `path`, for a text model of width `text_hidden_size`.

    `dtype`, `device` and `is_mapped` are as in `load_checkpoint`; "auto" keeps the dtype of the stored class
    embedding. Raises CheckpointError.
    """
    tower, stored = _checked_vision(Path(path), config, text_hidden_size)
    _fill(tower, stored, _wanted_dtype(dtype, stored["vision_model.class_embedding"]), device, is_mapped)
    return tower.eval()


def checked_tensors(folder: Path, config: TextConfig) -> dict[str, StoredTensor]:
    """The text model's tensors by their names in Transformer, checked to be complete, of the right shapes, no others.

    Per-expert weights keep their own names (see model.weights.linearized). Reads only the shards' headers. Raises
    CheckpointError.
    """
    return _checked_text(folder, config)[1]


def checked_vision_tensors(folder: Path, config: VisionConfig, text_hidden_size: int) -> dict[str, StoredTensor]:
    """The vision tower's tensors by their names in VisionTower, checked as in `checked_tensors`.

    Reads only the shards' headers. Raises CheckpointError.
    """
    return _checked_vision(folder, config, text_hidden_size)[1]


def can_be_mapped(tensors: dict[str, StoredTensor]) -> bool:
    """Whether the weights can stay memory-mapped, which per-expert weights cannot, as they must be fused."""
    return not expert_parts(tensors)


def stored_parameters(tensors: dict[str, StoredTensor], config: TextConfig) -> int:
    """Number of weights; tied embeddings count once."""
    return sum(
        math.prod(tensor.shape)
        for name, tensor in tensors.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    )


def _wanted_dtype(dtype: torch.dtype | str, example: StoredTensor) -> torch.dtype:
    if dtype == "auto":
        return DTYPES[example.dtype]
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or wanted not in DTYPES.values():
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return wanted


def _checked_text(
    folder: Path,
    config: TextConfig,
    attention: str = "sdpa",
) -> tuple[Transformer, dict[str, StoredTensor]]:
    """The model on the meta device, and its tensors."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    stored = text_tensors(folder)
    if config.tie_word_embeddings and EMBEDDINGS not in stored and "lm_head.weight" in stored:
        stored[EMBEDDINGS] = stored.pop("lm_head.weight")  # files may store either of the two
    _check_tensors(folder, model, stored, frozenset(["lm_head.weight"] if config.tie_word_embeddings else []))
    return model, stored


def _checked_vision(
    folder: Path,
    config: VisionConfig,
    text_hidden_size: int,
) -> tuple[VisionTower, dict[str, StoredTensor]]:
    with torch.device("meta"):
        tower = VisionTower(config, text_hidden_size)
    stored = vision_tensors(folder)
    if not stored:
        raise CheckpointError(
            f"{folder}: config.json describes a vision model, but none of its tensors is there; "
            "--no-images reads the text alone"
        )
    _check_tensors(folder, tower, stored)
    return tower, stored


def _check_tensors(
    folder: Path, model: nn.Module, stored: dict[str, StoredTensor], optional: frozenset[str] = frozenset()
) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    shapes, joined = dict(expected), {name: parts for name, parts in expert_parts(stored).items() if name in expected}
    for fused, parts in joined.items():
        experts = expected[fused][0]
        surplus = (min(parts), f"{fused} holds all experts") if fused in stored else surplus_part(parts, experts)
        if surplus is not None:
            raise CheckpointError(f"{stored[surplus[0]].file}: extra tensor {stored[surplus[0]].name}: {surplus[1]}")
        if (missing := missing_part(parts, experts)) is not None:
            raise CheckpointError(f"{folder}: tensor {missing} is missing, though other experts are there")
        shapes |= {name: part.shape(expected[fused]) for name, part in parts.items()}
    extra = sorted(stored.keys() - shapes.keys())
    for name in expected:
        if name not in stored and name not in optional and name not in joined:
            near = difflib.get_close_matches(name, extra, 1, 0.8)
            hint = f", though {stored[near[0]].name} is there" if near else ""
            raise CheckpointError(f"{folder}: tensor {name} is missing{hint}")
    for name in extra:
        raise CheckpointError(f"{stored[name].file}: extra tensor {stored[name].name}, which the model does not have")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)} instead of {list(shapes[name])}"
            )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def in_memory(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU. 16-bit experts (E, C_in, C_out) get the strides of (E, C_out, C_in), as in `empty_fused`."""
    if weights.dim() < 3 or dtype == torch.float32:
        return weights.to(dtype, copy=True)
    turned = torch.empty(len(weights), weights.shape[2], weights.shape[1], dtype=dtype)
    for expert, source in zip(turned, weights, strict=True):
        expert.copy_(source.to(dtype).t())
    return turned.transpose(1, 2)


def _fill(
    model: nn.Module, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device | str, is_mapped: bool
) -> None:
    """Loads the model's tensors file by file; on a CPU those of the requested dtype stay mapped if `is_mapped`."""
    by_file: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((name, tensor))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    on_cpu = torch.device(device).type == "cpu"
    for file, tensors in by_file.items():
        with _opened(file) as shard:
            for name, tensor in tensors:
                weights = shard.get_tensor(tensor.name)
                if (part := ExpertPart.of(name)) is not None:
                    if model.get_parameter(part.fused).is_meta:
                        _assign(model, part.fused, empty_fused(shapes[part.fused], dtype, device))
                    part.place(model.get_parameter(part.fused)).copy_(weights)
                elif on_cpu and not (is_mapped and weights.dtype == dtype):
                    _assign(model, name, in_memory(weights, dtype))
                else:
                    _assign(model, name, weights.to(device=device, dtype=dtype))


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter, nn.Parameter(tensor, requires_grad=False))


def _tie(folder: Path, model: Transformer, stored_apart: bool) -> None:
    embeddings = model.model.embed_tokens.weight
    if stored_apart and not torch.equal(model.lm_head.weight, embeddings):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embeddings, though tie_word_embeddings is "
            "true (transformers 4 would take the embeddings, 5 lm_head.weight, which false in "
            "config.json makes plain)"
        )
    model.lm_head.weight = embeddings
