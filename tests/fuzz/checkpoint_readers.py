"""Readers of what a checkpoint folder holds: configurations, tokenizers, chat templates, weights' headers."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuzz.inputs import Failure, Files, Reader, one_of
from fuzz.mutation import mutate_bytes, mutate_json, mutate_text
from l4ctx.errors import CHECKPOINT, INPUT, MEMORY, MODEL, TOO_LONG
from support.places import TINY

TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 42, "intermediate_size": 22, "intermediate_size_mlp": 34, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 5,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 7, "floor_scale": 9,
    "attn_scale": 0.1, "attn_temperature_tuning": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "use_qk_norm": True, "no_rope_layers": [1, 1, 1, 0], "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 12, "projector_input_dim": 12, "projector_output_dim": 12,
    "pixel_shuffle_ratio": 0.5, "rope_theta": 10000, "num_channels": 3, "norm_eps": 1e-5,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 300.0},
    "linear": {"rope_theta": 300.0, "factor": 3.0},
    "dynamic": {"rope_theta": 300.0, "factor": 4.0},
    "llama3": {"rope_theta": 300.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.3,
             "mscale_all_dim": 0.6, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": True},
    "longrope": {"rope_theta": 300.0, "factor": 2.0, "original_max_position_embeddings": 128,
                 "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1], "long_factor": [1.5, 2.0, 3.0, 5.0, 9.0]},
}  # fmt: skip
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*router", "lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear", "re:.*experts.*"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
    },
    "compressed-tensors fp8": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": [],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}},
    },
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                     "llm_int8_skip_modules": ["lm_head"]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
                 "ignore": ["*router", "lm_head*"]},
    "mlx": {"group_size": 64, "bits": 4, "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
            "language_model.lm_head": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
}  # fmt: skip


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def nested(**changes: Any) -> dict[str, Any]:
    text = {"model_type": "llama4_text", **TEXT, "rope_parameters": {"rope_type": "default", **ROPES["default"]}}
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "image_token_index": 96,
        "text_config": text, "vision_config": VISION, **changes,
    }  # fmt: skip


def flat(rope: str, **changes: Any) -> dict[str, Any]:
    parameters = {"rope_parameters": {"rope_type": rope, **ROPES[rope]}}
    return {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **TEXT, **parameters, **changes}


@functools.cache
def configurations() -> Mapping[str, Files]:
    older = {"rope_theta": 300.0, "rope_scaling": {"type": "llama3", **ROPES["llama3"]}}
    return (
        {f"flat, {rope}": {"config.json": _json(flat(rope))} for rope in ROPES}
        | {"older": {"config.json": _json(flat("default", rope_parameters=None, **older))}}
        | {
            "nested": {"config.json": _json(nested())},
            "published": {"config.json": (TINY / "config.json").read_bytes()},
        }
        | {
            f"as {name}": {"config.json": _json(nested(quantization_config=said))}
            for name, said in QUANTIZATIONS.items()
        }
        | {"mlx": {"config.json": _json(nested(quantization=QUANTIZATIONS["mlx"]))}}
    )


def read_configuration(folder: Path) -> None:
    """The configuration, what is computed from it alone, and where it is small, the model's shapes and rotations."""
    import torch

    from model.config import TextConfig
    from model.costs import parameter_count, reading_operations
    from model.rope import rotary_frequencies
    from model.transformer import Transformer
    from model.vision.config import VisionConfig, vision_activation_bytes, vision_operations, vision_parameter_count

    config = TextConfig.from_folder(folder)
    parameter_count(config)
    reading_operations(config, 0, 100_000)
    rotary_frequencies(config, min(200, config.max_position_embeddings))
    if config.num_hidden_layers <= 8:
        with torch.device("meta"):
            Transformer(config)
    vision = VisionConfig.from_folder(folder)
    if vision is not None:
        vision_parameter_count(vision, config.hidden_size)
        vision_operations(vision, config.hidden_size, 5)
        vision_activation_bytes(vision, 5, 2)


def read_plan(folder: Path) -> None:
    from l4ctx.run.estimate import make_plan
    from support.requests import plan_request

    report = make_plan(plan_request(folder, tokens=100_000, rate=1000.0), lambda text: None)
    json.dumps(report.as_dict(), allow_nan=False)


@functools.cache
def generations() -> Mapping[str, Files]:
    config = {"config.json": _json(nested())}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [2, 3]}
    return {
        "sampling": config | {"generation_config.json": _json(sampling)},
        "greedy": config | {"generation_config.json": _json({"eos_token_id": 3})},
    }


def read_generation(folder: Path) -> None:
    import torch

    from l4ctx.checkpoint.generation_config import GenerationConfig
    from l4ctx.engine.choose import choose

    generation = GenerationConfig.from_folder(folder)
    generation.check(97)
    choose(torch.linspace(-3, 3, 97), generation.sampling, torch.Generator().manual_seed(1))


@functools.cache
def processors() -> Mapping[str, Files]:
    published = (TINY / "preprocessor_config.json").read_bytes()
    newer = {"image_processor": json.loads(published), "patch_size": 14}
    return {"older": {"preprocessor_config.json": published}, "newer": {"processor_config.json": _json(newer)}}


def read_processor(folder: Path) -> None:
    import torch
    from PIL import Image

    from l4ctx.checkpoint.image_processor import ImageProcessing
    from l4ctx.vision.tiles import image_tiles, normalized, tile_layout, tiling_bytes

    processing = ImageProcessing.from_folder(folder, 112)
    for width, height in ((1, 1), (40, 1000), (3000, 2000)):
        tiling_bytes(tile_layout(width, height, processing), processing)
    tiles = normalized(image_tiles(Image.new("RGB", (50, 30)), processing), processing, torch.float32)
    if not tiles.isfinite().all():
        raise Failure("pixels that are not finite", str(processing))


@functools.cache
def tokenizers() -> Mapping[str, Files]:
    """Llama 4's kind of byte-level BPE; one with a normalizer and added words; one that falls back to bytes."""
    from support.tokenizer_fixtures import toy_tokenizer_folder

    with tempfile.TemporaryDirectory() as place:
        folder = toy_tokenizer_folder(Path(place) / "toy")
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["special_tokens_map.json"] = _json({"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot|>"})
    content = json.loads(files["tokenizer.json"])
    steps = [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "x"}, "content": "yy"},
             {"type": "Replace", "pattern": {"Regex": "b+"}, "content": "B"}, {"type": "Prepend", "prepend": "_"},
             {"type": "Strip", "strip_left": True, "strip_right": False}, {"type": "StripAccents"}]  # fmt: skip
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    words = [
        {"id": 500 + n, "content": word, "single_word": n == 1, "lstrip": n == 2, "rstrip": n == 3,
         "normalized": n == 4, "special": False}
        for n, word in enumerate(("code", "falcon", " the", "B", "x"))
    ]  # fmt: skip
    content["added_tokens"] += words
    pieces = {chr(letter): letter for letter in range(32, 127)} | {"<unk>": 0}
    other = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True},
            {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": pieces | {"ab": 128}, "merges": [["a", "b"]]},
    }  # fmt: skip
    return {
        "llama": files,
        "normalized": files | {"tokenizer.json": _json(content)},
        "other": files | {"tokenizer.json": _json(other), "tokenizer_config.json": _json({"add_bos_token": False})},
    }


TEXTS = ("The access code for the amber falcon is 48213.", "Über die Brücke, 日本語 👍🏽 \ud800 x\r\n  <|eot|>b b", "")


def read_tokenizer(folder: Path) -> None:
    from l4ctx.checkpoint.tokenizer import StreamDecoder, Tokenizer

    tokenizer = Tokenizer.from_folder(folder, 600)
    for text in TEXTS:
        ids = tokenizer.encode_data(text, prefix="\n", suffix="\n").ids
        tokenizer.decode(ids)
        decoder = StreamDecoder(tokenizer)
        for token in ids:
            decoder.push(token)
        decoder.finish()
    tokenizer.encode_control("<|begin_of_text|>user\n\n")


TEMPLATES = {
    "published": (TINY / "chat_template.jinja").read_text(encoding="utf-8"),
    "parts": "{{ bos_token }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "features": "{% macro say(m) %}{{ '<' ~ m['role'] ~ '>' }}{{ m['content'] | trim }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ say(m) }}{% endfor %}"
    "{{ strftime_now('%d %b') }}{{ range(3) | list | tojson }}{{ dict(a=1) }}{{ 'a b'.split() | join('-') }}"
    "{% if tools %}{{ raise_exception('no') }}{% endif %}",
}
TEMPLATE_PIECES = tuple(
    piece.encode()
    for piece in (
        "{{", "}}", "{%", "%}", "{#", "#}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}",
        "{{ messages }}", "{{ range(99999) | list }}", "{{ 'a' * 10**9 }}", "{{ 2 ** 10 ** 9 }}", "{{ 1 / 0 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ x.y.z }}",
        "{% set a = [1] %}{% for i in range(60) %}{% set _ = a.extend(a) %}{% endfor %}", "{{ ''.__class__.__mro__ }}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('ab') }}", "{{ '%0999999999d' % 1 }}", "{{ '%s' | format }}",
        "{{ '{0.__class__}'.format(1) }}", "{{ 'x' | center(10**10) }}", "{{ lipsum(n=10**7) }}",
        "{{ messages | map(attribute='content') | join | upper | reverse }}", "{% include 'x' %}", "{{ self }}",
        "{% import 'os' as os %}", "{{ namespace(__class__=1) }}", "{{ 'a' | replace('', 'b' * 10**8) }}",
        "{{ (1, 2) | batch(0) | list }}", "{{ '\\u0000' }}", "{{ messages | tojson(indent=10**9) }}", "{{ " + "(" * 300,
        "{% set ns = namespace() %}", "{{ messages | groupby('role') }}", "{{ 'a' | wordwrap(0) }}", "{% raw %}",
    )
)  # fmt: skip


@functools.cache
def templates() -> Mapping[str, Files]:
    files = {"tokenizer_config.json": _json({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot|>"}})}
    found = {name: files | {"chat_template.jinja": text.encode()} for name, text in TEMPLATES.items()}
    listed = [{"name": "default", "template": TEMPLATES["features"]}, {"name": "tool", "template": "x"}]
    return found | {
        "listed": {"tokenizer_config.json": _json({"bos_token": "<s>", "chat_template": listed})},
        "apart": files | {"chat_template.json": _json({"chat_template": TEMPLATES["parts"]})},
    }


def mutate_template(draw: random.Random, content: bytes) -> bytes:
    return mutate_text(draw, content, TEMPLATE_PIECES)


def read_template(folder: Path) -> None:
    from l4ctx.checkpoint.chat_template import ChatTemplate

    template = ChatTemplate.from_folder(folder)
    if template is not None:
        template.split(system=False)
        template.split(system=True)


@functools.cache
def weights() -> Mapping[str, Files]:
    """Random weights in one file and in shards, and with them what configurations say of quantized ones."""
    import torch
    from safetensors.torch import load_file, save

    from l4ctx.bench.weights import write_random_checkpoint
    from model.config import TextConfig

    raw = flat("default", num_hidden_layers=2, no_rope_layers=[1, 0], hidden_size=20, vocab_size=420)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_random_checkpoint(raw, TextConfig.from_dict(raw), folder, torch.float32)
        tensors = load_file(folder / "model-00001.safetensors")
    config, names = {"config.json": _json(raw)}, sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, part in halves.items() for name in part},
    }
    whole = save(tensors, {"format": "pt"})
    modelopt = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}
    older = {"producer": {"name": "modelopt", "version": "0.1"}, "quantization": modelopt}
    return {
        "older modelopt": config | {"model.safetensors": whole, "hf_quant_config.json": _json(older)},
        "single": config | {"model.safetensors": whole},
        "shards": config
        | {file: save({name: tensors[name] for name in part}, {}) for file, part in halves.items()}
        | {"model.safetensors.index.json": _json(index)},
    } | {
        f"as {name}": {"model.safetensors": whole, "config.json": _json(raw | {"quantization_config": said})}
        for name, said in QUANTIZATIONS.items()
    }


def mutate_shard(draw: random.Random, content: bytes) -> bytes:
    """The tree of the header, written with its new length; or bytes."""
    length = int.from_bytes(content[:8], "little")
    if draw.randrange(4) == 0 or length > len(content):
        return mutate_bytes(draw, content, 8 + min(length, len(content)))
    header = mutate_json(draw, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def read_weights(folder: Path) -> None:
    """Headers and companions; then all weights, if nothing was refused."""
    from model.config import TextConfig
    from model.weights.census import census, description
    from model.weights.loading import checked_sources, load_checkpoint
    from model.weights.settings import quantization_settings
    from model.weights.shards import unused_weights

    config = TextConfig.from_folder(folder)
    sources = checked_sources(folder, config)
    census(sources)
    description(sources, quantization_settings(folder))
    unused_weights(folder)
    load_checkpoint(folder, dtype="float32")


@functools.cache
def quantized() -> Mapping[str, Files]:
    """Toys as the libraries of these formats write them. They need these libraries, and some seconds."""
    from support import torchvision_oracle

    torchvision_oracle.prepare()
    from support.quantized_toys import write_fused
    from support.toy_checkpoints import SCOUT, Kind

    sizes = {"hidden_size": 48, "intermediate_size": 80, "intermediate_size_mlp": 112, "head_dim": 16}
    kind = Kind(sizes | {"num_hidden_layers": 2} | SCOUT)
    found: dict[str, Files] = {}
    for form in ("FP8", "NVFP4", "fbgemm_fp8"):
        found[form] = _written(lambda place, form=form: write_fused(place, kind, form), "stored")  # type: ignore[misc]
    for form in ("w4a16", "w8a16"):
        found[form] = _written(lambda place, form=form: _convert(place, form), "out")  # type: ignore[misc]
    return found


def _convert(place: Path, form: str) -> None:
    import torch

    from l4ctx.bench.weights import write_random_checkpoint
    from model.config import TextConfig
    from support.cli_runner import run_here

    raw = flat(
        "default", num_hidden_layers=2, no_rope_layers=[1, 0], hidden_size=64, vocab_size=31, intermediate_size=96
    )
    (place / "in").mkdir()
    write_random_checkpoint(raw, TextConfig.from_dict(raw), place / "in", torch.bfloat16)
    done = run_here("quantize", str(place / "in"), "-o", str(place / "out"), "--to", form)
    assert done.code == 0, done


def _written(write: Callable[[Path], object], name: str) -> Files:
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        return {
            file.name: file.read_bytes()
            for file in sorted((Path(place) / name).iterdir())
            if file.suffix in (".json", ".safetensors")
        }


@functools.cache
def whole() -> Mapping[str, Files]:
    """A checkpoint with everything in it."""
    parts = [weights()["single"], tokenizers()["llama"], processors()["older"], generations()["sampling"]]
    config = weights()["single"]["config.json"]
    files: Files = functools.reduce(lambda all_of, part: all_of | part, parts)
    return {
        "whole": files | {"config.json": config},
        "mlx": files | {"config.json": weights()["as mlx"]["config.json"]},
    }


def read_inspection(folder: Path) -> None:
    """Inspection reports any error as damage: one that is no user's error is named there."""
    from l4ctx.cli.tables.inspection import listing
    from l4ctx.inspection.folder import inspect_folder

    report = inspect_folder(str(folder), verify=True)
    listing(report)
    json.dumps(report, allow_nan=False)
    for entry in report["damage"]:
        if "cannot be used (" in entry["what"] and "Error: " in entry["what"]:
            kind = entry["what"].partition("cannot be used (")[2].partition(":")[0]
            raise Failure(f"inspection: {kind} in {Path(entry['file']).name.partition('-')[0]}", entry["what"])


CODES = frozenset([CHECKPOINT])
JSON, SHARD = ("json", mutate_json), ("safetensors", mutate_shard)
READERS = (
    Reader("config", configurations, one_of(JSON), read_configuration, CODES | {TOO_LONG}, share=170),
    Reader("plan", configurations, one_of(JSON), read_plan, CODES | {TOO_LONG, INPUT, MEMORY}, share=25),
    Reader("generation_config", generations, one_of(("generation_config.json", mutate_json), JSON), read_generation,
           CODES | {MODEL}, share=100),
    Reader("preprocessor_config", processors, one_of(JSON), read_processor, CODES, share=30),
    Reader("tokenizer", tokenizers, one_of(("tokenizer.json", mutate_json), JSON), read_tokenizer, CODES, share=30),
    Reader("chat_template", templates, one_of(("jinja", mutate_template), JSON), read_template, CODES, share=5),
    Reader("weights", weights, one_of(SHARD, SHARD, JSON), read_weights, CODES, share=15),
    Reader("quantized_weights", quantized, one_of(SHARD, SHARD, ("config.json", mutate_json)), read_weights, CODES,
           share=6),
    Reader("inspect_checkpoint", whole, one_of(JSON, SHARD, ("jinja", mutate_template)), read_inspection,
           CODES | {INPUT}, share=3),
)  # fmt: skip
