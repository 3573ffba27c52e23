"""config.json in all its published forms, every refusal by name, and the closed forms against brute force."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Llama4Config

from model.bounds import BOUNDS
from model.config import FieldReader, RopeParameters, TextConfig
from model.costs import parameter_count, reading_operations
from model.errors import ConfigError
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.places import ROOT
from support.toy_checkpoints import BASE, KINDS, Toys

RELEASED = ROOT.parent / "shared" / "llama4"

FLAT: dict[str, Any] = {
    **{name: value for name, value in BASE.items() if name != "rope_parameters"},
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 300.0,
    "rope_scaling": None,
    "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0],
    "moe_layers": list(range(8)),
    "attn_temperature_tuning": True,
}
LLAMA3 = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 64}
REMOVED = object()


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (raw | changes).items() if value is not REMOVED}


def nested(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    text = changed(text, architectures=REMOVED, tie_word_embeddings=REMOVED)
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"model_type": "llama4_vision_model", "rope_theta": 10000},
        **outer,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"no_rope_layers": []},
        {"no_rope_layers": None},
        {"no_rope_layers": REMOVED},
        {"no_rope_layers": REMOVED, "no_rope_layer_interval": 4},
        {"no_rope_layers": [1, 1, 1, 0] * 3},
        {"moe_layers": None},
        {"moe_layers": REMOVED},
        {"moe_layers": REMOVED, "interleave_moe_layer_step": 1},
        {"attn_temperature_tuning": 4},
        {"attn_temperature_tuning": 1},
        {"attn_temperature_tuning": REMOVED},
        {"rope_scaling": REMOVED},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": REMOVED, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 300, "rope_type": None}},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"architectures": REMOVED},
        {"architectures": None},
        {"model_type": REMOVED},
        {"hidden_act": REMOVED},
        {"tie_word_embeddings": REMOVED},
        {"tie_word_embeddings": None},
        {"attention_bias": None},
        {
            "layer_types": ["chunked_attention"] * 3
            + ["full_attention"]
            + ["chunked_attention"] * 3
            + ["full_attention"]
        },
        {"some_new_field": {"of": "no concern"}},
        {"quantization_config": None},
        {"vision_config": None},
    ],
)
def test_forms_that_mean_the_same(changes: dict[str, Any]) -> None:
    assert TextConfig.from_dict(changed(FLAT, **changes)) == TextConfig.from_dict(FLAT)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3}, "rope_theta": REMOVED},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3}, "rope_theta": 9.0},
    ],
)
def test_rope_scaling_of_4x_and_rope_parameters_of_5x(scaling: dict[str, Any]) -> None:
    for form in (changed(FLAT, **scaling), nested(changed(FLAT, **scaling))):
        assert TextConfig.from_dict(form).rope_parameters == RopeParameters("llama3", 300.0, 16.0, 64, 1.0, 1.0)


@pytest.mark.parametrize("outer", [REMOVED, None, False, True])
@pytest.mark.parametrize("inner", [REMOVED, None, False, True])
def test_the_inner_flag_alone_ties(outer: Any, inner: Any) -> None:
    """As transformers builds the text model: of text_config, whose flag is false where it is absent."""
    raw = changed(nested(FLAT), tie_word_embeddings=outer)
    raw["text_config"] = changed(raw["text_config"], tie_word_embeddings=inner)
    oracle = Llama4Config(
        **{name: value for name, value in raw.items() if value is not None and name in ("tie_word_embeddings",)},
        text_config=changed(raw["text_config"], **({"tie_word_embeddings": REMOVED} if inner is None else {})),
    )
    assert TextConfig.from_dict(raw).tie_word_embeddings is oracle.text_config.tie_word_embeddings is (inner is True)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ({"dtype": "float16"}, {"dtype": "bfloat16"}, "float16"),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, {}, "float32"),
        ({"dtype": None}, {"torch_dtype": "bfloat16"}, "bfloat16"),
        ({}, {}, None),
    ],
)
def test_the_outer_dtype_is_looked_at_first(outer: dict[str, Any], inner: dict[str, Any], expected: str | None) -> None:
    raw = nested(FLAT, **outer)
    raw["text_config"] |= inner
    assert TextConfig.from_dict(raw).torch_dtype == expected


def test_no_chunks_is_refused_with_what_it_means() -> None:
    with pytest.raises(ConfigError, match=r"attention_chunk_size: null means.*8192.*max_position_embeddings"):
        TextConfig.from_dict(FLAT | {"attention_chunk_size": None})


def test_flat_and_nested() -> None:
    flat = TextConfig.from_dict(FLAT)
    assert TextConfig.from_dict(nested(FLAT)) == flat
    assert TextConfig.from_dict(nested(FLAT, architectures=None)) == flat
    tied = nested(FLAT)
    tied["text_config"]["tie_word_embeddings"] = True
    for form in (tied, tied | {"tie_word_embeddings": False}, changed(FLAT, tie_word_embeddings=True)):
        assert TextConfig.from_dict(form) == dataclasses.replace(flat, tie_word_embeddings=True)
    for form in (
        changed(FLAT, dtype="bfloat16"),
        changed(FLAT, torch_dtype="bfloat16"),
        nested(FLAT, torch_dtype="bfloat16"),
        nested(changed(FLAT, torch_dtype="bfloat16")),
    ):
        assert TextConfig.from_dict(form).torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"no_rope_layers": REMOVED, "no_rope_layer_interval": 3}, "no_rope_layers", (1, 1, 0, 1, 1, 0, 1, 1)),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 1]}, "no_rope_layers", (0, 1, 1, 1, 1, 1, 1, 1)),
        ({"moe_layers": []}, "moe_layers", ()),
        ({"moe_layers": [7, 2]}, "moe_layers", (2, 7)),
        ({"moe_layers": None, "interleave_moe_layer_step": 2}, "moe_layers", (1, 3, 5, 7)),
        ({"moe_layers": REMOVED, "interleave_moe_layer_step": 3}, "moe_layers", (2, 5)),
        ({"attn_temperature_tuning": False}, "attn_temperature_tuning", False),
        ({"attn_temperature_tuning": 0}, "attn_temperature_tuning", False),
        ({"num_key_value_heads": None}, "num_key_value_heads", 6),
        ({"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3}, "head_dim", 14),
        ({"rope_theta": REMOVED}, "rope_parameters", RopeParameters()),
    ],
)
def test_fields_that_are_derived(changes: dict[str, Any], field: str, expected: Any) -> None:
    config = TextConfig.from_dict(changed(FLAT, **changes))
    assert config == dataclasses.replace(
        TextConfig.from_dict(FLAT),
        **{field: expected},
        **{name: value for name, value in changes.items() if name.startswith("num_") and value is not None},
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_transformers_writes_is_what_it_was_told(toys: Toys, name: str) -> None:
    config = TextConfig.from_folder(toys(name, 0.25).folder)
    theirs = toys(name, 0.25).oracle.config.get_text_config()
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), getattr(theirs, field.name, None)
        if field.name == "rope_parameters":
            assert {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(value).items()
                if v is not None and (k != "truncate" or "truncate" in expected)
            } == expected
        elif field.name != "torch_dtype":
            assert (list(value) if isinstance(value, tuple) else value) == expected, field.name


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 5,
    "long_factor": [2.0] * 5,
    "original_max_position_embeddings": 64,
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"architectures": "Llama4"}, "architectures"),
    ({"architectures": [["Llama4ForCausalLM"]]}, "architectures"),
    ({"architectures": {"a": 1}}, "architectures"),
    ({"architectures": REMOVED, "model_type": "llama"}, "model_type"),
    ({"architectures": REMOVED, "model_type": REMOVED}, "model_type"),
    ({"model_type": ["llama4"]}, "model_type"),
    ({"model_type": "llama4"}, "text_config"),
    ({"attention_chunk_size": None}, "attention_chunk_size"),
    ({"attention_chunk_size": 0}, "attention_chunk_size"),
    ({"hidden_size": "42"}, "hidden_size"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 42.0}, "hidden_size"),
    ({"head_dim": 2**40}, "head_dim"),
    ({"vocab_size": True}, "vocab_size"),
    ({"num_hidden_layers": [8]}, "num_hidden_layers"),
    ({"floor_scale": 0}, "floor_scale"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"attn_scale": float("inf")}, "attn_scale"),
    ({"use_qk_norm": "yes"}, "use_qk_norm"),
    ({"attn_temperature_tuning": "4"}, "attn_temperature_tuning"),
    ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    ({"no_rope_layers": [1, 2] * 4}, "no_rope_layers"),
    ({"no_rope_layers": "11101110"}, "no_rope_layers"),
    ({"no_rope_layers": [], "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ({"moe_layers": [-1]}, "moe_layers"),
    ({"moe_layers": 3}, "moe_layers"),
    ({"moe_layers": ["0"]}, "moe_layers"),
    ({"moe_layers": REMOVED, "interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
    ({"num_key_value_heads": 4}, "num_attention_heads"),
    ({"head_dim": 9}, "head_dim"),
    ({"num_experts_per_tok": 6}, "num_experts_per_tok"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"layer_types": ["full_attention"] * 8}, "layer_types"),
    ({"layer_types": ["chunked_attention"]}, "layer_types"),
    ({"layer_types": 8}, "layer_types"),
    ({"rope_scaling": "llama3"}, "rope_scaling"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type"),
    ({"rope_scaling": {"type": 3}}, "rope_type"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor"),
    ({"rope_theta": "500000"}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    *(({"rope_scaling": {"rope_type": "llama3", **LLAMA3, name: None}}, name) for name in LLAMA3),
    *(({"rope_scaling": {**LONGROPE, name: None}}, name) for name in LONGROPE if name != "rope_type"),
    ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 4}}, "long_factor"),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 4 + ["1"]}}, "short_factor"),
    ({"rope_scaling": LONGROPE | {"short_factor": 1.0}}, "short_factor"),
    ({"rope_scaling": LONGROPE | {"short_factor": [0.0] * 5}}, "short_factor"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[f"{i}-{field}" for i, (_, field) in enumerate(REFUSED)])
def test_refusals_name_the_field_in_one_line(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    raw = changed(FLAT, **changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for read in (lambda: TextConfig.from_dict(raw), lambda: TextConfig.from_folder(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert field in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("times", [1, 2**40, 10**400])
def test_numbers_have_upper_bounds(name: str, times: int) -> None:
    """Each is refused before anything of that size is built, and the message says the bound and the reason."""
    most, why = BOUNDS[name]
    value = (int(most) + 1) * times
    lists: dict[str, Any] = {"no_rope_layers": REMOVED, "moe_layers": REMOVED}
    if name in FLAT or name in ("no_rope_layer_interval", "interleave_moe_layer_step"):
        read: Callable[[], object] = partial(TextConfig.from_dict, changed(FLAT, **lists, **{name: value}))
    elif name == "original_max_position_embeddings":
        read = partial(TextConfig.from_dict, changed(FLAT, rope_scaling={**LONGROPE, name: value}))
    else:  # of the vision tower
        read = partial(FieldReader({name: value}).integer, name, 1)
    with pytest.raises(ConfigError) as caught:
        read()
    assert f"{name}: " in str(caught.value) and str(caught.value).endswith(f" is more than {most:,} ({why})")


@pytest.mark.parametrize("value", [10**400, 1e308, float("inf")])
@pytest.mark.parametrize("name", [*LLAMA3, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_rope_parameters_have_upper_bounds(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^rope_parameters.{name}: .* is more than .*$"):
        TextConfig.from_dict(changed(FLAT, rope_scaling={"rope_type": "llama3", **LLAMA3, name: value}))


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_type": "yarn", "rope_theta": 1, "original_max_position_embeddings": 64}, "rope_theta"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ],
)
def test_a_logarithm_of_zero_is_no_divisor(rope: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rope_parameters\.{field}: 1 is not supported"):
        TextConfig.from_dict(changed(FLAT, rope_scaling=rope))


def test_refusals_of_nested_files() -> None:
    for raw, field in (
        (nested(changed(FLAT, hidden_act="gelu")), "hidden_act"),
        (nested(FLAT, text_config=None), "text_config"),
    ):
        with pytest.raises(ConfigError, match=field):
            TextConfig.from_dict(raw)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"[1]", b"null", b'"text"', b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^[^\n]*config\.json: [^\n]+$"):
        TextConfig.from_folder(tmp_path)


def test_folders_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"config\.json") as caught:
            TextConfig.from_folder(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_parameter_count_equals_the_models(toys: Toys, name: str) -> None:
    model = load_checkpoint(toys(name, 0.25).folder)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["scout", "maverick", "top_2", "nope_first", "nope_only_last", "moe_none", "biases"])
@pytest.mark.parametrize("span", [(0, 1), (0, 7), (3, 30), (14, 28), (20, 20)])
def test_reading_operations_equal_a_count(toys: Toys, name: str, span: tuple[int, int]) -> None:
    """Linear: what torch counts in a forward without logits. Attention: every visible pair but the last layer's."""
    toy = toys(name, 0.25)
    config = TextConfig.from_folder(toy.folder)
    pairs = {"chunked": 0, "full": 0}
    for layer in range(config.num_hidden_layers - 1):
        for q in range(*span):
            first = q // config.attention_chunk_size * config.attention_chunk_size if config.uses_rope(layer) else 0
            pairs["chunked" if config.uses_rope(layer) else "full"] += len(range(first, q + 1))
    operations = reading_operations(config, *span)
    per_pair = 2 * 2 * config.num_attention_heads * config.head_dim
    assert operations.chunked_attention == pairs["chunked"] * per_pair
    assert operations.full_attention == pairs["full"] * per_pair
    assert operations.total == operations.linear + per_pair * sum(pairs.values())
    tokens = span[1] - span[0]
    if tokens:
        model = load_checkpoint(toy.folder, dtype=torch.float32, attention="sdpa")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long), logits="none")
        counted = sum(
            count
            for operation, count in counter.get_flop_counts()["Global"].items()
            if "attention" not in str(operation)
        )
        assert operations.linear == counted
    else:
        assert operations.total == 0


def released(name: str) -> TextConfig:
    if not (RELEASED / name / "config.json").exists():
        pytest.skip(f"{RELEASED / name / 'config.json'} is not on this machine")
    return TextConfig.from_folder(RELEASED / name)


@pytest.mark.parametrize(
    ("name", "billions", "experts", "moe", "positions"),
    [("scout", 109e9, 16, tuple(range(48)), 10485760), ("maverick", 402e9, 128, tuple(range(1, 48, 2)), 1048576)],
)
def test_released_configurations(
    name: str, billions: float, experts: int, moe: tuple[int, ...], positions: int
) -> None:
    config = released(name)
    assert config.no_rope_layers == (1, 1, 1, 0) * 12 and config.num_nope_layers == 12
    assert config.moe_layers == moe and config.num_local_experts == experts and config.num_experts_per_tok == 1
    assert config.attn_temperature_tuning is True and config.attention_chunk_size == config.floor_scale == 8192
    assert config.use_qk_norm is (name == "scout") and config.max_position_embeddings == positions
    scaled = RopeParameters("llama3", 500000.0, 16.0, 8192, 1.0, 1.0)
    assert config.rope_parameters == (scaled if name == "scout" else RopeParameters("default", 500000.0))
    assert config.torch_dtype == "bfloat16" and not config.tie_word_embeddings and not config.attention_bias
    assert abs(parameter_count(config) / billions - 1) < 0.03


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_released_models_have_the_published_tensors(name: str) -> None:
    """On the meta device: names and shapes equal those of `transformers`."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = released(name)
    text = json.loads((RELEASED / name / "config.json").read_text())["text_config"] | {"attn_temperature_tuning": True}
    with torch.device("meta"):
        ours = Transformer(config)
        theirs = Llama4ForCausalLM(Llama4TextConfig(**copy.deepcopy(text)))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert sum(p.numel() for p in ours.parameters()) == parameter_count(config)


@pytest.mark.parametrize("module", ["model.config", "cache.layout"])
def test_plans_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'safetensors'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
