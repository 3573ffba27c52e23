"""Random weights for a configuration: a model in memory, or a checkpoint for engines that read files.

Both hold the same values in any dtype: drawn in float32 from one seed, N(0, 0.02); norms are 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import TextConfig
from model.transformer import Transformer
from model.weights.loading import in_memory
from model.weights.owners import Owner
from model.weights.tiers import held_bytes

STANDARD_DEVIATION, SEED = 0.02, 1
PIECE_ELEMENTS = 2**24
"""Drawn at a time, so that little more memory is needed than for the weights."""

SHARD_BYTES = 2 * 2**30


def random_model(
    config: TextConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str = "sdpa"
) -> Transformer:
    """A model with random weights in this dtype on this device."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    for name, tensor in _drawn(model, dtype, torch.device(device)):
        module, _, parameter = name.rpartition(".")
        tensor = in_memory(tensor, dtype) if tensor.device.type == "cpu" and tensor.dim() == 3 else tensor
        setattr(model.get_submodule(module), parameter, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def write_random_checkpoint(raw: dict[str, Any], config: TextConfig, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint folder of the text model: shards, their index, and a flat config.json."""
    with torch.device("meta"):
        model = Transformer(config)
    shards: dict[str, list[str]] = {}
    shard: dict[str, Tensor] = {}

    def write_shard() -> None:
        name = f"model-{len(shards) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        shards[name] = list(shard)
        shard.clear()

    for name, tensor in _drawn(model, dtype, torch.device("cpu")):
        if shard and sum(part.nbytes for part in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write_shard()
        shard[name] = tensor
    write_shard()
    index = {"metadata": {}, "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(flat_config(raw, dtype)), encoding="utf-8")


def flat_config(raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The text model's part of a config.json, as a config.json of its own."""
    text = raw.get("text_config") if raw.get("model_type") == "llama4" else None
    fields = dict(text) if isinstance(text, dict) else dict(raw)
    return fields | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": str(dtype).removeprefix("torch."),
    }


def _drawn(model: Transformer, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter; tied parameters once."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=dtype, device=device)
        if "norm" not in name:
            for piece in tensor.view(-1).split(PIECE_ELEMENTS):
                piece.copy_(torch.randn(len(piece), generator=generator).mul_(STANDARD_DEVIATION))
        yield name, tensor


def token_weight_bytes(model: Transformer) -> int:
    """Bytes of weights that decoding a token reads, as they are stored: of routed experts the token's, and the
    embeddings where they are the output matrix too."""
    config, held = model.config, Counter[Owner]()
    for (owner, _), count in held_bytes([model]).items():
        held[owner] += count
    if not config.tie_word_embeddings:
        held[Owner.EMBEDDINGS] //= config.vocab_size
    held[Owner.ROUTED] = held[Owner.ROUTED] * config.num_experts_per_tok // config.num_local_experts
    return held.total()
