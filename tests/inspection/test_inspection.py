"""What l4ctx inspect says of checkpoints, whole, damaged in each of their parts, and hostile; and its command."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from l4ctx.checkpoint.chat_template import CHILD
from l4ctx.cli.tables.inspection import listing
from l4ctx.confinement.sandbox import MEANS
from l4ctx.contexts.reader import Context
from l4ctx.inspection import checkpoint
from l4ctx.inspection.folder import exit_code, inspect_folder
from model.config import TextConfig
from model.costs import parameter_count
from support.cli_runner import (
    ANSWER,
    DOCUMENT,
    QUESTION,
    TINY,
    change_config,
    changed_checkpoint,
    check_refused,
    run_here,
    text_file,
    text_only_checkpoint,
)
from support.context_toys import BLOCK, CHUNK, keep, tokens
from support.inspection_checks import (
    Break,
    check_damage,
    cut,
    edit_json,
    flip,
    inspected,
    pipe,
    randomly_damaged,
    whats,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's text model as a multimodal one is published: three shards and an index, nested, a vision model."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    text_only_checkpoint(folder.parent).rename(folder)
    weights = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    weights |= {"vision_model.class_embedding": torch.ones(8), "multi_modal_projector.linear.weight": torch.ones(4, 8)}
    names = sorted(weights)
    index = {}
    for number in range(3):
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[number::3]}, folder / shard)
        index |= dict.fromkeys(names[number::3], shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    nested = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": config}
    (folder / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    return folder


MODEL_LINES = """\
architecture     Llama4ForConditionalGeneration
parameters       2,952,320 by the configuration, 2,952,320 are stored
weights          5.6 MiB in 3 shards, 51 tensors in BF16
                 vision: 2 tensors, 160 B
stored as        bfloat16, not quantized
by owner         attention                 393,216 weights  768 KiB  bfloat16
                 routers, norms, biases      3,200 weights  6.2 KiB  bfloat16
layers           4: 3 RoPE, 1 NoPE; 4 with experts (MoE)
experts          4 in each MoE layer, 1 a token
hidden size      128
heads            4 of size 64; 2 for keys and values
attention        chunks of 2,048 tokens; 10,485,760 positions; temperature tuning on
rope             default, theta 10,000
vocabulary       2,304
keys and values  512 B a token in bfloat16, and windows of 3.0 MiB
chat template    yes
stop tokens      2291, 2294, 2295
damage           none, every byte was read"""


@pytest.fixture
def model(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "model")


def test_a_checkpoint_for_programs() -> None:
    report, _ = inspected(TINY)
    config = TextConfig.from_folder(TINY)
    assert exit_code(report) == 0 and report["kind"] == "model" and not report["verified"]
    assert report["architecture"] == "Llama4ForConditionalGeneration"
    assert report["tokenizer_vocabulary"] == config.vocab_size == 2304
    assert (report["chat_template"], report["stop_tokens"]) == (True, [2291, 2294, 2295])
    assert report["confinement"] == {"limits": True} | {name: name in CHILD.held() for name in MEANS}
    shown, weights = report["config"], report["weights"]
    assert shown["parameters"] == weights["parameters"] == parameter_count(config)
    assert (shown["num_rope_layers"], shown["num_nope_layers"], shown["moe_layers"]) == (3, 1, (0, 1, 2, 3))
    assert shown["kv_bytes_per_token_bf16"] == 2 * 2 * 64 * 2 and shown["window_bytes_bf16"] == 3 * 2048 * 512
    assert weights["bytes"] == 2 * weights["parameters"] and weights["dtypes"] == {"BF16": weights["tensors"]}
    assert (weights["shards"], weights["ignored_tensors"]) == (2, 0)
    assert weights["stored_as"] == "bfloat16, not quantized"
    assert sum(share["bytes"] for share in weights["by_owner"]) == weights["bytes"] + weights["vision_bytes"]
    assert {"owner": "vision", "stored": "bfloat16", "parameters": 1106688, "bytes": 2213376} in weights["by_owner"]
    assert weights["vision_tensors"] == 74 and report["vision"]["tokens_per_tile"] == 16


def test_a_checkpoint_for_people(model: Path) -> None:
    report, text = inspected(model, verify=True)
    weights = report["weights"]
    assert exit_code(report) == 0 and (weights["shards"], weights["readable_shards"]) == (3, 3)
    assert (weights["vision_tensors"], weights["vision_bytes"]) == (2, 4 * 8 + 4 * 4 * 8)
    for line in MODEL_LINES.splitlines():
        assert line in text.splitlines()


def test_a_configuration_alone_is_no_damage(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    report, text = inspected(tmp_path)
    assert exit_code(report) == 0 and report["weights"]["shards"] == 0
    assert "no weights there" in text and "2,952,320 by the configuration\n" in text


def test_a_vision_part_without_tensors_is_a_remark(tmp_path: Path) -> None:
    """Text can be asked about."""
    folder = changed_checkpoint(tmp_path, image_token_index=10**6, without="model-00002-of-00002.safetensors")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    kept = {name: shard for name, shard in index.items() if name.startswith("language_model.")}
    edit_json(folder / INDEX, weight_map=kept)
    report, text = inspected(folder, verify=True)
    assert exit_code(report) == 0 and report["vision"]["has_tensors"] is False
    assert REMARK in text.splitlines() and "\nimages " not in text
    document = text_file(tmp_path / "a.txt", DOCUMENT)
    assert run_here("ask", QUESTION, str(document), "--model", str(folder), "--quiet").stdout == ANSWER
    (folder / "model-00001-of-00002.safetensors").unlink()  # who knows what else is missing
    report, text = inspected(folder)
    assert report["vision"]["has_tensors"] is None and REMARK not in text.splitlines()


REMARK = (" " * 17) + "vision: described in config.json, but no tensors are there; --no-images reads the text alone"
PREPROCESSOR = "preprocessor_config.json"
BROKEN_VISION: dict[str, tuple[Break, list[str]]] = {  # what ask refuses where there are images
    "mean": (lambda m: edit_json(m / PREPROCESSOR, image_mean=[0.5]), [f"{PREPROCESSOR}: image_mean"]),
    "another size": (lambda m: edit_json(m / PREPROCESSOR, size=336), [f"{PREPROCESSOR}: size"]),
    "no JSON": (lambda m: cut(m / PREPROCESSOR, 40), [f"{PREPROCESSOR}: "]),
    "of transformers 5": (
        lambda m: (m / "processor_config.json").write_text('{"image_processor": []}'),
        ["processor_config.json: image_processor"],
    ),
    "a pipe": (lambda m: pipe(m / PREPROCESSOR), [f"{PREPROCESSOR}: not a regular file"]),
    "another patch token": (lambda m: change_config(m, image_token_index=5), ["image_token_index of config.json is 5"]),
    "no such token": (
        lambda m: change_config(m, image_token_index=2304),
        ["image_token_index is 2,304, but there are only 2,304 tokens", "image_token_index of config.json is 2304"],
    ),
    "no patch token": (lambda m: _rename_token(m, "<|patch|>"), ["the tokenizer has no token <|patch|>"]),
    "a tensor missing": (lambda m: _drop_tensor(m, "vision_model.class_embedding"), ["class_embedding is missing"]),
}


def _rename_token(model: Path, name: str) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(name, "<|other|>"), encoding="utf-8")


def _drop_tensor(model: Path, name: str) -> None:
    index = json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"]
    weights = load_file(model / index[name])
    del weights[name]
    save_file(weights, model / index.pop(name))
    edit_json(model / INDEX, weight_map=index)


@pytest.mark.parametrize("case", BROKEN_VISION)
def test_what_keeps_images_from_being_read_is_damage(case: str, tmp_path: Path) -> None:
    breaking, damage = BROKEN_VISION[case]
    folder = changed_checkpoint(tmp_path)
    breaking(folder)
    report, _ = inspected(folder)
    check_damage(report, damage)
    if case != "a pipe":  # which asking waits for
        Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
        check_refused(
            run_here("ask", "What is it?", str(tmp_path / "image.png"), "--model", str(folder), "--quiet"),
            3,
            damage[-1],
        )


TEMPLATE = "chat_template.jinja"
SECOND = "model-00002-of-00003.safetensors"
BROKEN_MODELS: dict[str, tuple[Break, list[str], list[str]]] = {  # damage, one text a line, and what is still shown
    "missing shards": (
        lambda m: [(m / SECOND).unlink(), (m / SECOND.replace("2-", "3-")).unlink()],
        ["00002-of-00003.safetensors: missing shard", "00003-of-00003.safetensors: missing shard"],
        ["1 of 3 shards", "3 RoPE", "chat template    yes"],
    ),
    "a link to nothing": (
        lambda m: [(m / SECOND).unlink(), (m / SECOND).symlink_to("gone")],
        ["missing shard"],
        ["2 of 3 shards"],
    ),
    "an index that is a link to nothing": (
        lambda m: [(m / INDEX).unlink(), (m / INDEX).symlink_to("gone")],
        ["not a safetensors index"],
        ["3 RoPE"],
    ),
    "cut shard": (lambda m: cut(m / SECOND), [f"{SECOND}: truncated"], ["2 of 3 shards"]),
    "overlapping tensors": (
        lambda m: _overlap(m / SECOND),
        ["overlaps another one"],
        ["2 of 3 shards"],
    ),
    "a shard of another model": (
        lambda m: save_file({"x": torch.ones(2)}, m / SECOND),
        ["is missing, though"],
        ["3 shards"],
    ),
    "broken index": (lambda m: (m / INDEX).write_text("{"), ["not a safetensors index"], ["tokenizer        2,304"]),
    "index out of the folder": (
        lambda m: (m / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        ["is not a safetensors file inside the folder"],
        ["3 RoPE"],
    ),
    "other sizes": (lambda m: _edit_text_config(m, hidden_size=132), ["has shape"], ["size      132", "3 shards"]),
    "another architecture": (
        lambda m: edit_json(m / "config.json", architectures=["Other\x1b[2J"]),
        ["architectures"],
        ["architecture     Other", "3 shards"],
    ),
    "absurd sizes": (
        lambda m: _edit_text_config(m, hidden_size=2**39, intermediate_size=2**39),
        ["hidden_size: 549755813888"],
        ["3 shards"],
    ),
    "large sizes": (lambda m: _edit_text_config(m, hidden_size=2**20, intermediate_size=2**22), [""], ["3 RoPE"]),
    "configuration cut short": (lambda m: cut(m / "config.json", 50), ["cannot be read as JSON"], ["3 shards", "yes"]),
    "configuration of a list": (lambda m: (m / "config.json").write_text("[]"), ["holds no JSON object"], ["yes"]),
    "empty configuration": (lambda m: (m / "config.json").write_text("{}"), ["model_type"], ["3 shards"]),
    "deep configuration": (lambda m: (m / "config.json").write_text("[" * 10**5), ["recursion"], ["3 shards", "yes"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer.json: no such file"], ["3 RoPE", "yes"]),
    "broken tokenizer": (lambda m: cut(m / "tokenizer.json"), ["tokenizer.json: cannot be loaded"], ["3 RoPE", "yes"]),
    "a tokenizer too large": (
        lambda m: _edit_text_config(m, vocab_size=2303),
        ["has shape"],
        ["1 more than the model has embeddings for"],
    ),
    "a template that fails": (lambda m: (m / TEMPLATE).write_text("{{ 1 / 0 }}"), ["template fails"], ["yes"]),
    "a template that is no text": (
        lambda m: (m / TEMPLATE).write_bytes(b"\xff"),
        [TEMPLATE],
        ["chat template    cannot be read", "3 shards"],
    ),
    "templates without a name": (
        lambda m: [(m / TEMPLATE).unlink(), edit_json(m / "tokenizer_config.json", chat_template=[{"name": []}])],
        [""],
        ["3 shards"],
    ),
    "stop tokens": (lambda m: edit_json(m / "generation_config.json", eos_token_id="x"), ["eos_token_id"], ["3 RoPE"]),
    "a pipe for a shard": (lambda m: pipe(m / SECOND), ["missing shard"], ["2 of 3 shards"]),
    "a pipe for a tokenizer": (lambda m: pipe(m / "tokenizer.json"), ["tokenizer.json: not a regular file"], []),
    "a pipe for a configuration": (lambda m: pipe(m / "config.json"), ["config.json: not a regular file"], []),
    "a folder for an index": (lambda m: [(m / INDEX).unlink(), (m / INDEX).mkdir()], ["not a regular file"], []),
}


def _edit_text_config(model: Path, **changes: Any) -> None:
    text = json.loads((model / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit_json(model / "config.json", text_config=text | changes)


def _overlap(shard: Path) -> None:
    """Its first two tensors of one size get the same place."""
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    twin = next(name for name in header if name != last and header[name]["shape"] == header[last]["shape"])
    header[twin]["data_offsets"] = header[last]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_part_is_told_and_the_rest_is_shown(case: str, model: Path) -> None:
    breaking, damage, shown = BROKEN_MODELS[case]
    breaking(model)
    report, text = inspected(model)
    check_damage(report, damage)
    for part in shown:
        assert part in text


@pytest.mark.parametrize("piece", [4, 64, 2**24])
def test_numbers_that_are_none(model: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Only reading finds them: in the first piece of a tensor, in the last, and in what is not used."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece)
    for shard in model.glob("*.safetensors"):
        weights = load_file(shard)
        weights = {name: tensor for name, tensor in weights.items() if tensor.numel() < 2000}  # quick in small pieces
        for name, tensor in weights.items():
            if name.endswith("layers.1.input_layernorm.weight"):
                tensor[0] = tensor[-1] = float("nan")
                tensor[1] = float("-inf")
            if name.startswith("vision"):
                tensor[3] = float("inf")
        save_file(weights, shard)
    assert not any("holds" in what for what in whats(inspected(model)[0]))
    found = [what for what in whats(inspected(model, verify=True)[0]) if "holds" in what]
    assert sorted(what.split("tensor ")[1] for what in found) == [
        "language_model.model.layers.1.input_layernorm.weight holds 2 NaN and 1 infinities; download it again",
        "vision_model.class_embedding holds 0 NaN and 1 infinities; download it again",
    ]


def test_shards_are_read_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = inspected(model, verify=True)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 4096)
    assert inspected(model, verify=True)[0] == report


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_at_random_end_in_no_traceback(model: Path, seed: int) -> None:
    for _ in randomly_damaged(model, random.Random(seed), limit=20_000):
        inspected(model)


# The command


def test_the_command_for_people_and_programs(tmp_path: Path) -> None:
    result = run_here("inspect", str(TINY), "--verify")
    assert (result.code, result.stderr) == (0, "") and result.stdout == listing(inspect_folder(str(TINY), verify=True))
    assert "\x1b" not in result.stdout
    folder = tmp_path / "context"
    keep(folder, tokens(6 * BLOCK + CHUNK + 7))
    flip(folder / Context.read(folder).states[-1].blocks[3].name, -9)
    assert run_here("inspect", str(folder)).code == 0
    result = run_here("inspect", str(folder), "--verify", "--json")
    assert (result.code, result.stderr) == (7, "") and result.stdout.isascii() and result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == json.loads(json.dumps(inspect_folder(str(folder), verify=True)))
    damaged = changed_checkpoint(tmp_path, without="tokenizer.json")
    assert run_here("inspect", str(damaged)).code == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to inspect", "l4ctx inspect MODEL|CONTEXT"]),
        ([""], ["the path is empty"]),
        (["nothing\x1b"], ["no such folder"]),
        (["file.txt"], ["file.txt: a file"]),
        (["file.txt/inside"], ["file.txt/inside"]),
        (["folder"], ["folder: neither a checkpoint", "config.json", "manifest.json"]),
        (["x" * 300], ["cannot be read: File name too long"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_neither_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    check_refused(run_here("inspect", *arguments), 2, *parts)
