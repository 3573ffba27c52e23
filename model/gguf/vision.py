"""The vision tower of a model in GGUF files: a file of its own beside them, mmproj-*.gguf. Imports no torch.

Names and fields are those of llama.cpp's converter for the projector type llama4.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.gguf.files import SUFFIX, VISION_PREFIX, GgufModel, names_in, read_gguf
from model.gguf.header import Strings, is_gguf

PROJECTOR = "llama4"
ROPE_THETA = 10000.0
"""What llama.cpp computes with; the file does not say it."""

PATCH_TOKEN = "<|patch|>"
_TOP = {
    "v.class_embd": "vision_model.class_embedding",
    "v.position_embd.weight": "vision_model.positional_embedding_vlm",
    "v.patch_embd.weight": "vision_model.patch_embedding.linear.weight",
    "v.pre_ln": "vision_model.layernorm_pre",
    "v.post_ln": "vision_model.layernorm_post",
    "mm.model.mlp.1.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "mm.model.mlp.2.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "mm.model.fc.weight": "multi_modal_projector.linear_1.weight",
}
_OF_LAYER = {
    "ln1": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "attn_post_norm": "post_attention_layernorm",  # as later converters call it, whose names follow another model too
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_BLOCK = re.compile(r"v\.blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")


def vision_weight_name(stored: str) -> str | None:
    """The weight's name in VisionTower; None for others."""
    if (found := _BLOCK.fullmatch(stored)) is not None:
        ours = _OF_LAYER.get(found[2])
        return None if ours is None else f"vision_model.model.layers.{found[1]}.{ours}.{found[3]}"
    if stored in _TOP:
        return _TOP[stored]
    name, _, kind = stored.rpartition(".")
    return f"{_TOP[name]}.{kind}" if name in ("v.pre_ln", "v.post_ln") and kind in ("weight", "bias") else None


def find_vision(folder: Path) -> Path | None:
    """The file of Llama 4's vision tower in a folder, mmproj-*.gguf: the first by name if there are several precisions.

    Those of other models are passed over. Raises CheckpointError for a damaged one.
    """
    for name in names_in(folder):
        if name.startswith(VISION_PREFIX) and name.endswith(SUFFIX) and is_gguf(folder / name):
            said = read_gguf(folder / name).metadata
            if said.get("clip.vision.projector_type", said.get("clip.projector_type")) == PROJECTOR:
                return folder / name
    return None


def with_vision(text: dict[str, Any], model: GgufModel) -> dict[str, Any]:
    """The fields of a config.json: those of the text model, and of a vision tower if its file is there.

    Raises CheckpointError and ConfigError.
    """
    file = find_vision(model.path.parent)
    if file is None:
        return text
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    listed = list(tokens) if isinstance(tokens, Strings) else []
    image_token = {"image_token_index": listed.index(PATCH_TOKEN)} if PATCH_TOKEN in listed else {}
    return {"model_type": "llama4", "text_config": text, "vision_config": _fields(read_gguf(file)), **image_token}


def _fields(model: GgufModel) -> dict[str, Any]:
    def integer(key: str) -> int:
        value = model.metadata.get(f"clip.vision.{key}")
        if type(value) is not int or value < 1:
            raise ConfigError(f"{model.path}: clip.vision.{key}: {str(value)[:60]!r} is not a positive integer")
        return value

    def rows(name: str) -> int:
        if name not in model.tensors:
            raise ConfigError(f"{model.path}: tensor {name} is missing")
        return model.tensors[name].shape[0]

    outputs = rows("mm.model.mlp.2.weight")
    return {
        "hidden_size": integer("embedding_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": integer("attention.head_count"),
        "intermediate_size": integer("feed_forward_length"),
        "image_size": integer("image_size"),
        "patch_size": integer("patch_size"),
        "pixel_shuffle_ratio": 1 / integer("projector.scale_factor"),
        "projector_input_dim": rows("mm.model.mlp.1.weight"),
        "projector_output_dim": outputs,
        "vision_output_dim": outputs,
        "rope_theta": ROPE_THETA,
    }
