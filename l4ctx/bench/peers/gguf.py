"""A GGUF file of a Llama 4 checkpoint, for llama.cpp to run the same work: weights and sizes, but no vocabulary.

Enough to compare speed, not to generate text: rotary scaling is left out. llama.cpp hard-codes the attention chunk size
and the interval of NoPE layers, so only configurations that agree with it are written. Tensor names and layouts follow
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs the package gguf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import TextConfig
from model.costs import kv_size, query_size

if TYPE_CHECKING:
    from torch import Tensor

ITEMSIZES = {"f32": 4, "f16": 2, "bf16": 2}
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
CHUNK_SIZE, NOPE_INTERVAL, EXPERTS_WITHOUT_QK_NORM = 8192, 4, 128  # hard-coded in llama.cpp for this architecture

NAMES = {  # of a layer's tensors; those of the experts, which are split and transposed, are named in `entries`
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GGUFError(Exception):
    """A configuration that llama.cpp computes differently, or not at all."""


class Entry(NamedTuple):
    """A tensor of the file: its origin, and its shape with the outermost dimension first."""

    name: str
    source: str  # name in the checkpoint
    part: str  # "all"; of an expert's tensor: "gate", "up" or "down"
    shape: tuple[int, ...]
    in_float32: bool


def check_supported(config: TextConfig) -> None:
    """Raises GGUFError, with the name of the field, for what llama.cpp cannot run."""
    c = config
    if not c.moe_layers:
        raise GGUFError("no layer has experts, and llama.cpp supports no such model of this architecture")
    flags = tuple(int((i + 1) % NOPE_INTERVAL != 0) for i in range(c.num_hidden_layers))
    for name, value, only in (
        ("attention_chunk_size", c.attention_chunk_size, CHUNK_SIZE),
        ("no_rope_layers", c.no_rope_layers, flags),
        ("attention_bias", c.attention_bias, False),
        ("use_qk_norm", c.use_qk_norm, c.num_local_experts != EXPERTS_WITHOUT_QK_NORM),
        ("moe_layers", c.moe_layers, tuple(range(moe_step(c) - 1, c.num_hidden_layers, moe_step(c)))),
    ):
        if value != only:
            raise GGUFError(f"{name} is {value}, and llama.cpp supports only {only}")


def moe_step(config: TextConfig) -> int:
    """The interval of layers with experts; if they are irregular, that of the first."""
    return config.moe_layers[0] + 1 if config.moe_layers else 1


def entries(config: TextConfig) -> Iterator[Entry]:
    """The tensors of the file, in order. Norms and routers stay float32, as llama.cpp's own files have them."""
    c, e, i = config.hidden_size, config.num_local_experts, config.intermediate_size
    q, kv = query_size(config), kv_size(config)
    for source, name in TOP_NAMES.items():
        is_norm = "norm" in name
        if source != "lm_head.weight" or not config.tie_word_embeddings:
            yield Entry(name, source, "all", (c,) if is_norm else (config.vocab_size, c), is_norm)
    for layer in range(config.num_hidden_layers):
        width = config.intermediate_size_mlp
        shapes = {
            "input_layernorm": (c,),
            "post_attention_layernorm": (c,),
            "self_attn.q_proj": (q, c),
            "self_attn.k_proj": (kv, c),
            "self_attn.v_proj": (kv, c),
            "self_attn.o_proj": (c, q),
        }
        if config.is_moe(layer):
            shapes |= {
                "feed_forward.router": (e, c),
                "feed_forward.shared_expert.gate_proj": (i, c),
                "feed_forward.shared_expert.up_proj": (i, c),
                "feed_forward.shared_expert.down_proj": (c, i),
            }
        else:
            shapes |= {
                "feed_forward.gate_proj": (width, c),
                "feed_forward.up_proj": (width, c),
                "feed_forward.down_proj": (c, width),
            }
        for module, shape in shapes.items():
            in_float32 = "norm" in module or "router" in module
            yield Entry(
                f"blk.{layer}.{NAMES[module]}.weight", f"model.layers.{layer}.{module}.weight", "all", shape, in_float32
            )
        if config.is_moe(layer):
            experts = f"model.layers.{layer}.feed_forward.experts"
            for part, shape in (("gate", (e, i, c)), ("up", (e, i, c)), ("down", (e, c, i))):
                source = f"{experts}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
                yield Entry(f"blk.{layer}.ffn_{part}_exps.weight", source, part, shape, False)


def gguf_bytes(config: TextConfig, kind: str) -> int:
    """Bytes of all tensors, without the small header."""
    return sum(math.prod(entry.shape) * (4 if entry.in_float32 else ITEMSIZES[kind]) for entry in entries(config))


def write_gguf(folder: Path, config: TextConfig, file: Path, kind: str) -> None:
    """Writes the checkpoint in `folder` to `file`, in "f32", "f16" or "bf16", with one tensor in memory at a time.

    Raises GGUFError, and CheckpointError for an incomplete checkpoint.
    """
    import gguf
    from safetensors import safe_open

    from model.weights.loading import checked_sources
    from model.weights.plain import PlainScheme

    check_supported(config)
    sources = checked_sources(folder, config)
    is_fused = all(entry.source in sources for entry in entries(config))
    if not (is_fused and all(isinstance(source.scheme, PlainScheme) for source in sources.values())):
        raise GGUFError(f"{folder}: its experts are stored apart, or it is quantized: that is not converted to GGUF")
    stored = {name: source.tensors["weight"] for name, source in sources.items()}
    types = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "bf16": gguf.GGMLQuantizationType.BF16,
    }
    writer = gguf.GGUFWriter(file, "llama4")
    _add_sizes(writer, config)
    listed = list(entries(config))
    for entry in listed:
        own = "f32" if entry.in_float32 else kind
        count = ITEMSIZES[own]
        as_bytes = (*entry.shape[:-1], entry.shape[-1] * count)
        writer.add_tensor_info(entry.name, as_bytes, _uint8(), math.prod(as_bytes), raw_dtype=types[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ExitStack() as stack:
        shards: dict[Path, Any] = {}
        for entry in listed:
            tensor = stored[entry.source]
            if tensor.file not in shards:
                shards[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
            own = "f32" if entry.in_float32 else kind
            writer.write_tensor_data(_as_bytes(_part(shards[tensor.file].get_tensor(tensor.name), entry), own))
        writer.close()


def _add_sizes(writer: Any, config: TextConfig) -> None:
    """The sizes from which llama.cpp builds the model, and an empty vocabulary of as many tokens."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(moe_step(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _part(tensor: Tensor, entry: Entry) -> Tensor:
    """The checkpoint's tensor as llama.cpp stores it: experts (E, in, out) split into gate and up, and transposed."""
    if entry.part == "gate":
        tensor = tensor[..., : tensor.shape[-1] // 2]
    elif entry.part == "up":
        tensor = tensor[..., tensor.shape[-1] // 2 :]
    if entry.part != "all":
        tensor = tensor.transpose(-1, -2)
    assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    return tensor


def _as_bytes(tensor: Tensor, kind: str) -> Any:
    """The tensor's bytes in this type, as a NumPy array."""
    import torch

    return tensor.to(getattr(torch, DTYPES[kind])).contiguous().view(torch.uint8).numpy()


def _uint8() -> Any:
    import numpy

    return numpy.dtype(numpy.uint8)
