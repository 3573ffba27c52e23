"""GGUF files of toy checkpoints, written with the format's own library from what `transformers` saved.

Knows nothing of our readers; names and layouts are those of llama.cpp's converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TypeOf = Callable[[str, tuple[int, ...]], str]


def text_fields(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """The text model's weights by GGUF's names; experts (E, C_out, C_in)."""
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            text = name.removeprefix("language_model.")
            if "vision_model" in text or "multi_modal" in text:
                continue
            layer, _, inner = text.removeprefix("model.layers.").partition(".")
            if inner.endswith("gate_up_proj"):
                gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
                found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            elif inner.endswith("experts.down_proj"):
                found[f"blk.{layer}.ffn_down_exps.weight"] = tensor.transpose(1, 2)
            elif text.startswith("model.layers."):
                found[f"blk.{layer}.{LAYER_NAMES[inner.removesuffix('.weight')]}.weight"] = tensor
            else:
                found[f"{TOP_NAMES[text.removesuffix('.weight')]}.weight"] = tensor
    return found


def rope_factors(fields: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the frequencies, as llama.cpp's converter computes them for llama3's scaling."""
    config = Llama4TextConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures")})
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return (plain / scaled.double()).float()


def all_in(name: str) -> TypeOf:
    """Matrices in this type, as far as their rows are whole blocks; norms and routers in F32."""
    return lambda tensor, shape: "F32" if len(shape) < 2 or "gate_inp" in tensor else name


IN_FLOAT32 = all_in("F32")


def write_gguf(
    file: Path, folder: Path, type_of: TypeOf = IN_FLOAT32, *, per_part: int = 0, with_tokenizer: bool = False
) -> dict[str, Tensor]:
    """Writes the checkpoint in `folder`; `per_part` tensors a part if not 0.

    Returns the weights that the file stands for, by GGUF's names, in float32.
    """
    fields = text_fields(folder)
    writer = gguf.GGUFWriter(file, "llama4", split_max_tensors=per_part)
    _add_sizes(writer, fields)
    if with_tokenizer:
        add_tokenizer(writer, folder)
    weights = stored_weights(folder)
    if fields.get("tie_word_embeddings"):
        weights.pop("output.weight", None)
    meant = {}
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[type_of(name, tuple(tensor.shape))]
        blocks = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        meant[name] = torch.from_numpy(numpy.array(gguf.quants.dequantize(blocks, kind))).view(tensor.shape)
    factors = rope_factors(fields)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _add_sizes(writer: Any, fields: Mapping[str, Any]) -> None:
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_rope_freq_base((fields.get("rope_parameters") or fields)["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_expert_count(fields["num_local_experts"])
    writer.add_expert_used_count(fields["num_experts_per_tok"])
    writer.add_interleave_moe_layer_step(fields.get("interleave_moe_layer_step", 1))
    writer.add_vocab_size(fields["vocab_size"])


def add_tokenizer(writer: Any, folder: Path, pre: str = "llama4") -> None:
    """The vocabulary of a tokenizer.json, as the converter writes it."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {token_id: (token, gguf.TokenType.NORMAL) for token, token_id in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    ids = {token: token_id for token_id, (token, _) in tokens.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens[token_id][0] for token_id in range(len(tokens))])
    writer.add_token_types([int(tokens[token_id][1]) for token_id in range(len(tokens))])
    writer.add_token_merges(merges)
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(ids[token if isinstance(token, str) else token["content"]])
    if isinstance(settings.get("add_bos_token"), bool):
        writer.add_add_bos_token(settings["add_bos_token"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


VISION_NAMES = {
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}


def write_mmproj(file: Path, folder: Path, projector: str = "llama4") -> None:
    """The vision tower of the checkpoint in `folder`, in float32; the library's own name map finds its layers."""
    fields = json.loads((folder / "config.json").read_text())["vision_config"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, fields["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_clip_projector_type(projector)
    writer.add_vision_image_size(fields["image_size"])
    writer.add_vision_patch_size(fields["patch_size"])
    writer.add_vision_embedding_length(fields["hidden_size"])
    writer.add_vision_feed_forward_length(fields["intermediate_size"])
    writer.add_vision_block_count(fields["num_hidden_layers"])
    writer.add_vision_head_count(fields["num_attention_heads"])
    writer.add_vision_projector_scale_factor(round(1 / fields["pixel_shuffle_ratio"]))
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            text = name.removeprefix("model.")
            if text.startswith(("vision_model.", "multi_modal_projector.")):
                stored = VISION_NAMES.get(text) or names.get_name(text, (".weight", ".bias"))
                assert stored is not None, name
                writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
