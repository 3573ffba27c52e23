"""Each damage to the tensors of a quantized weight is refused in one line that names the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.weights import compressed_tensors, fbgemm, modelopt
from model.weights.settings import OLDER_SETTINGS, older_settings
from model.weights.sources import Group, Reader, WeightSource
from support.compressed import RECIPES, compressed
from support.fused_experts import fp8_per_row, nvfp4, turned
from support.groups_in_memory import FILE, PATH, group

SHAPE = (42, 96)
EXPERTS, INPUTS, OUTPUTS = 5, 48, 42
READERS: tuple[Reader, ...] = (compressed_tensors.read, modelopt.read, fbgemm.read)
Tensors = dict[str, Tensor]


def sound(name: str) -> tuple[Tensors, tuple[int, ...], Mapping[str, Any]]:
    """The tensors of a weight by what follows the module's name, its shape in the model, and the settings."""
    weight = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))
    fused = (EXPERTS, INPUTS, OUTPUTS)
    if name in RECIPES:
        tensors = compressed(RECIPES[name], torch.randn(SHAPE))
        return {f".{key}": tensor for key, tensor in tensors.items()}, SHAPE, RECIPES[name].settings()
    if name == "fbgemm":
        codes, scale, _ = fp8_per_row(weight)
        return {"": turned(codes), "_scale": scale[:, :, None]}, fused, {"quant_method": "fbgemm_fp8"}
    if name == "modelopt_fp8":
        scale = torch.tensor(0.5)
        return {"": turned(weight.to(torch.float8_e4m3fn)), "_weight_scale": scale}, fused, {}
    codes, scale, factor, _ = nvfp4(weight if name == "modelopt_fused" else weight[0])
    if name == "modelopt_fused":
        return {"": turned(codes), "_weight_scale": turned(scale), "_weight_scale_2": factor}, fused, {}
    return {".weight": codes, ".weight_scale": scale, ".weight_scale_2": factor}, (OUTPUTS, INPUTS), {}


def found(group: Group) -> WeightSource | None:
    return next((source for read in READERS if (source := read(group)) is not None), None)


def without(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(suffix)


def shaped(suffix: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({suffix: torch.zeros(shape, dtype=tensors[suffix].dtype)})


def typed(suffix: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    """The same bytes under another dtype's name if it is as wide, else zeros."""

    def change(tensors: Tensors) -> None:
        old = tensors[suffix]
        tensors[suffix] = old.view(dtype) if old.itemsize == dtype.itemsize else torch.zeros(old.shape, dtype=dtype)

    return change


def surplus(suffix: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({suffix: torch.zeros(1, dtype=dtype)})


F8, BF16, F32, I32, U8, I8 = (
    torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.int8,
)  # fmt: skip

DAMAGE = [
    ("w4a16", without(".weight_scale"), ".weight_scale is missing"),
    ("w4a16", without(".weight_packed"), ".weight_scale is there without the weight"),
    ("w4a16", shaped(".weight_packed", 42, 11), ".weight_packed has shape [42, 11] instead of [42, 12] or [42, 24]"),
    ("w4a16", shaped(".weight_packed", 96, 6), ".weight_packed has shape [96, 6]"),
    ("w4a16", shaped(".weight_packed", 42, 9), ".weight_packed holds codes of 3 bits"),
    ("w4a16", shaped(".weight_scale", 42, 5), ".weight_scale has shape [42, 5]"),
    ("w4a16", shaped(".weight_scale", 42, 97), ".weight_scale has shape [42, 97]"),
    ("w4a16", shaped(".weight_scale", 6, 42, 1), ".weight_scale has shape [6, 42, 1]"),
    ("w4a16", shaped(".weight_scale", 42, 0), ".weight_scale has shape [42, 0]"),
    ("w4a16", shaped(".weight_scale", 41), ".weight_scale has shape [41]"),
    ("w4a16", typed(".weight_scale", torch.int16), ".weight_scale has dtype I16"),
    ("w4a16", typed(".weight_packed", F32), ".weight_packed has dtype F32"),
    ("w4a16", typed(".weight_packed", U8), ".weight_scale has dtype BF16"),
    ("w4a16", surplus(".weight_g_idx", I32), ".weight_g_idx: groups in the order of activations"),
    ("w4a16", surplus(".weight_scale_2"), ".weight_scale_2 is a companion that is not known"),
    ("w4a16", surplus(".weight"), ".weight is a companion that is not known"),
    ("w4a16", surplus(".pre_quant_scale"), ".pre_quant_scale is a companion that is not known"),
    ("w4a16_asym", without(".weight_zero_point"), ".weight_zero_point is missing"),
    ("w4a16_asym", shaped(".weight_zero_point", 42, 6), ".weight_zero_point has shape [42, 6] instead of [6, 6]"),
    ("w4a16_asym", shaped(".weight_zero_point", 6, 5), ".weight_zero_point has shape [6, 5]"),
    ("w4a16_asym", typed(".weight_zero_point", F32), ".weight_zero_point has dtype F32"),
    ("w8a16", shaped(".weight_packed", 42, 23), ".weight_packed has shape [42, 23]"),
    ("int8", shaped(".weight", 42, 95), ".weight has shape [42, 95] instead of [42, 96]"),
    ("int8", typed(".weight", F8), ".weight has dtype F8_E4M3, though config.json says that its type is 'int'"),
    ("int8", typed(".weight", U8), ".weight_scale has dtype BF16 instead of F8_E4M3"),
    ("int8", shaped(".weight_scale", 41, 1), ".weight_scale has shape [41, 1]"),
    ("int8_asym", without(".weight_zero_point"), ".weight_zero_point is missing"),
    ("int8_asym", shaped(".weight_zero_point", 1), ".weight_zero_point has shape [1] instead of [42, 1]"),
    ("fp8_dynamic", without(".weight_scale"), ".weight_scale is missing, which FP8 weights need"),
    ("fp8_dynamic", shaped(".weight", 96, 42), ".weight has shape [96, 42] instead of [42, 96]"),
    ("fp8_dynamic", shaped(".weight_scale", 96, 1), ".weight_scale has shape [96, 1]"),
    ("fp8_dynamic", shaped(".weight_scale", 5), ".weight_scale has shape [5]"),
    ("fp8_dynamic", typed(".weight", I8), ".weight has dtype I8, though config.json says that its type is 'float'"),
    ("fp8_dynamic", typed(".weight_scale", torch.int16), ".weight_scale has dtype I16"),
    ("fp8_dynamic", surplus(".weight_zero_point", I8), ".weight_zero_point is a companion that is not known"),
    ("fp8_block", shaped(".weight_scale", 4, 11), ".weight_scale has shape [4, 11]"),
    ("fp8_block", shaped(".weight_scale", 43, 12), ".weight_scale has shape [43, 12]"),
    ("nvfp4", without(".weight_global_scale"), ".weight_global_scale is missing"),
    ("nvfp4", shaped(".weight_global_scale", 2), ".weight_global_scale has shape [2]"),
    ("nvfp4", typed(".weight_global_scale", I32), ".weight_global_scale has dtype I32"),
    ("nvfp4", shaped(".weight_packed", 42, 96), ".weight_packed has shape [42, 96] instead of [42, 48]"),
    ("nvfp4", shaped(".weight_scale", 42, 7), ".weight_scale has shape [42, 7]"),
    ("nvfp4", typed(".weight_scale", I8), ".weight_scale has dtype I8"),
    ("mxfp4", shaped(".weight_scale", 3, 42), ".weight_scale has shape [3, 42]"),
    ("fbgemm", without("_scale"), "_scale is missing"),
    ("fbgemm", shaped("_scale", EXPERTS, 1, INPUTS), "_scale has shape [5, 1, 48]"),
    ("fbgemm", shaped("_scale", OUTPUTS), "_scale has shape [42]"),
    ("fbgemm", shaped("", EXPERTS, OUTPUTS, INPUTS), " has shape [5, 42, 48] instead of [5, 48, 42]"),
    ("fbgemm", surplus("_scale_ub"), "_scale_ub is a companion that is not known"),
    ("modelopt_fp8", shaped("_weight_scale", 4), "_weight_scale has shape [4]"),
    ("modelopt", without(".weight_scale_2"), ".weight_scale_2 is missing"),
    ("modelopt", without(".weight_scale"), ".weight_scale is missing"),
    ("modelopt", shaped(".weight_scale_2", 42), ".weight_scale_2 has shape [42]"),
    ("modelopt", typed(".weight_scale", BF16), ".weight_scale has dtype BF16"),
    ("modelopt_fused", without("_weight_scale"), "_weight_scale is missing"),
    ("modelopt_fused", shaped("", EXPERTS, INPUTS, 21), " has shape [5, 48, 21] instead of [5, 24, 42]"),
    ("modelopt_fused", shaped("_weight_scale", EXPERTS, 42, 3), "_weight_scale has shape [5, 42, 3]"),
    ("modelopt_fused", shaped("_weight_scale", EXPERTS, 5, 42), "_weight_scale has shape [5, 5, 42]"),
    ("modelopt_fused", shaped("_weight_scale_2", 3), "_weight_scale_2 has shape [3]"),
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({name for name, _, _ in DAMAGE}))
def test_sound_ones_are_read(name: str) -> None:
    tensors, shape, settings = sound(name)
    source = found(group(tensors, shape, settings))
    assert source is not None and source.shape == shape
    assert source.num_bytes == sum(t.nbytes for suffix, t in tensors.items() if suffix != ".weight_shape")


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_damage_is_named(name: str, change: Callable[[Tensors], object], message: str) -> None:
    tensors, shape, settings = sound(name)
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        found(group(tensors, shape, settings))
    text = str(caught.value)
    assert text.startswith(f"{FILE}: tensor language_model.{PATH}{message}") and "\n" not in text, text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "marlin-24"}, "in the format 'marlin-24', which is not read"),
        ({"format": "sparse-24-bitmask"}, "in the format 'sparse-24-bitmask', which is not read"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated weights"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float"}}}}, "its type is 'float'"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": False}}}}, "_point is missing"),
    ],
)
def test_settings_that_contradict_are_named(settings: Mapping[str, Any], message: str) -> None:
    tensors, shape, said = sound("w4a16")
    with pytest.raises(CheckpointError, match=message):
        found(group(tensors, shape, {**said, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"format": "mixed-precision", "transform_config": {}, "sparsity_config": {}},
        {"ignore": ["re:.*"]},  # ignored, though it is quantized
        {"ignore": ["re:.*"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float"}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 128, "num_bits": 8}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
    ],
)
def test_tensors_outweigh_the_settings(settings: Mapping[str, Any]) -> None:
    tensors, shape, said = sound("w4a16")
    source = found(group(tensors, shape, {**said, **settings}))
    assert source is not None and source.scheme.label == "w4a16 (int4, groups of 16)"


@pytest.mark.parametrize("name", ["fp8_dynamic", "fp8_tensor", "fp8_block"])
def test_fp8_is_never_taken_for_integers(name: str) -> None:
    """Whatever the settings say: they are followed, contradicted by name, or of a format that is not read."""
    tensors, shape, said = sound(name)
    for settings in ({}, {"quantization": {"bits": 4, "group_size": 64}}, {"quant_method": "fp8"}, said):
        source = found(group(tensors, shape, settings))
        assert source is not None and source.scheme.label.startswith("FP8 (")
    for settings in ({**said, "format": "float-packed"}, {**RECIPES["w4a16"].settings(), "format": "marlin-24"}):
        with pytest.raises(CheckpointError, match="which is not read"):
            found(group(tensors, shape, settings))
    with pytest.raises(CheckpointError, match=r"\.weight has dtype F8_E4M3, though config\.json says"):
        found(group(tensors, shape, RECIPES["w4a16"].settings()))


@pytest.mark.parametrize("dtype", [BF16, F32, torch.float16])
def test_others_are_left_to_their_readers(dtype: torch.dtype) -> None:
    settings = RECIPES["w4a16"].settings()
    for tensors in (
        {".weight": torch.zeros(SHAPE, dtype=dtype)},
        {".weight": torch.zeros(42 * 48, 1, dtype=U8), ".weight.absmax": torch.zeros(63)},
        {".weight": torch.zeros(SHAPE, dtype=I8), ".SCB": torch.zeros(42)},
        {"": torch.zeros(5, 48, 42, dtype=dtype)},
    ):
        assert found(group(tensors, SHAPE, settings)) is None


def test_older_settings_of_modelopt(tmp_path: Path) -> None:
    assert older_settings(tmp_path) == {}
    file = tmp_path / OLDER_SETTINGS
    file.write_text(
        '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", '
        '"group_size": 16, "exclude_modules": ["vision_model*", "lm_head"]}}'
    )
    assert older_settings(tmp_path) == {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["vision_model*", "lm_head"],
        "kv_cache_scheme": "FP8",
    }
    file.write_text('{"quantization": 3}')
    assert older_settings(tmp_path) == {}
    file.write_text("{")
    with pytest.raises(CheckpointError, match=OLDER_SETTINGS):
        older_settings(tmp_path)


def test_names_are_those_of_the_file() -> None:
    """Experts' parts may have other names there than the model gives them."""
    tensors, shape, settings = sound("fp8_dynamic")
    one = group(tensors, shape, settings, "model.layers.0.feed_forward.experts.3.gate_proj")
    stored = {
        key: replace(t, name=t.name.replace("experts.3.gate_proj", "experts.gate_projs.3"))
        for key, t in one.tensors.items()
    }
    del stored[".weight_scale"]
    with pytest.raises(CheckpointError, match=r"experts\.gate_projs\.3\.weight_scale is missing"):
        found(replace(one, tensors=stored))
