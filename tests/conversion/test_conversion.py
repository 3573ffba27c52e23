"""`l4ctx quantize` writes what compressed-tensors would; transformers loads it; interruptions lose nothing finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

import l4ctx.conversion.writing
from l4ctx.conversion.forms import Form
from l4ctx.conversion.layout import Conversion
from l4ctx.conversion.writing import check_output, write
from l4ctx.errors import RequestError
from model.errors import CheckpointError
from model.weights.loading import load_checkpoint
from support.cli_runner import Result, check_refused, run_here
from support.compressed import FP8, INT4, INT8, TOKENS, Recipe, dequantized
from support.quantized_toys import write_compressed
from support.toy_checkpoints import BASE, Kind, write_kind

SIZES = BASE | {"hidden_size": 96, "intermediate_size": 64, "intermediate_size_mlp": 160, "head_dim": 16}
CHANGES = {**SIZES, "moe_layers": [0, 3, 4]}
KINDS = {
    "flat": Kind(CHANGES, dtype=torch.bfloat16),
    "nested": Kind(CHANGES, nested=True, max_shard_size="300KB"),
}
RECIPES = {
    "w4a16": Recipe("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}),
    "w8a16": Recipe("pack-quantized", INT8 | {"strategy": "channel"}),
    "fp8": Recipe("float-quantized", FP8 | {"strategy": "channel"}, activations=TOKENS),
}
IDS = torch.randint(90, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("sources")
    return {name: write_kind(top / name, name, kind, 0.2, seed=5).folder for name, kind in KINDS.items()}


def quantize(model: Path, output: Path, *options: str) -> Result:
    return run_here("quantize", str(model), "-o", str(output), *options)


def converted(model: Path, output: Path, *options: str) -> Path:
    result = quantize(model, output, *options)
    assert result.code == 0, result
    return output


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", RECIPES)
def test_transformers_computes_the_same(sources: dict[str, Path], tmp_path: Path, name: str, form: str) -> None:
    """Weights alone are compared: what transformers does to activations of fp8 is switched off."""
    output = converted(sources[name], tmp_path / "made", "--to", form)
    if form == "fp8":
        config = json.loads((output / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        (output / "config.json").write_text(json.dumps(config))
    oracle = Llama4ForCausalLM if name == "flat" else Llama4ForConditionalGeneration
    theirs = oracle.from_pretrained(output, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(IDS, use_cache=False).logits
    ours = load_checkpoint(output, dtype="float32")(IDS)
    assert ours is not None
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    assert (ours - expected).abs().max() <= 2e-2 * expected.abs().max()  # the library rounds weights to bfloat16


@pytest.mark.parametrize("with_attention", [False, True])
@pytest.mark.parametrize("form", RECIPES)
def test_it_writes_what_the_library_writes(
    sources: dict[str, Path], tmp_path: Path, form: str, with_attention: bool
) -> None:
    """The same tensors of the same shapes, and the same settings; read by the library they are near the source."""
    attention = [] if with_attention else ["re:.*self_attn"]
    groups = {"group_0": (RECIPES[form], ["Linear"])}
    write_compressed(tmp_path / "library", KINDS["nested"], groups, ["re:.*lm_head", *attention])
    options = ["--with-attention"] * with_attention
    output = converted(sources["nested"], tmp_path / "made", "--to", form, *options)
    theirs, ours = tmp_path / "library" / "stored", tensors(output)
    expected = tensors(theirs)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    settings = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (output, theirs)]
    assert sorted(settings[0].pop("ignore")) == sorted(settings[1].pop("ignore"))
    assert settings[0] == settings[1]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    for name, tensor in tensors(sources["nested"]).items():
        if name in ours and ours[name].dtype == tensor.dtype:
            assert torch.equal(ours[name], tensor), name
        elif not name.endswith("gate_up_proj"):
            for expert, weight in enumerate(tensor if tensor.dim() == 3 else [tensor]):
                path = f"{name.replace('.down_proj', '')}.{expert}.down_proj" if tensor.dim() == 3 else name[:-7]
                own = {n.rpartition(".")[2]: t for n, t in ours.items() if n.startswith(f"{path}.weight")}
                found = dequantized(RECIPES[form], own).float()
                exact = (weight.t() if tensor.dim() == 3 else weight).float()
                assert (found - exact).square().mean() < 0.02 * exact.square().mean(), path


def test_experts_stored_apart_make_the_same(sources: dict[str, Path], tmp_path: Path) -> None:
    split: dict[str, Tensor] = {}
    for name, tensor in tensors(sources["flat"]).items():
        path, _, kind = name.rpartition(".")
        if not path.endswith(".experts"):
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            both = matrix.t().chunk(2) if kind == "gate_up_proj" else [matrix.t()]
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            split |= {f"{path}.{expert}.{n}.weight": p.contiguous() for n, p in zip(names, both, strict=True)}
    apart = tmp_path / "apart"
    apart.mkdir()
    save_file(split, apart / "model.safetensors", {"format": "pt"})
    (apart / "config.json").write_bytes((sources["flat"] / "config.json").read_bytes())
    for form in RECIPES:
        one, other = (
            tensors(converted(source, tmp_path / f"{source.name}-{form}", "--to", form))
            for source in (sources["flat"], apart)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)


def test_shards_that_are_there_are_not_written_again(sources: dict[str, Path], tmp_path: Path) -> None:
    output = converted(sources["nested"], tmp_path / "made")
    shards = sorted(output.glob("*.safetensors"))
    whole = {file.name: file.read_bytes() for file in output.iterdir()}
    assert len(shards) > 3
    for file in (output / "config.json", shards[1]):
        file.unlink()
    (output / f".{shards[1].name}.partial").write_bytes(b"what a killed run left")
    shards[2].write_bytes(whole[shards[2].name][:-1])  # cut short
    kept = {file.name: file.stat().st_ino for file in (shards[0], shards[3])}
    result = quantize(sources["nested"], output, "--json")
    assert json.loads(result.stdout)["shards_found"] == len(shards) - 2
    assert {file.name: file.read_bytes() for file in output.iterdir()} == whole
    assert all((output / name).stat().st_ino == inode for name, inode in kept.items())


def test_another_form_or_source_is_not_gone_on_with(sources: dict[str, Path], tmp_path: Path) -> None:
    """All shards are written again, though their names are the same."""
    output = converted(sources["nested"], tmp_path / "made")
    result = quantize(sources["nested"], output, "--to", "w4a16", "--with-attention", "--replace", "--json")
    assert json.loads(result.stdout)["shards_found"] == 0


def test_a_full_disk_leaves_finished_shards(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write_at = 0, os.pwrite

    def pwrite(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(*arguments)

    output = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        check_refused(quantize(sources["nested"], output, "-q"), 5, "the disk is full", "the same command goes on")
    names = {file.name for file in output.iterdir()}
    assert names and all(name.startswith("model-") for name in names), names
    result = quantize(sources["nested"], output, "--json")
    assert json.loads(result.stdout)["shards_found"] == len(names)
    again = converted(sources["nested"], tmp_path / "again")
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in output.iterdir())


def test_too_little_room_is_told_before(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(l4ctx.conversion.writing, "available_disk", lambda folder: 1000)
    check_refused(quantize(sources["flat"], tmp_path / "made", "-q"), 5, "are to be written, and 1000 B are free there")
    assert not (tmp_path / "made").exists()


def test_what_is_there_is_not_written_over(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["flat"]
    check_refused(quantize(source, source), 2, "the checkpoint itself")
    output = converted(source, tmp_path / "made")
    check_refused(quantize(source, output), 2, "a checkpoint is there already", "--replace")
    converted(source, output, "--to", "fp8", "--replace")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    check_refused(quantize(source, tmp_path / "other"), 2, "holds other files (notes.txt)")
    (tmp_path / "file").write_text("mine")
    check_refused(quantize(source, tmp_path / "file"), 2, "a file, not a folder")


def test_what_cannot_be_quantized_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source, output = sources["flat"], tmp_path / "made"
    check_refused(quantize(source, output, "--group-size", "64"), 2, "has 96 columns, no multiple of a group of 64")
    check_refused(quantize(source, output, "--group-size", "16"), 2, "groups of 128, 64 or 32")
    check_refused(quantize(source, output, "--to", "fp8", "--group-size", "32"), 2, "other forms have none")
    check_refused(run_here("quantize", str(source)), 2, "name the checkpoint and the folder to write")
    once = converted(source, output)
    check_refused(quantize(once, tmp_path / "twice"), 3, "give a checkpoint that is not quantized yet")


def test_two_do_not_write_at_once(sources: dict[str, Path], tmp_path: Path) -> None:
    import fcntl

    conversion = Conversion.of(sources["flat"], Form("fp8"))
    (tmp_path / "made").mkdir()
    with (tmp_path / "made" / f".{conversion.shards[0].name}.partial").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        check_refused(quantize(sources["flat"], tmp_path / "made", "--to", "fp8", "-q"), 2, "another l4ctx quantize")


@pytest.mark.parametrize("planted", [os.mkfifo, lambda file: os.link(file.parents[1] / "mine", file)])
def test_what_is_planted_under_an_unfinished_name_is_not_written_to(
    sources: dict[str, Path], tmp_path: Path, planted: Callable[[Path], object]
) -> None:
    conversion = Conversion.of(sources["flat"], Form("fp8"))
    (tmp_path / "made").mkdir()
    (tmp_path / "mine").write_text("mine")
    planted(tmp_path / "made" / f".{conversion.shards[0].name}.partial")
    with pytest.raises(RequestError, match="not a file that a killed run left"):
        write(conversion, tmp_path / "made", lambda done, total: None)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_large_tokenizer_goes_along(sources: dict[str, Path], tmp_path: Path) -> None:
    """Llama 4's has 28 MB."""
    source = Path(shutil.copytree(sources["flat"], tmp_path / "source"))
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(28 * 10**6)
    write(Conversion.of(source, Form("fp8")), tmp_path / "made", lambda done, total: None)
    assert (tmp_path / "made" / "tokenizer.json").stat().st_size == 28 * 10**6


def test_what_cannot_be_read_is_named(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path, most: int) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(l4ctx.conversion.writing, "read_regular", denied)
    with pytest.raises(CheckpointError, match=r"flat/\S+: cannot be read: Permission denied$"):
        write(Conversion.of(sources["flat"], Form("fp8")), tmp_path / "made", lambda done, total: None)


def test_the_size_is_known_before(sources: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    conversion = Conversion.of(sources["nested"], Form("w8a16"))
    check_output(conversion, tmp_path / "made", replace=False)
    assert write(conversion, tmp_path / "made", lambda done, total: told.append((done, total))) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors"))
    assert told[-1] == (size, size) and told == sorted(told)
    for file in (tmp_path / "made").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata()["format"] == "pt"


def test_a_file_that_is_read_in_part_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    original = os.fstat

    def larger(descriptor: int) -> os.stat_result:
        status = original(descriptor)
        return os.stat_result((*status[:6], status.st_size + 1, *status[7:]))

    monkeypatch.setattr(os, "fstat", larger)
    with pytest.raises(CheckpointError, match="only 2 of its 3 bytes could be read"):
        l4ctx.conversion.writing._copy(tmp_path / "tokenizer_config.json", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
