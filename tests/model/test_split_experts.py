"""Experts that are stored one by one compute what the fused ones compute; incomplete and mixed sets are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l4ctx.checkpoint.fingerprint import fingerprint
from model.config import TextConfig
from model.costs import parameter_count
from model.errors import CheckpointError
from model.weights.loading import checked_sources, load_checkpoint, stored_parameters, stored_tensors
from model.weights.shards import unused_weights
from support.places import ROOT
from support.toy_checkpoints import Toys

Tensors = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.feed_forward.experts.2.gate_proj.weight"


def split_apart(tensors: Tensors, form: str) -> Tensors:
    """The experts of a checkpoint as nn.Linear has them, named after `form`."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        experts, _, fused = name.rpartition(".")
        if not experts.endswith(".experts"):
            found[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            parts = (
                {"down": matrix}
                if fused == "down_proj"
                else {"gate_up": matrix}
                if "gate_up" in form
                else dict(zip(("gate", "up"), matrix.chunk(2, dim=-1), strict=True))
            )
            for kind, part in parts.items():
                own = f"{kind}_projs.{number}" if form.endswith("lists") else f"{number}.{kind}_proj"
                found[f"{experts}.{own}.weight"] = part.t().contiguous()
    return found


@pytest.fixture
def apart(toys: Toys, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, form: str = "", change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
        folder = tmp_path / f"{name} {form}"
        shutil.copytree(toys(name, 0.25).folder, folder)
        tensors: Tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
            file.unlink()
        (folder / INDEX).unlink(missing_ok=True)
        tensors = split_apart(tensors, form)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("form", ["gate, up", "gate_up", "gate, up in lists", "gate_up in lists"])
@pytest.mark.parametrize("name", ["maverick", "nested_sharded", "top_2", "bfloat16"])
def test_the_weights_are_those_of_the_fused_form(toys: Toys, apart: Callable[..., Path], name: str, form: str) -> None:
    folder, whole = apart(name, form), toys(name, 0.25).folder
    ids, _ = toys(name, 0.25).case(1, 15)
    for is_mapped in (True, False):
        model = load_checkpoint(folder, dtype=torch.float32, is_mapped=is_mapped)
        expected = load_checkpoint(whole, dtype=torch.float32, is_mapped=is_mapped)(ids)
        assert not any(weights.requires_grad for weights in model.parameters())
        assert (model(ids) - expected).abs().max() <= 1e-6 * expected.abs().max()
        for tokens in (model(ids[:, :1]), expected[:, :1]):
            assert (tokens - expected[:, :1]).abs().max() <= 1e-6 * expected.abs().max()
    half = load_checkpoint(folder, dtype=torch.bfloat16)(ids)
    expected = load_checkpoint(whole, dtype=torch.bfloat16)(ids)
    assert (half - expected).abs().max() <= 0.05 * expected.abs().max()


def test_they_are_counted_and_known_by_their_bytes(toys: Toys, apart: Callable[..., Path]) -> None:
    config, folder = TextConfig.from_folder(toys("scout", 0.25).folder), apart("scout")
    sources = checked_sources(folder, config)
    assert stored_parameters(sources, config) == parameter_count(config)
    shutil.copy(ROOT / "samples/tiny/tokenizer.json", folder)
    before = fingerprint(folder, config, stored_tensors(sources))["weights"]
    tensors = load_file(folder / SINGLE)
    tensors[GATE][0, 0] += 1
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert fingerprint(folder, config, stored_tensors(checked_sources(folder, config)))["weights"] != before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.pop(GATE.replace("gate", "down")), f"tensor {GATE.replace('gate', 'down')} is missing"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1" in name and ".experts." in name and "up_" in name],
            "layers.1.feed_forward.experts.0.up_proj.weight is missing",
        ),
        (lambda t: t.update({GATE.replace(".2.", ".5."): t[GATE].clone()}), "there are 5 experts"),
        (lambda t: t.update({GATE.replace("gate", "gate_up"): torch.ones(44, 42)}), "gate_up_proj is there, too"),
        (lambda t: t.update({GATE.replace("2.gate_proj", "gate_projs.2"): t[GATE].clone()}), "is the same"),
        (
            lambda t: t.update({GATE.replace("2.gate_proj.weight", "gate_up_proj"): torch.ones(5, 42, 44)}),
            "all experts",
        ),
        (lambda t: t.update({GATE: t[GATE].t().contiguous()}), f"tensor {GATE} has shape [42, 22] instead of [22, 42]"),
        (
            lambda t: t.update({GATE.replace("weight", "bias"): torch.ones(22)}),
            "gate_proj.bias, which the model does not",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.self_attn.q_projection.weight": t.pop("model.layers.0.self_attn.q_proj.weight")}
            ),
            "q_proj.weight is missing, though model.layers.0.self_attn.q_projection.weight is there",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    apart: Callable[..., Path], change: Callable[[Tensors], object], part: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(apart("scout", change=change))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_one_file_goes_before_an_index(toys: Toys, tmp_path: Path) -> None:
    """Whether its shards are still there or not."""
    folder = Path(shutil.copytree(toys("nested_sharded", 0.25).folder, tmp_path / "both"))
    assert unused_weights(folder) is None
    tensors: Tensors = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= load_file(file)
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert torch.equal(load_checkpoint(folder).model.norm.weight, tensors["language_model.model.norm.weight"])
    told = unused_weights(folder)
    assert told and SINGLE in told and INDEX in told and "model-00001-of" in told and "not read" in told
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    assert torch.equal(load_checkpoint(folder).model.norm.weight, tensors["language_model.model.norm.weight"])
    assert INDEX in (unused_weights(folder) or "")


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "model-00001-of-00009.safetensors",
        "consolidated.00.pth",
        "model-q4.gguf",
    ],
)
def test_other_sets_of_weights_are_named(toys: Toys, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(toys("scout", 0.25).folder, tmp_path / "m"))
    (folder / "training_args.bin").touch()
    assert unused_weights(folder) is None
    (folder / name).touch()
    assert name in (unused_weights(folder) or "")
    (folder / SINGLE).unlink()
    alone = "no GGUF file" if name.endswith(".gguf") else r"neither model\.safetensors nor"
    with pytest.raises(CheckpointError, match=alone):
        load_checkpoint(folder)


def test_either_of_two_tied_tensors_may_be_stored(toys: Toys, tmp_path: Path) -> None:
    toy = toys("tied", 0.25)
    folder = Path(shutil.copytree(toy.folder, tmp_path / "tied"))
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    ids, expected = toy.case(1, 15)
    assert (load_checkpoint(folder)(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
