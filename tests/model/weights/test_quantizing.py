"""Quantizing on loading: the right weights, the predicted bytes, and logits of the weights that the codes stand for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from l4ctx.planning.published import plain, quantizing
from model.config import TextConfig
from model.costs import parameter_count
from model.errors import CheckpointError
from model.moe import MoE
from model.quantization.choice import KINDS, Quantization
from model.quantization.form import StoredMatrix
from model.transformer import Transformer
from model.weights.loading import checked_sources, load_checkpoint
from model.weights.quantizing import QuantizedSource, quantized_sources
from support.toy_checkpoints import Kind, write_kind

SHAPES = {"hidden_size": 96, "intermediate_size": 64, "intermediate_size_mlp": 160, "moe_layers": [0, 3, 4]}
ALL = [*(Quantization(kind) for kind in KINDS), Quantization("int4", with_attention=True)]
IDS = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with and without experts, in bfloat16."""
    kind = Kind({**SHAPES, "attention_bias": True}, dtype=torch.bfloat16)
    return write_kind(tmp_path_factory.mktemp("toy") / "moe", "moe", kind, 0.2, seed=1).folder


def stored_matrices(model: Transformer) -> dict[str, StoredMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredMatrix)}


def logits(model: Transformer) -> Tensor:
    found = model(IDS)
    assert found is not None
    return found


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_what_is_covered_is_quantized_and_nothing_else(folder: Path, quantization: Quantization) -> None:
    model, exact = load_checkpoint(folder, quantization=quantization), load_checkpoint(folder)
    names = set(stored_matrices(model))
    pattern = r"model\.layers\.\d\.feed_forward\.((shared_expert\.)?\w+_proj\.weight|experts\.experts\.\d\.\w+)"
    assert {name for name in names if re.fullmatch(pattern, name)} == {
        name for name in names if "self_attn" not in name
    }
    assert len([name for name in names if "experts.experts" in name]) == 3 * 5 * 2  # layers, experts, matrices
    assert len([name for name in names if "shared_expert" in name]) == 3 * 3
    o_proj = 0 if quantization.kind == "int4" else 8  # its 60 columns hold no groups
    attention = 8 * 3 + o_proj if quantization.with_attention else 0
    assert len([name for name in names if "self_attn" in name]) == attention
    kept = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        if name in kept or not quantization.covers(name):
            assert torch.equal(kept[name], parameter), name


def planned(config: TextConfig, quantization: Quantization) -> tuple[int, int]:
    """Number of weights that are quantized, and their bytes, by the configuration alone."""
    parts = quantizing(quantization, plain("bfloat16")).weights(config).parts
    made = [part for part in parts if part.stored != "bfloat16"]
    return sum(part.parameters for part in made), sum(part.num_bytes for part in made)


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_bytes_are_those_of_the_plan(folder: Path, quantization: Quantization) -> None:
    config = TextConfig.from_folder(folder)
    made = quantized_sources(checked_sources(folder, config), quantization)
    sources = [source for source in made.values() if isinstance(source, QuantizedSource)]
    model = load_checkpoint(folder, quantization=quantization)
    held = sum(buffer.nbytes for matrix in stored_matrices(model).values() for buffer in matrix.buffers())
    counted = sum(source.parameters for source in sources), sum(source.num_bytes for source in sources)
    assert counted == planned(config, quantization) and counted[1] == held
    assert sum(source.parameters for source in made.values()) == parameter_count(config)


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(folder: Path, quantization: Quantization) -> None:
    quantized, plain = (
        load_checkpoint(folder, dtype="float32", quantization=quantization),
        Transformer(TextConfig.from_folder(folder)),
    )
    plain.load_state_dict(load_checkpoint(folder, dtype="float32", is_mapped=False).state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in load_checkpoint(folder, dtype="float32").named_parameters():
            plain.get_parameter(name).copy_(parameter)
        expand(quantized, plain)
    expected = logits(plain)
    assert (logits(quantized) - expected).abs().max() <= 1e-5 * expected.abs().max()


def expand(quantized: Transformer, plain: Transformer) -> None:
    """Writes the values of the quantized model's matrices into the other's parameters."""
    for name, matrix in stored_matrices(quantized).items():
        if ".experts." not in name:
            plain.get_parameter(name).copy_(matrix.expanded())
            continue
        found = re.fullmatch(r"(.*)\.experts\.experts\.(\d)\.(\w+)", name)
        assert found is not None
        moe = plain.get_submodule(found[1])
        assert isinstance(moe, MoE)
        fused = moe.experts.get_parameter(f"{found[3]}_proj")
        fused[int(found[2])].copy_(matrix.expanded().t())


def test_experts_stored_apart_are_quantized_alike(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    split: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        path, _, kind = name.rpartition(".")
        if not path.endswith(".experts"):
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.t().chunk(2) if kind == "gate_up_proj" else [matrix.t()]
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            split |= {f"{path}.{expert}.{n}.weight": p.contiguous() for n, p in zip(names, parts, strict=True)}
    save_file(split, tmp_path / "model.safetensors")
    for quantization in ALL:
        fused, apart = (
            load_checkpoint(where, dtype="float32", quantization=quantization) for where in (folder, tmp_path)
        )
        assert torch.allclose(logits(fused), logits(apart), rtol=0, atol=1e-4)


def test_matrices_without_whole_groups_stay_as_they_are(tmp_path: Path) -> None:
    """The experts' down_proj has 24 columns: too few for a group, so that gate_up_proj alone is quantized."""
    changes = {**SHAPES, "intermediate_size": 24}
    toy = write_kind(tmp_path / "toy", "toy", Kind(changes, dtype=torch.bfloat16), 0.2, seed=2).folder
    quantization = Quantization("int4")
    config = TextConfig.from_folder(toy)
    made = quantized_sources(checked_sources(toy, config), quantization)
    counted = [source for source in made.values() if isinstance(source, QuantizedSource)]
    assert planned(config, quantization) == (
        sum(source.parameters for source in counted),
        sum(source.num_bytes for source in counted),
    )
    names = set(stored_matrices(load_checkpoint(toy, quantization=quantization)))
    assert any(name.endswith(".gate_up") for name in names) and not any(name.endswith(".down") for name in names)
    assert logits(load_checkpoint(toy, quantization=quantization)).isfinite().all()


def test_quantizing_twice_is_refused(folder: Path) -> None:
    config = TextConfig.from_folder(folder)
    once = quantized_sources(checked_sources(folder, config), Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"--quantize int4: .*stored as int8 \(per channel\).*leave it out"):
        quantized_sources(once, Quantization("int4"))


@pytest.mark.parametrize("text", ["int5", "int4+", "int4+mlp", "+attention", ""])
def test_other_kinds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not one of int8, int4, int4-g32, fp8"):
        Quantization.parse(text)


def test_a_kind_is_read_as_it_is_written() -> None:
    for quantization in ALL:
        assert Quantization.parse(str(quantization)) == quantization
