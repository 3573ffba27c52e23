"""Checkpoint folders: every published form loads, and every damage is named in one line before it does harm."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import TextConfig
from model.errors import CheckpointError, ConfigError
from model.weights import mapping
from model.weights.loading import load_checkpoint
from model.weights.mapping import MappedFiles
from model.weights.shards import read_header, text_tensors
from support.error_budget import difference
from support.places import ROOT
from support.toy_checkpoints import Toys

NORM = "model.layers.3.input_layernorm.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture
def flat(toys: Toys, tmp_path: Path) -> Path:
    """A copy of a toy in one file, to be changed by a test."""
    return Path(shutil.copytree(toys("scout", 0.25).folder, tmp_path / "flat"))


@pytest.fixture
def sharded(toys: Toys, tmp_path: Path) -> Path:
    """A copy of a nested multimodal toy in several shards with an index."""
    folder = Path(shutil.copytree(toys("nested_sharded", 0.25).folder, tmp_path / "sharded"))
    assert len(shards(folder)) >= 3 and not (folder / SINGLE).exists()
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refused(folder: Path, *parts: str, error: type[Exception] = CheckpointError) -> None:
    """Loading fails with one line that holds all `parts`."""
    with pytest.raises(error) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_each_tensor_is_where_it_belongs(flat: Path, sharded: Path) -> None:
    for folder in (flat, sharded):
        stored = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        model = load_checkpoint(folder)
        text = {
            name.removeprefix("language_model."): tensor
            for name, tensor in stored.items()
            if not name.startswith(("vision_model", "multi_modal_projector"))
        }
        loaded = dict(model.named_parameters())
        assert loaded.keys() == text.keys()
        assert all(torch.equal(loaded[name], text[name]) for name in text)
        assert not any(p.requires_grad for p in loaded.values()) and not model.training


@pytest.mark.parametrize(("name", "stored"), [("scout", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtypes(toys: Toys, name: str, stored: torch.dtype) -> None:
    folder = toys(name, 0.25).folder
    assert load_checkpoint(folder).dtype == load_checkpoint(folder, dtype="auto").dtype == stored
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_checkpoint(str(folder), dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.dtype == dtype and model.device == torch.device("cpu")
        file = load_file(folder / SINGLE)
        assert all(torch.equal(p, file[n].to(dtype)) for n, p in model.named_parameters())


@pytest.mark.parametrize("form", ["4.x flat", "4.x flat, type", "4.x nested"])
def test_config_forms_of_4x_files_give_the_same_logits(toys: Toys, flat: Path, form: str) -> None:
    toy = toys("scout", 0.25)
    ids, expected = toy.case(1, 61)

    def rewrite(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if form == "4.x flat, type":
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
        config["attn_temperature_tuning"] = 4
        config["no_rope_layers"] = []
        for name in ("layer_types", "moe_layers", "dtype"):
            config.pop(name)
        if form == "4.x nested":
            text = dict(config)
            config.clear()
            config.update(text_config=text, model_type="llama4", architectures=["Llama4ForConditionalGeneration"])

    edit_json(flat / "config.json", rewrite)
    logits = load_checkpoint(flat, dtype=torch.float32)(ids)
    assert difference(logits, expected) <= toy.limit(1, 61)


def test_symlinked_shards_as_in_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/model-1.safetensors -> ../../blobs/SHA: names stay inside, links may leave."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    model = load_checkpoint(snapshot)
    assert model.config == TextConfig.from_folder(snapshot)
    assert all(not p.is_meta for p in model.parameters())


def test_tied_embeddings(toys: Toys, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys("tied", 0.25).folder, tmp_path / "tied"))
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    model = load_checkpoint(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_tensors(folder / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_checkpoint(folder)  # stored twice, equal
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_tensors(folder / SINGLE, lambda t: t["lm_head.weight"][0].add_(1))
    refused(folder, str(folder), "lm_head.weight", "tie_word_embeddings")


def test_buffers_of_old_files_are_ignored(flat: Path) -> None:
    edit_tensors(flat / SINGLE, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    assert load_checkpoint(flat).config.num_hidden_layers == 8


def test_nothing_there(tmp_path: Path, flat: Path) -> None:
    refused(tmp_path / "missing", "config.json", error=ConfigError)
    (flat / SINGLE).unlink()
    refused(flat, str(flat), SINGLE, INDEX)


def test_missing_shard(sharded: Path) -> None:
    shard = shards(sharded)[1]
    shard.unlink()
    refused(sharded, str(shard), "missing")
    shard.mkdir()
    refused(sharded, str(shard))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 2000, -1])
def test_truncated_shards(sharded: Path, flat: Path, length: int) -> None:
    """Found before mapping: a truncated mapped file kills the process."""
    for folder, file in ((sharded, shards(sharded)[2]), (flat, flat / SINGLE)):
        content = file.read_bytes()
        file.write_bytes(content[:length])
        refused(folder, str(file))


def test_longer_shard(sharded: Path) -> None:
    file = shards(sharded)[0]
    file.write_bytes(file.read_bytes() + b"\0")
    refused(sharded, str(file), "longer")


def with_header(file: Path, header: bytes, length: int | None = None) -> None:
    content = file.read_bytes()
    old = int.from_bytes(content[:8], "little")
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content[8 + old :])


@pytest.mark.parametrize(
    "header",
    [
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 50_000,
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32"}}',
        *(
            b'{"a": {"dtype": "F32", ' + rest + b"}}"
            for rest in (
                b'"shape": [1], "data_offsets": [0]',
                b'"shape": 3, "data_offsets": [0, 4]',
                b'"shape": ["x"], "data_offsets": [0, 4]',
                b'"shape": [1], "data_offsets": "04"',
                b'"shape": [1], "data_offsets": [0, 1e999]',
                b'"shape": [1e999], "data_offsets": [0, 4]',
                b'"shape": [1.0], "data_offsets": [0, 4]',
                b'"shape": [true], "data_offsets": [0, 4]',
                b'"shape": ["1"], "data_offsets": [0, 4]',
                b'"shape": [1], "data_offsets": [0, "4"]',
                b'"shape": [1], "data_offsets": [0, 4, 4]',
                b'"shape": [1], "data_offsets": [-4, 4]',
                b'"shape": [1], "data_offsets": [0, ' + b"9" * 4300 + b"]",
                b'"shape": [1], "data_offsets": [0, ' + b"9" * 4400 + b"]",
                b'"shape": [' + b"9" * 400 + b', 0], "data_offsets": [0, 0]',
                b'"shape": [1' + b", 1" * 8 + b'], "data_offsets": [0, 4]',
            )
        ),
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "' + b"F" * 17 + b'", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"' + b"a" * 1025 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_header_garbage(flat: Path, header: bytes) -> None:
    with_header(flat / SINGLE, header)
    refused(flat, str(flat / SINGLE))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 10**5])
def test_absurd_header_length(flat: Path, length: int) -> None:
    with_header(flat / SINGLE, b"{}", length)
    refused(flat, str(flat / SINGLE))


@pytest.mark.parametrize("name", [INDEX, "a shard"])
def test_what_cannot_be_looked_at_is_not_taken_for_absent(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    denied = shards(sharded)[1].name if name != INDEX else name
    for function in ("stat", "lstat", "open"):
        real = getattr(os, function)

        def deny(path: Any, *args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if not isinstance(path, int) and Path(path).name == denied:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, function, deny)
    refused(sharded, str(sharded / denied), "be read (Permission denied)")


@pytest.mark.parametrize("shard", ["a\0.safetensors", "\ud800.safetensors", "a\n.safetensors"])
def test_a_name_that_is_no_file_name(sharded: Path, shard: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], shard)))
    refused(sharded, str(sharded / INDEX), "is not a safetensors file inside the folder")


def test_a_pipe_for_a_shard_is_not_waited_for(flat: Path) -> None:
    (flat / SINGLE).unlink()
    os.mkfifo(flat / SINGLE)
    refused(flat, str(flat / SINGLE), "not a regular file")


def test_a_shard_that_shrinks_before_it_is_mapped(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the end of a file, a mapping kills the process."""
    mapped = MappedFiles._storage

    def cut(files: MappedFiles, file: Path) -> torch.UntypedStorage:
        os.truncate(flat / SINGLE, (flat / SINGLE).stat().st_size - 4)
        return mapped(files, file)

    monkeypatch.setattr(MappedFiles, "_storage", cut)
    refused(flat, str(flat / SINGLE), "truncated inside tensor")


def test_a_shard_that_shrinks_while_it_is_mapped(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mapping._mapped

    def cut(file: Path, size: int) -> torch.UntypedStorage:
        os.truncate(file, size - 4)
        return real(file, size)

    monkeypatch.setattr(mapping, "_mapped", cut)
    refused(flat, str(flat / SINGLE), "cannot be mapped")


@pytest.mark.parametrize(
    "change",
    [{"shape": [41]}, {"shape": [-1, -42]}, {"data_offsets": [0, 4]}, {"data_offsets": [16, 8]}, {"dtype": "F16"}],
)
def test_header_that_contradicts_itself(flat: Path, change: dict[str, Any]) -> None:
    content = (flat / SINGLE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header[NORM].update(change)
    with_header(flat / SINGLE, json.dumps(header).encode())
    refused(flat, str(flat / SINGLE), NORM)


def test_overlapping_tensors(flat: Path) -> None:
    """Two tensors at one place: sizes agree, so that safetensors' own check has to find it."""
    content = (flat / SINGLE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    header[first]["data_offsets"] = header[second]["data_offsets"]
    with_header(flat / SINGLE, json.dumps(header).encode())
    refused(flat, str(flat / SINGLE))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 3}}',
        b"\xff\xff",
        b"[" * 50_000,
        b'{"weight_map": null}',
    ],
)
def test_index_that_is_none(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    refused(sharded, str(sharded / INDEX))


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "x.bin",
        "",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "\0.safetensors",
        "..",
        ".",
    ],
)
def test_shards_outside_the_folder(sharded: Path, shard: str) -> None:
    shutil.copy(shards(sharded)[0], sharded.parent / "x.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"language_model.lm_head.weight": shard}))
    refused(sharded, str(sharded))


def test_index_and_shards_disagree(sharded: Path) -> None:
    name = "language_model.model.norm.weight"
    original = (sharded / INDEX).read_text()
    where = json.loads(original)["weight_map"][name]
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(name))
    refused(sharded, where, name, "extra")
    (sharded / INDEX).write_text(original)
    other = next(file.name for file in shards(sharded) if file.name != where)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({name: other}))
    refused(sharded, name)
    (sharded / INDEX).write_text(original)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({name + "s": where}))
    refused(sharded, where, name + "s", "missing")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(NORM), [NORM, "missing"]),
        (lambda t: t.pop("model.embed_tokens.weight"), ["model.embed_tokens.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (
            lambda t: t.update({"model.layers.8.input_layernorm.weight": torch.ones(42)}),
            ["extra", "model.layers.8.input"],
        ),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(60)}), ["extra", "q_proj.bias"]),
        (lambda t: t.update({"language_model." + NORM: torch.ones(42)}), [NORM, "twice"]),
        (lambda t: t.update({NORM: torch.ones(43)}), [NORM, "[43]", "[42]"]),
        (lambda t: t.update({NORM: torch.ones(42, 1)}), [NORM, "[42, 1]", "[42]"]),
        (lambda t: t.update({NORM: torch.tensor(1.0)}), [NORM, "[]", "[42]"]),
        (lambda t: t.update({NORM: torch.ones(42).to(torch.float8_e4m3fn)}), [NORM, "F8_E4M3", "quantized"]),
        (lambda t: t.update({NORM: torch.ones(42, dtype=torch.int8)}), [NORM, "I8"]),
        (lambda t: t.update({NORM: torch.ones(42, dtype=torch.float64)}), [NORM, "F64"]),
        (lambda t: t.update({NORM: torch.ones(42, dtype=torch.bool)}), [NORM, "BOOL"]),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}),
            ["extra", "weight_scale"],
        ),
    ],
)
def test_tensors_that_do_not_fit(
    flat: Path, change: Callable[[dict[str, torch.Tensor]], Any], parts: list[str]
) -> None:
    edit_tensors(flat / SINGLE, change)
    refused(flat, str(flat), *parts)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"attention_chunk_size": None}, "attention_chunk_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention"] * 8}, "layer_types"),
    ],
)
def test_configurations_are_refused_before_tensors_are_read(flat: Path, changes: dict[str, Any], part: str) -> None:
    edit_json(flat / "config.json", lambda config: config.update(changes))
    (flat / SINGLE).unlink()
    refused(flat, part, str(flat / "config.json"), error=ConfigError)


def test_headers_alone_tell_names_shapes_and_bytes(flat: Path, sharded: Path) -> None:
    for folder in (flat, sharded):
        for file in folder.glob("*.safetensors"):
            expected = load_file(file)
            header = read_header(file)
            assert {name: (t.shape, t.num_bytes, t.file) for name, t in header.items()} == {
                name: (tuple(t.shape), t.nbytes, file) for name, t in expected.items()
            }
        assert text_tensors(folder).keys() == dict(load_checkpoint(folder).named_parameters()).keys()


MEMORY = """
import os, sys, torch, model.weights.loading as checkpoint
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
torch.nn.Embedding(2, 2, device="meta"), torch.nn.Linear(2, 2, device="meta")  # imports much of torch at its first time
torch.ones(8).to(torch.bfloat16)
def measure(folder, dtype):
    peak, assign = 0, checkpoint.set_weight
    def watched(*args):
        nonlocal peak
        assign(*args)
        peak = max(peak, anonymous())
    checkpoint.set_weight = watched
    before = anonymous()
    loaded = checkpoint.load_checkpoint(folder, dtype=dtype)
    print(sum(p.nbytes for p in loaded.parameters()), max(p.numel() * 4 for p in loaded.parameters()),
          max(peak, anonymous()) - before, flush=True)
for dtype in sys.argv[2:]:  # a fork each
    if not os.fork():
        measure(sys.argv[1], getattr(torch, dtype))
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc (Linux)")
def test_memory_while_loading(tmp_path: Path) -> None:
    """Stored dtype: mapped, not copied. Another one: the converted weights plus one tensor."""
    from model.transformer import Transformer

    config = {
        "model_type": "llama4_text",
        "vocab_size": 4000,
        "hidden_size": 256,
        "intermediate_size_mlp": 4500,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_layers": [],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        empty = Transformer(TextConfig.from_dict(config))
    save_file({name: torch.ones(p.shape) for name, p in empty.named_parameters()}, tmp_path / SINGLE)

    command = [sys.executable, "-c", MEMORY, str(tmp_path), "float32", "bfloat16"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mapped, converted = ([int(word) for word in line.split()] for line in result.stdout.splitlines())
    slack = 16 * 2**20  # modules on the meta device, allocator
    weights, _, peak = mapped
    assert weights > 110e6 and peak < slack
    weights, largest, peak = converted
    assert weights > 55e6 and peak < weights + largest + slack


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4903351912\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        read_header(file)
