"""Checkpoints that compressed-tensors wrote, and modelopt and FBGEMM would write, compute what their twins compute.

A twin holds the weights that the library dequantizes in float32, in the published form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from l4ctx.cli.tables.inspection import listing
from l4ctx.inspection.folder import inspect_folder
from model.config import TextConfig
from model.errors import CheckpointError
from model.quantization.form import StoredMatrix, Weight
from model.transformer import Transformer
from model.weights.companions import skipped
from model.weights.loading import checked_sources, load_checkpoint
from support.compressed import RECIPES
from support.quantized_toys import SIZES, STORED, write_compressed, write_fused
from support.toy_checkpoints import MAVERICK, SCOUT, VOCABULARY, Kind

SMALL = {"num_hidden_layers": 4, "num_local_experts": 3}
FLAT, NESTED = Kind(SIZES | SMALL | SCOUT), Kind(SIZES | SMALL | SCOUT, nested=True)
DENSE, NESTED_DENSE = Kind(SIZES | SMALL | MAVERICK), Kind(SIZES | SMALL | MAVERICK, nested=True)
BFLOAT16 = Kind(SIZES | SMALL | SCOUT, nested=True, dtype=torch.bfloat16)
ATTENTION, HEAD, SHARED, DENSE_MLP = "re:.*self_attn", "re:.*lm_head", "re:.*shared_expert", r"re:.*feed_forward\.\w+$"
LINEAR = ["Linear"]

COMPRESSED: dict[str, tuple[Kind, dict[str, tuple[str, list[str]]], list[str]]] = {
    "w4a16 as published": (NESTED, {"a": ("w4a16", LINEAR)}, [ATTENTION, HEAD]),
    "w4a16 beside bfloat16": (BFLOAT16, {"a": ("w4a16", LINEAR)}, [ATTENTION, HEAD]),
    "w4a16, all but the embeddings": (FLAT, {"a": ("w4a16_f32", LINEAR)}, []),
    "w4a16 with zero points, dense layers": (NESTED_DENSE, {"a": ("w4a16_asym", LINEAR)}, [HEAD]),
    "w4a16 per channel": (FLAT, {"a": ("w4a16_channel", LINEAR)}, [HEAD]),
    "w8a16": (DENSE, {"a": ("w8a16", LINEAR)}, [HEAD]),
    "w8a16 with zero points": (FLAT, {"a": ("w8a16_asym", LINEAR)}, [ATTENTION, HEAD]),
    "int8": (NESTED_DENSE, {"a": ("int8", LINEAR)}, [HEAD]),
    "FP8 dynamic as published": (NESTED, {"a": ("fp8_dynamic", LINEAR)}, [ATTENTION, HEAD]),
    "FP8 experts alone, as Maverick's": (Kind(SIZES | SMALL | MAVERICK, nested=True, dtype=torch.bfloat16),
                                         {"a": ("fp8_dynamic_f32", LINEAR)}, [ATTENTION, HEAD, SHARED, DENSE_MLP]),
    "FP8 per tensor": (FLAT, {"a": ("fp8_tensor", LINEAR)}, [HEAD]),
    "FP8 blocks": (DENSE, {"a": ("fp8_block", LINEAR)}, [HEAD]),
    "NVFP4": (NESTED, {"a": ("nvfp4", LINEAR)}, [ATTENTION, HEAD]),
    "int4 experts, FP8 attention": (NESTED_DENSE, {"a": ("w4a16_f32", [r"re:.*experts\.\d.*"]),
                                                   "b": ("fp8_dynamic", [ATTENTION])}, [HEAD]),
    "an expert of every second left in 16 bits": (NESTED, {"a": ("w4a16", LINEAR)},
                                                  [ATTENTION, HEAD, r"re:.*experts\.1\.", r"re:.*[13]\.feed_forward"]),
    "shared experts alone": (FLAT, {"a": ("w4a16", [SHARED + r"\..*"])}, []),
}  # fmt: skip
FUSED: dict[str, tuple[Kind, str, bool]] = {
    "modelopt FP8": (NESTED, "FP8", True),
    "modelopt FP8, the text model without its prefix": (NESTED, "FP8", False),
    "modelopt NVFP4": (NESTED_DENSE, "NVFP4", True),
    "modelopt NVFP4 of a text model": (DENSE, "NVFP4", True),
    "FBGEMM": (NESTED, "fbgemm_fp8", True),
    "FBGEMM of a text model": (DENSE, "fbgemm_fp8", True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of checkpoints by name, each written once, and its twin beside it."""
    root = tmp_path_factory.mktemp("quantized")

    def write(name: str) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        if name in FUSED:
            kind, form, has_prefix = FUSED[name]
            write_fused(folder, kind, form, has_prefix=has_prefix)
        else:
            kind, groups, ignore = COMPRESSED[name]
            write_compressed(folder, kind, {key: (RECIPES[r], targets) for key, (r, targets) in groups.items()}, ignore)
        return folder

    return write


def numbers(weight: Weight) -> Tensor:
    return weight.expanded() if isinstance(weight, StoredMatrix) else weight.float()


def matrices(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """All of the model's matrices in float32 by name; experts' as (C_out, C_in), gate and up joined."""
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj"):  # fused experts
            for number, (first, second) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                yield f"{name}.{number}.gate_up", first.t()
                yield f"{name}.{number}.down", second.t()
        elif type(module).__name__ == "Expert":
            name = name.replace(".experts.experts.", ".experts.")
            joined = getattr(module, "gate_up", None)
            yield (
                f"{name}.gate_up",
                numbers(joined) if joined is not None else torch.cat([numbers(module.gate), numbers(module.up)]),
            )
            yield f"{name}.down", numbers(module.down)
        elif hasattr(module, "weight") and not isinstance(module, StoredMatrix):
            yield name, numbers(module.weight)


@pytest.mark.parametrize("name", [*COMPRESSED, *FUSED])
def test_weights_and_logits_are_those_of_the_twin(written: Callable[[str], Path], name: str) -> None:
    folder = written(name)
    model = load_checkpoint(folder / "stored", dtype=torch.float32)
    twin = load_checkpoint(folder / "twin", dtype=torch.float32)
    found, expected = dict(matrices(model)), dict(matrices(twin))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
    ids = torch.randint(VOCABULARY, (3, 15), generator=torch.Generator().manual_seed(5))
    wanted = twin(ids)
    assert wanted.std() > 0.1
    assert (model(ids) - wanted).abs().max() <= 1e-5
    for row in range(3):
        assert (model(ids[row : row + 1]) - wanted[row]).abs().max() <= 1e-5
        assert (model(ids[row : row + 1, :1]) - wanted[row, :1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["w4a16 with zero points, dense layers", "NVFP4", "modelopt NVFP4", "FBGEMM"])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_16_bit_weights_are_rounded_once(written: Callable[[str], Path], name: str, is_mapped: bool) -> None:
    model = load_checkpoint(written(name) / "stored", dtype=torch.bfloat16, is_mapped=is_mapped)
    twin = load_checkpoint(written(name) / "twin", dtype=torch.float32)
    forms = {path: module for path, module in model.named_modules() if isinstance(module, StoredMatrix)}
    assert forms
    ours = {id(module): module.expanded(torch.bfloat16) for module in forms.values()}
    exact = {path: weight for path, weight in matrices(twin) if ".experts." not in path}
    for path, weight in exact.items():
        form = forms.get(f"{path}.weight")
        if form is not None:
            assert torch.equal(ours[id(form)], weight.bfloat16()), path


@pytest.mark.parametrize("name", [*COMPRESSED, *FUSED])
def test_every_stored_tensor_has_one_use(written: Callable[[str], Path], name: str) -> None:
    folder = written(name) / "stored"
    sources = checked_sources(folder, TextConfig.from_folder(folder)).values()
    used = [tensor.name for source in sources for tensor in source.tensors.values()]
    stored = {key for key in load_file(folder / STORED) if not key.startswith(("vision_model", "multi_modal"))}
    left = {key for key in stored - set(used) if skipped(key) is None and not key.endswith(".weight_shape")}
    assert len(used) == len(set(used)) and not left


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("w4a16 as published", {"float32", "w4a16 (int4, groups of 16)"}),
        ("w4a16 beside bfloat16", {"bfloat16", "w4a16 (int4, groups of 16)"}),
        ("FP8 experts alone, as Maverick's", {"bfloat16", "FP8 (per channel)"}),
        ("int4 experts, FP8 attention", {"float32", "FP8 (per channel)", "w4a16 (int4, groups of 16)"}),
        ("int8", {"float32", "int8 (per channel)"}),
        ("modelopt NVFP4", {"float32", "NVFP4 (groups of 16)"}),
        ("modelopt FP8", {"float32", "FP8 (per tensor)"}),
        ("FBGEMM", {"float32", "FP8 (per channel)"}),
    ],
)
def test_labels(written: Callable[[str], Path], name: str, labels: set[str]) -> None:
    folder = written(name) / "stored"
    sources = checked_sources(folder, TextConfig.from_folder(folder))
    assert {source.scheme.label for source in sources.values()} == labels
    assert {sources[key].scheme.label for key in sources if "norm" in key or "router" in key} <= {"float32", "bfloat16"}


@pytest.fixture
def copy(written: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(written(name) / "stored", folder)
        tensors = load_file(folder / STORED)
        change(tensors)
        save_file(tensors, folder / STORED, {"format": "pt"})
        return folder

    return make


LAYER = "language_model.model.layers.1"
MLP = f"{LAYER}.feed_forward"
EXPERT = f"{MLP}.experts.1.up_proj"
FEW = torch.ones(1)


def set_to(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def removed(beginning: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(beginning)]


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("w4a16 as published", removed(f"{EXPERT}.weight_scale"), f"tensor {EXPERT}.weight_scale is missing"),
        ("w4a16 as published", removed(f"{EXPERT}.weight_packed"), f"tensor {EXPERT}.weight_scale is there"),
        ("w4a16 as published", removed(EXPERT), "experts.1.up_proj.weight is missing"),
        ("w4a16 as published", removed(f"{MLP}.shared_expert.up"), "up_proj.weight is missing"),
        ("w4a16 as published", set_to(f"{EXPERT}.weight", torch.ones(80, 48)), f"tensor {EXPERT}.weight is"),
        ("w4a16 as published", set_to(f"{EXPERT}.bias", torch.ones(80)), f"tensor {EXPERT}.bias"),
        ("w4a16 as published", set_to(f"{EXPERT}.weight_scale", torch.ones(80, 7)), f"{EXPERT}.weight_scale has shape"),
        ("w4a16 as published", set_to(f"{MLP}.router.weight_scale", FEW), "router.weight_scale"),
        ("w4a16 as published", set_to(f"{LAYER}.self_attn.q_proj.weight_scale", FEW), "q_proj.weight_scale"),
        ("w4a16 as published", set_to(f"{MLP}.experts.0.activation_fn.scales", FEW), "activation_fn.scales"),
        ("w4a16 as published", set_to(f"{MLP}.experts.7.up_proj.weight", torch.ones(80, 48)), "experts.7"),
        ("w4a16 as published", set_to(f"{MLP}.experts.gate_up_proj", torch.ones(3, 48, 160)), "experts"),
        ("FP8 dynamic as published", set_to(f"{EXPERT}.weight_scale", torch.ones(48, 1)), f"{EXPERT}.weight_scale has"),
        ("FP8 dynamic as published", set_to(f"{EXPERT}.weight", torch.ones(80, 48)), f"tensor {EXPERT}.weight_scale"),
        ("NVFP4", removed(f"{EXPERT}.weight_global_scale"), f"tensor {EXPERT}.weight_global_scale is missing"),
        ("modelopt NVFP4", removed(f"{MLP}.experts.down_proj_weight_scale_2"), "scale_2 is missing"),
        ("FBGEMM", removed(f"{MLP}.experts.down_proj_scale"), "experts.down_proj_scale is missing"),
        ("FBGEMM", removed(f"{MLP}.experts.down_proj"), "experts.down_proj is missing"),
    ],
)  # fmt: skip
def test_damage_is_named(
    copy: Callable[..., Path], name: str, change: Callable[[dict[str, Tensor]], object], what: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy(name, change))
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy("w4a16 as published", lambda tensors: None)
    data = (folder / STORED).read_bytes()
    for cut in (1, 1000, len(data) - 4):
        (folder / STORED).write_bytes(data[:-cut])
        with pytest.raises(CheckpointError, match=STORED):
            load_checkpoint(folder)


def test_scales_of_activations_and_caches_are_left_out(copy: Callable[..., Path]) -> None:
    """They are not weights: what a server computes in FP8 is computed in floating point here."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("k_proj.k_scale", "v_proj.v_scale", "k_scale", "v_scale", "q_proj.input_scale"):
            tensors[f"{LAYER}.self_attn.{name}"] = torch.tensor(0.5)
        tensors[f"{EXPERT}.input_scale"] = torch.tensor(0.5)

    folder = copy("FP8 dynamic as published", change)
    report = inspect_folder(str(folder), verify=True)
    assert report["weights"]["ignored_tensors"] == 6 and report["weights"]["ignored_bytes"] == 6 * 4
    assert "not used: 6 tensors, 24 B" in listing(report)
    ids = torch.randint(VOCABULARY, (1, 9))
    expected = load_checkpoint(copy_of(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if skipped(n)]))
    assert torch.equal(load_checkpoint(folder)(ids), expected(ids))


@pytest.mark.parametrize("name", ["FP8 dynamic as published", "int8"])
def test_activations_are_not_quantized(copy: Callable[..., Path], name: str) -> None:
    """Whether config.json tells servers to quantize them (w8a8) or not (w8a16)."""
    folder, ids = copy(name, lambda tensors: None), torch.randint(VOCABULARY, (1, 9))
    file = folder / "config.json"
    expected, config = load_checkpoint(folder, dtype=torch.float32)(ids), json.loads(file.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["num_bits"] == 8
    group["input_activations"] = None
    file.write_text(json.dumps(config))
    assert torch.equal(load_checkpoint(folder, dtype=torch.float32)(ids), expected)


def copy_of(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    tensors = load_file(other / STORED)
    change(tensors)
    save_file(tensors, other / STORED, {"format": "pt"})
    return other


@pytest.mark.parametrize("older", [True, False])
def test_settings_may_be_missing_or_beside_the_configuration(copy: Callable[..., Path], older: bool) -> None:
    """modelopt's older versions wrote a file of their own; the tensors tell enough without either."""
    folder = copy("modelopt NVFP4", lambda tensors: None)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("quantization_config")
    file.write_text(json.dumps(config))
    if older:
        said = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    sources = checked_sources(folder, TextConfig.from_folder(folder))
    assert sources["model.layers.1.feed_forward.experts.down_proj"].scheme.label == "NVFP4 (groups of 16)"
