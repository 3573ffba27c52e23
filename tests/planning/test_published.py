"""Bytes of the published forms, against sums over parameters on the meta device, and against known files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch

from l4ctx.planning import declared
from l4ctx.planning.declared import declared_method
from l4ctx.planning.published import PUBLISHED, Form, matrices, plain, quantizing
from model.config import TextConfig
from model.costs import parameter_count
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.owners import Owner
from model.weights.settings import declared_settings
from support.counts import small_parameter_count
from support.places import SHARED
from support.toy_checkpoints import BASE, KINDS

FORMS = {form.name: form for form in PUBLISHED}
GB, GIB = 10**9, 2**30
VISION = 1.7
"""Gigabytes of the vision tower in bfloat16, which some files hold."""


def published(name: str) -> TextConfig:
    folder = SHARED / "llama4" / name
    if not folder.is_dir():
        pytest.skip("the published configurations are not here")
    return TextConfig.from_folder(folder)


def block(kind: str) -> float:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return float(size / elements)


def has_more(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def summed(config: TextConfig, bytes_of: Callable[[str, torch.Size], float]) -> float:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(bytes_of(name, parameter.shape) for name, parameter in model.named_parameters())


def is_small(name: str) -> bool:
    return "norm" in name or "router" in name or name.endswith("bias")


def rows(name: str, shape: torch.Size) -> int:
    """Rows (C_out, C_in): fused experts are transposed."""
    return shape[0] * shape[2] if len(shape) == 3 else shape[0]


def feed_forward(of: Callable[[str, torch.Size], float]) -> Callable[[str, torch.Size], float]:
    return lambda name, shape: of(name, shape) if "feed_forward" in name and not is_small(name) else 2.0 * shape.numel()


def is_fp8(name: str, config: TextConfig) -> bool:
    """Meta's own file of Maverick, which has dense layers, has its routed experts in FP8; of Scout there are others."""
    if 0 < len(config.moe_layers) < config.num_hidden_layers:
        return ".experts." in name
    return "feed_forward" in name and not is_small(name)


def k_mixture(name: str, shape: torch.Size, layers: int, main: str) -> float:
    if is_small(name):
        return 4.0 * shape.numel()
    if "lm_head" in name:
        return block("Q6_K") * shape.numel()
    is_better = ("v_proj" in name or "down_proj" in name) and has_more(int(name.split(".")[2]), layers)
    return block("Q6_K" if is_better else main) * shape.numel()


SUMS: dict[str, Callable[[TextConfig], Callable[[str, torch.Size], float]]] = {
    "bfloat16": lambda config: lambda name, shape: 2.0 * shape.numel(),
    "FP8": lambda config: (
        lambda name, shape: shape.numel() + 2 * rows(name, shape) if is_fp8(name, config) else 2.0 * shape.numel()
    ),
    "w4a16": lambda config: feed_forward(lambda name, shape: shape.numel() * (4 + 16 / 128) / 8),
    "NVFP4": lambda config: feed_forward(lambda name, shape: shape.numel() * 4.5 / 8),
    **{
        f"MLX {bits} bit": lambda config, bits=bits: (
            lambda name, shape: shape.numel() * (2.0 if len(shape) == 1 else (bits + 0.5) / 8)
        )
        for bits in (4, 6, 8)
    },
    "GGUF Q8_0": lambda config: lambda name, shape: shape.numel() * (4.0 if is_small(name) else block("Q8_0")),
    "GGUF Q6_K": lambda config: lambda name, shape: shape.numel() * (4.0 if is_small(name) else block("Q6_K")),
    "GGUF Q5_K_M": lambda config: lambda name, shape: k_mixture(name, shape, config.num_hidden_layers, "Q5_K"),
    "GGUF Q4_K_M": lambda config: lambda name, shape: k_mixture(name, shape, config.num_hidden_layers, "Q4_K"),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("model", ["scout", "maverick"])
def test_forms_take_what_the_models_parameters_sum_to(model: str, name: str) -> None:
    config = published(model)
    expected = summed(config, SUMS[name](config))
    assert FORMS[name].weights(config).num_bytes == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "name", "gigabytes"),
    [
        ("scout", "bfloat16", 215.5),
        ("scout", "GGUF Q8_0", 114.5),
        ("scout", "FP8", 115 - VISION),
        ("scout", "w4a16", 65 - VISION),
        ("scout", "MLX 8 bit", 108 * GIB / GB - VISION),
        ("scout", "MLX 4 bit", 57 * GIB / GB),
        ("scout", "GGUF Q6_K", 88.4),
        ("scout", "GGUF Q5_K_M", 76.5),
        ("scout", "GGUF Q4_K_M", 65.4),
        ("scout", "GGUF Q3_K_M", 51.8),
        ("scout", "GGUF Q2_K", 39.6),
        ("maverick", "bfloat16", 801.5),
        ("maverick", "FP8", 416 - VISION),
        ("maverick", "w4a16", 216 - VISION),
        ("maverick", "MLX 6 bit", 304 * GIB / GB),
        ("maverick", "MLX 4 bit", 211 * GIB / GB),
        ("maverick", "GGUF Q8_0", 425.8),
        ("maverick", "GGUF Q4_K_M", 242.8),
    ],
)
def test_forms_take_what_files_of_these_models_take(model: str, name: str, gigabytes: float) -> None:
    assert FORMS[name].weights(published(model)).num_bytes == pytest.approx(gigabytes * GB, rel=0.01)


@pytest.mark.parametrize("kind", ["scout", "maverick", "tied", "biases", "moe_none", "moe_listed"])
def test_all_parameters_are_counted_with_their_layers(kind: str) -> None:
    config = TextConfig.from_dict(BASE | {"model_type": "llama4_text"} | KINDS[kind].changes)
    assert sum(matrix.parameters for matrix in matrices(config)) == parameter_count(config)
    weights = FORMS["bfloat16"].weights(config)
    assert weights.parameters == parameter_count(config) and weights.num_bytes == 2 * parameter_count(config)
    assert weights.converted("float32") == 4 * small_parameter_count(config)
    outside = weights.owned_by(Owner.EMBEDDINGS) + weights.owned_by(Owner.HEAD)
    small = 2 * small_parameter_count(config)
    assert sum(layer.total for layer in weights.layers) + outside + small == weights.num_bytes
    assert weights.converted("bfloat16") == 0
    assert all((layer.experts > 0) == config.is_moe(number) for number, layer in enumerate(weights.layers))
    assert sum(share.num_bytes for share in weights.by_owner()) == weights.num_bytes


LINEAR = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]


def declared_form(raw: dict[str, Any]) -> Form | None:
    return declared.declared_form(declared_settings(raw))


def compressed(weights: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore}}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        (compressed(INT4, LINEAR), "w4a16"),
        (compressed(FP8, LINEAR), "FP8"),
        (compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, LINEAR), "NVFP4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX 4 bit"),
        ({"text_config": {"quantization_config": compressed(INT4, LINEAR)["quantization_config"]}}, "w4a16"),
    ],
)
def test_what_config_json_declares_is_a_published_form(raw: dict[str, Any], form: str) -> None:
    found = declared_form(raw)
    assert found is not None
    config = TextConfig.from_dict({"model_type": "llama4_text"})
    ours, theirs = found.weights(config), FORMS[form].weights(config)
    assert ours.num_bytes == pytest.approx(theirs.num_bytes, rel=0.002)
    assert ours.owned_by(Owner.ATTENTION) == theirs.owned_by(Owner.ATTENTION)


def bytes_of(raw: dict[str, Any], owner: Owner) -> float:
    """Bytes a weight."""
    form = declared_form(raw)
    assert isinstance(form, Form)
    config = TextConfig.from_dict({"model_type": "llama4_text"})
    parts = [part for part in form.weights(config).parts if part.owner is owner]
    return sum(part.num_bytes for part in parts) / sum(part.parameters for part in parts)


def test_ignored_modules_stay_in_16_bits_in_every_spelling() -> None:
    whole = [f"language_model.model.layers.{layer}.self_attn.{name}_proj" for layer in range(48) for name in "qkvo"]
    for ignored in (whole, ["re:.*self_attn"], ["*self_attn*"], ["self_attn"]):
        raw = compressed(INT4, ignored)
        assert bytes_of(raw, Owner.ATTENTION) == 2 and bytes_of(raw, Owner.HEAD) < 0.6
    assert bytes_of(compressed(INT4, ["lm_head"]), Owner.ATTENTION) < 0.6
    hostile = compressed(INT4, ["re:(a+)+b", "re:(", "re:" + ".*" * 40, "re:.*self_attn"])
    assert bytes_of(hostile, Owner.ATTENTION) == 2


@pytest.mark.parametrize(
    ("settings", "routed"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, 1),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}, 0.5625),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["self_attn", "lm_head"]}, 1),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.5156),
    ],
)
def test_other_methods(settings: dict[str, Any], routed: float) -> None:
    assert bytes_of({"quantization_config": settings}, Owner.ROUTED) == pytest.approx(routed, rel=0.001)
    assert declared_method(settings) == settings["quant_method"]


def test_settings_of_single_modules_and_groups_of_them() -> None:
    """MLX names modules beside its settings; compressed-tensors has several groups, where names go before classes."""
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    settings |= {"language_model.model.embed_tokens": False, "language_model.lm_head": {"group_size": 32, "bits": 8}}
    settings |= {
        f"language_model.model.layers.{n}.feed_forward.experts.up_proj": {"group_size": 64, "bits": 6}
        for n in range(48)
    }
    raw = {"quantization": settings}
    assert bytes_of(raw, Owner.EMBEDDINGS) == 2 and bytes_of(raw, Owner.HEAD) == pytest.approx(9 / 8)
    assert bytes_of(raw, Owner.ROUTED) == pytest.approx((4.5 + 4.5 + 6.5) / 3 / 8)
    assert bytes_of(raw, Owner.SHARED) == pytest.approx(4.5 / 8)
    groups = {
        "group_0": {"targets": ["Linear"], "weights": FP8},
        "group_1": {"targets": ["re:.*experts"], "weights": INT4},
    }
    mixed = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    raw = {"quantization_config": mixed}
    assert bytes_of(raw, Owner.ROUTED) == pytest.approx((4 + 16 / 128) / 8) and bytes_of(raw, Owner.HEAD) == 2
    assert bytes_of(raw, Owner.ATTENTION) == pytest.approx(1, rel=0.001)


def test_a_dense_model_in_fp8() -> None:
    config = TextConfig.from_dict(BASE | {"model_type": "llama4_text"} | KINDS["moe_none"].changes)
    parts = [part for part in FORMS["FP8"].weights(config).parts if part.owner is Owner.DENSE]
    assert parts and {part.stored for part in parts} == {"FP8"}


def test_quantizing_leaves_what_is_quantized() -> None:
    config, once = TextConfig.from_dict({"model_type": "llama4_text"}), Quantization("int8")
    quantized = quantizing(once, plain("bfloat16"))
    twice = quantizing(Quantization("int4", with_attention=True), quantized).weights(config)
    assert twice.owned_by(Owner.ROUTED) == quantized.weights(config).owned_by(Owner.ROUTED)
    assert twice.owned_by(Owner.ATTENTION) < 0.3 * quantized.weights(config).owned_by(Owner.ATTENTION)
    assert twice.is_made and not twice.is_plain and plain("float16").weights(config).is_plain
    int8 = declared_form(compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, LINEAR))
    assert int8 is not None and not int8.weights(config).is_plain


def test_what_is_not_known_is_not_guessed() -> None:
    assert declared_form({}) is None and declared_method({}) is None
    assert declared_form({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}) is None
    for settings in ({"quant_method": "modelopt", "quant_algo": "W4A8"}, {"quant_method": "compressed-tensors"}):
        assert declared_form({"quantization_config": settings}) is None
    for weights in ({}, {"num_bits": "4"}, {"num_bits": 0}, {"num_bits": True}):
        assert declared_form(compressed(weights, [])) is None
