"""The sample that converts a language model: its logits, its tokens and its stop token are the original's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.tokenizer import Tokenizer
from model.config import TextConfig
from model.weights.loading import load_checkpoint
from samples.real.convert import convert

HEADS, KV_HEADS, HEAD_DIM, LAYERS, WIDTH = 6, 2, 16, 3, 160
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
QUANTIZED = "blk.1.ffn_gate.weight"
NAMES = {  # of a layer's tensors: llama.cpp's and transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head as GGUF files of this architecture have them: the two halves, one from each in turn."""
    return weight.view(heads, 2, HEAD_DIM // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """Also rounds the matrix QUANTIZED of `model` to what the file holds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HEADS * HEAD_DIM)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*CONTROLS, *alphabet, "he", "ll", "hell"])
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 259)
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    published = {name: short for short, name in NAMES.items()}
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{name}.weight": f"blk.{layer}.{published[name]}.weight" for name in published}
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, HEADS if name.endswith("q_proj.weight") else KV_HEADS)
        if names[name] == QUANTIZED:
            blocks = quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
            parameter.data = torch.tensor(dequantize(blocks, GGMLQuantizationType.Q8_0))
            writer.add_tensor(names[name], blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return original()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("converted")
    write_gguf(place / "model.gguf", model)
    convert(place / "model.gguf", place / "checkpoint")
    return place / "checkpoint"


def test_logits_are_those_of_the_original(model: LlamaForCausalLM, folder: Path) -> None:
    ids = torch.randint(0, 262, (1, 100), generator=torch.Generator().manual_seed(1))
    ours = load_checkpoint(folder)(ids)
    with torch.inference_mode():
        theirs = model(ids).logits
    assert ours is not None
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_it_has_rope_layers_only_and_one_chunk(folder: Path) -> None:
    config = TextConfig.from_folder(folder)
    assert config.num_nope_layers == 0 and config.attention_chunk_size == config.max_position_embeddings == 128
    assert not config.moe_layers and not config.use_qk_norm and not config.attn_temperature_tuning
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters.rope_theta == 100000.0


def test_text_has_the_original_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, 262)
    ids = tokenizer.encode_data("hello 2026<|im_end|>").ids
    pieces = [tokenizer.token_bytes(i).decode() for i in ids]
    assert pieces == ["hell", "o", " ", "2", "0", "2", "6", *"<|im_end|>"]  # digit by digit, and no control token
    assert tokenizer.encode_control("<|im_start|>he") == [1, tokenizer.encode_data("he").ids[0]]
    assert tokenizer.bos_id is None and GenerationConfig.from_folder(folder).stop_tokens == {2}
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    assert template.split(system=False) == ["<|im_start|>user\n", "user", "<|im_end|>\n<|im_start|>"]


def test_bfloat16_rounds_once(folder: Path, tmp_path: Path) -> None:
    convert(folder.parent / "model.gguf", tmp_path / "half", "bfloat16")
    exact, rounded = load_checkpoint(folder), load_checkpoint(tmp_path / "half")
    for (name, one), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert other.dtype == torch.bfloat16 and torch.equal(one.to(torch.bfloat16), other), name


def test_a_folder_that_holds_something_is_left_alone(folder: Path) -> None:
    with pytest.raises(SystemExit, match="is not empty"):
        convert(folder.parent / "model.gguf", folder)
