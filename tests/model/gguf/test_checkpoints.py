"""GGUF files as checkpoints: configuration and logits equal those of what they were written from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint_files import GgufFiles, checkpoint_files
from model.config import TextConfig
from model.errors import CheckpointError, ConfigError
from model.gguf.config import config_of
from model.gguf.files import read_gguf
from model.rope import rotary_frequencies
from model.vision.config import VisionConfig
from model.weights.loading import checked_sources, load_checkpoint, load_vision, stored_tensors
from support.gguf_files import LAYER_NAMES, TOP_NAMES, all_in, write_gguf, write_mmproj
from support.gguf_headers import ARRAY, BOOL, F32, I32, STRING, U32, File, key, tensor
from support.toy_checkpoints import MAVERICK, SCOUT, Kind, Toy, write_kind

HARD_WIRED = {"attention_chunk_size": 8192, "floor_scale": 8192}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 3,
    "num_hidden_layers": 5,
}
KINDS = {
    "scout": Kind(SIZES | HARD_WIRED | SCOUT),
    "maverick": Kind(SIZES | HARD_WIRED | MAVERICK | {"num_local_experts": 128, "num_hidden_layers": 4}),
    "nested": Kind(SIZES | HARD_WIRED | SCOUT, nested=True),
    "tied": Kind(SIZES | HARD_WIRED | {"tie_word_embeddings": True, "num_experts_per_tok": 2}),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@functools.cache
def toy(root: Path, name: str) -> Toy:
    return write_kind(root / name, name, KINDS[name], 0.25, seed=sorted(KINDS).index(name))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Toy]:
    root = tmp_path_factory.mktemp("toys")
    return lambda name: toy(root, name)


def logits(path: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return load_checkpoint(path, dtype="float32")(ids)


@pytest.mark.parametrize("name", KINDS)
def test_float32_files_compute_as_transformers_does(tmp_path: Path, toys: Callable[[str], Toy], name: str) -> None:
    made, file = toys(name), tmp_path / "toy.gguf"
    write_gguf(file, made.folder)
    ids, expected = made.case(2, 23)
    assert (logits(file, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_the_configuration_is_that_of_config_json(tmp_path: Path, toys: Callable[[str], Toy], name: str) -> None:
    folder, file = toys(name).folder, tmp_path / "toy.gguf"
    write_gguf(file, folder)
    ours, theirs = TextConfig.from_folder(file), TextConfig.from_folder(folder)
    factored = rotary_frequencies(ours, 1)[0] / rotary_frequencies(theirs, 1)[0]
    assert (factored - 1).abs().max() < 1e-6
    plain = {"torch_dtype": None, "rope_parameters": theirs.rope_parameters}
    assert dataclasses.replace(ours, **plain) == dataclasses.replace(theirs, torch_dtype=None)


def dequantized(made: Toy, meant: dict[str, Tensor], folder: Path) -> Path:
    """The checkpoint's folder with the weights that a GGUF file stands for."""
    folder.mkdir()
    (folder / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    stored = load_file(made.folder / "model.safetensors")
    for name in stored:
        text = name.removeprefix("language_model.")
        layer, _, inner = text.removeprefix("model.layers.").partition(".")
        plain = inner.removesuffix(".weight")
        if inner.endswith("gate_up_proj"):
            both = [meant[f"blk.{layer}.ffn_{kind}_exps.weight"] for kind in ("gate", "up")]
            stored[name] = torch.cat(both, 1).transpose(1, 2).contiguous()
        elif inner.endswith("experts.down_proj"):
            stored[name] = meant[f"blk.{layer}.ffn_down_exps.weight"].transpose(1, 2).contiguous()
        elif plain in LAYER_NAMES:
            stored[name] = meant[f"blk.{layer}.{LAYER_NAMES[plain]}.weight"]
        elif text.removesuffix(".weight") in TOP_NAMES:
            stored[name] = meant[f"{TOP_NAMES[text.removesuffix('.weight')]}.weight"]
    save_file(stored, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_quantized_files_compute_as_what_they_stand_for(
    tmp_path: Path, toys: Callable[[str], Toy], name: str, kind: str
) -> None:
    made, file = toys(name), tmp_path / "toy.gguf"
    meant = write_gguf(file, made.folder, all_in(kind))
    ids, _ = made.case(2, 23)
    expected = logits(dequantized(made, meant, tmp_path / "plain"), ids)
    assert (logits(file, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_types_differ_within_a_file(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    """As in files that spend more bits on some layers, and with a quantized router."""

    def mixed(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2:
            return "F32"
        return {"0": "Q8_0", "1": "BF16", "2": "Q5_1"}.get(name.split(".")[1], "Q4_0")

    made, file = toys("scout"), tmp_path / "toy.gguf"
    meant = write_gguf(file, made.folder, mixed)
    ids, _ = made.case(2, 23)
    expected = logits(dequantized(made, meant, tmp_path / "plain"), ids)
    assert (logits(file, ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    stored = stored_tensors(checked_sources(file, TextConfig.from_folder(file)))
    assert {tensor.dtype for tensor in stored.values()} == {"F32", "Q8_0", "BF16", "Q5_1", "Q4_0"}


def test_a_model_in_parts(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    made = toys("maverick")
    write_gguf(tmp_path / "toy.gguf", made.folder, all_in("Q8_0"), per_part=7)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3 and files[0].name == f"toy-00001-of-{len(files):05}.gguf"
    ids, _ = made.case(1, 5)
    expected = logits(files[0], ids)
    assert torch.equal(logits(files[-1], ids), expected) and torch.equal(logits(tmp_path, ids), expected)
    files[2].unlink()
    with pytest.raises(CheckpointError, match=f"{files[2].name}: missing: part 3 of {len(files)}"):
        load_checkpoint(files[0])


def llama(**changes: bytes | None) -> list[bytes]:
    """Metadata of a toy of architecture llama; a change replaces a key, or leaves it out."""
    keys: dict[str, bytes | None] = {
        "general.architecture": key("general.architecture", STRING, "llama"),
        "block_count": key("llama.block_count", U32, 2),
        "context_length": key("llama.context_length", U32, 64),
        "embedding_length": key("llama.embedding_length", U32, 8),
        "feed_forward_length": key("llama.feed_forward_length", U32, 12),
        "head_count": key("llama.attention.head_count", U32, 2),
        "head_count_kv": key("llama.attention.head_count_kv", U32, 1),
        "eps": key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        "theta": key("llama.rope.freq_base", F32, 500000.0),
        **changes,
    }
    return [entry for entry in keys.values() if entry is not None]


def test_a_dense_llama_is_rope_layers_in_one_chunk(tmp_path: Path) -> None:
    factors = torch.tensor([1.0, 16.0]).numpy().tobytes()
    file = File(llama(), [tensor("rope_freqs.weight", (2,), 0), tensor("token_embd.weight", (5, 8), 32)])
    file.data = factors + bytes(24 + 160)
    path = file.write(tmp_path / "a.gguf")
    config = TextConfig.from_folder(path)
    assert (config.no_rope_layers, config.moe_layers) == ((1, 1), ())
    assert (config.attention_chunk_size, config.max_position_embeddings) == (64, 64)
    assert not config.use_qk_norm and not config.attn_temperature_tuning and config.tie_word_embeddings
    assert (config.rms_norm_eps, config.head_dim, config.vocab_size) == (1e-5, 4, 5)
    assert rotary_frequencies(config, 1)[0].tolist() == pytest.approx([1.0, 500000.0**-0.5 / 16])
    assert config_of(read_gguf(path)).assumed == ()


def test_what_llama_cpp_assumes_is_listed(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    write_gguf(tmp_path / "toy.gguf", toys("maverick").folder)
    files = checkpoint_files(tmp_path)
    assert isinstance(files, GgufFiles)
    listed = config_of(files.model).assumed
    assert [word in " ".join(listed) for word in ("8,192", "NoPE", "temperature", "not normalized")] == [True] * 4


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general.architecture": None}, "general.architecture None is not supported"),
    "qwen": (
        {"general.architecture": key("general.architecture", STRING, "qwen3")},
        "general.architecture 'qwen3' is not supported; must be llama4",
    ),
    "a vision tower": (
        {"general.architecture": key("general.architecture", STRING, "clip")},
        "a vision tower alone .mmproj.; give the file of the text model",
    ),
    "no layers": ({"block_count": None}, "metadata key llama.block_count is missing"),
    "0 layers": ({"block_count": key("llama.block_count", U32, 0)}, "llama.block_count: '0' is not a positive integer"),
    "layers in words": ({"block_count": key("llama.block_count", STRING, "2")}, "llama.block_count: '2' is not a pos"),
    "many layers": ({"block_count": key("llama.block_count", U32, 2**20)}, "llama.block_count: 1048576 is more than"),
    "layers yes": ({"block_count": key("llama.block_count", BOOL, True)}, "llama.block_count: 'True' is not a pos"),
    "no eps": ({"eps": None}, "metadata key llama.attention.layer_norm_rms_epsilon is missing"),
    "nan": ({"eps": key("llama.attention.layer_norm_rms_epsilon", F32, float("nan"))}, "'nan' is not a positive"),
    "theta 0": ({"theta": key("llama.rope.freq_base", F32, 0.0)}, "llama.rope.freq_base: '0.0' is not a positive"),
    "heads that differ": (
        {"head_count_kv": key("llama.attention.head_count_kv", ARRAY, (I32, [1, 2]))},
        "llama.attention.head_count_kv: 'tuple' is not a positive integer",
    ),
    "heads that do not divide": (
        {"head_count_kv": key("llama.attention.head_count_kv", U32, 3)},
        r"num_attention_heads: 2 is not a multiple of num_key_value_heads",
    ),
    "experts": ({"x": key("llama.expert_count", U32, 8)}, "experts in a model of architecture llama"),
    "yarn": ({"x": key("llama.rope.scaling.type", STRING, "yarn")}, "rope.scaling.type: 'yarn' is not supported"),
    "half rotated": ({"x": key("llama.rope.dimension_count", U32, 2)}, "dimension_count: 2 is not the size of a head"),
    "values of another size": ({"x": key("llama.attention.value_length", U32, 2)}, "value_length: 2 is not the size"),
    "scaled": ({"x": key("llama.logit_scale", F32, 0.5)}, "llama.logit_scale is not supported"),
    "windows": ({"x": key("llama.attention.sliding_window", U32, 4)}, "llama.attention.sliding_window is not supp"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unfit_metadata_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    path = File(llama(**changes), [tensor("token_embd.weight", (5, 8), 0)], bytes(160)).write(tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match=message) as caught:
        TextConfig.from_folder(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a file with other tensors."""
    reader = gguf.GGUFReader(source)
    tensors: dict[str, Any] = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    change(tensors)
    writer = gguf.GGUFWriter(target, "llama4")
    for name, found in reader.fields.items():
        if name.startswith("llama4."):
            writer.add_key_value(name, found.contents(), found.types[0])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


F16, F32_TYPE = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


def test_rope_factors_are_those_of_the_file(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    """Scout's scaling was changed after its release; files from before have other factors."""
    whole, old = tmp_path / "whole.gguf", tmp_path / "old.gguf"
    write_gguf(whole, toys("scout").folder)
    rewritten(whole, old, lambda t: t.update({"rope_freqs.weight": (t["rope_freqs.weight"][0] * 2, F32_TYPE)}))
    new, before = (rotary_frequencies(TextConfig.from_folder(file), 1)[0] for file in (whole, old))
    torch.testing.assert_close(before, new / 2, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_q.weight"), "tensor blk.1.attn_q.weight is missing"),
        (lambda t: t.pop("blk.2.ffn_up_exps.weight"), "tensor blk.2.ffn_up_exps.weight is missing"),
        (lambda t: t.pop("blk.0.ffn_down_exps.weight"), "tensor blk.0.ffn_down_exps.weight is missing"),
        (lambda t: t.pop("output_norm.weight"), "tensor output_norm.weight is missing"),
        (lambda t: t.update({"blk.9.attn_q.weight": t["blk.1.attn_q.weight"]}), "extra tensor blk.9.attn_q.weight"),
        (lambda t: t.update({"blk.1.attn_q.bias": t["output_norm.weight"]}), "extra tensor blk.1.attn_q.bias"),
        (lambda t: t.update({"v.blk.0.ln1.weight": t["output_norm.weight"]}), "extra tensor v.blk.0.ln1.weight"),
        (
            lambda t: t.update({"blk.1.attn_k.weight": t["blk.1.attn_q.weight"]}),
            r"tensor blk.1.attn_k.weight has shape \[192, 64\] instead of \[64, 64\]",
        ),
        (
            lambda t: t.update({"blk.1.ffn_up_exps.weight": t["blk.1.ffn_down_exps.weight"]}),
            r"tensor blk.1.ffn_up_exps.weight has shape \[3, 64, 96\] instead of \[3, 96, 64\]",
        ),
        (
            lambda t: t.update({"output_norm.weight": (t["blk.0.attn_q.weight"][0][0], t["blk.0.attn_q.weight"][1])}),
            "tensor output_norm.weight",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": (t["rope_freqs.weight"][0].astype("float16"), F16)}),
            "tensor rope_freqs.weight: .* in F16 is no short list in F32",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": (t["rope_freqs.weight"][0][:5].copy(), F32_TYPE)}),
            "rope_parameters.factors: 5 factors for 16 pairs",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": (t["rope_freqs.weight"][0] * 0, F32_TYPE)}),
            "rope_parameters.factors: 0.0 is not a positive number",
        ),
    ],
)
def test_wrong_tensors_are_named_in_one_line(
    tmp_path: Path, toys: Callable[[str], Toy], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    source = tmp_path / "whole.gguf"
    write_gguf(source, toys("scout").folder, all_in("Q8_0"))
    path = rewritten(source, tmp_path / "changed.gguf", change)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        checked_sources(path, TextConfig.from_folder(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_vision_tower_beside_a_file(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    folder, file = toys("nested").folder, tmp_path / "toy.gguf"
    write_gguf(file, folder)
    assert VisionConfig.from_folder(file) is None
    write_mmproj(tmp_path / "mmproj-F32.gguf", folder)
    ours, theirs = VisionConfig.from_folder(file), VisionConfig.from_folder(folder)
    assert ours is not None and theirs is not None
    assert dataclasses.replace(ours, image_token_index=theirs.image_token_index) == theirs
    hidden = TextConfig.from_folder(file).hidden_size
    towers = [load_vision(path, theirs, hidden, dtype="float32") for path in (file, folder)]
    pixels = torch.rand(2, 3, theirs.image_size, theirs.image_size)
    for mine, published in zip(towers[0].parameters(), towers[1].parameters(), strict=True):
        assert torch.equal(mine, published)
    with torch.no_grad():  # where weights lie in a file may change how a processor sums
        torch.testing.assert_close(*(tower(pixels) for tower in towers))


def test_vision_towers_of_other_models_are_passed_over(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    folder, file = toys("nested").folder, tmp_path / "toy.gguf"
    write_gguf(file, folder)
    write_mmproj(tmp_path / "mmproj-a.gguf", folder, "qwen2vl_merger")
    (tmp_path / "mmproj-b.gguf").write_bytes(b"none")
    assert VisionConfig.from_folder(file) is None
    write_mmproj(tmp_path / "mmproj-c.gguf", folder)
    assert VisionConfig.from_folder(file) is not None


def test_a_damaged_vision_tower_is_named(tmp_path: Path, toys: Callable[[str], Toy]) -> None:
    folder, file = toys("nested").folder, tmp_path / "toy.gguf"
    write_gguf(file, folder)
    write_mmproj(tmp_path / "mmproj.gguf", folder)
    whole = (tmp_path / "mmproj.gguf").read_bytes()
    (tmp_path / "mmproj.gguf").write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=r"mmproj\.gguf: truncated: tensor"):
        VisionConfig.from_folder(file)
    keys = [key("clip.projector_type", STRING, "llama4")]
    File(keys, [tensor("mm.model.mlp.2.weight", (2, 2), 0)], bytes(16)).write(tmp_path / "mmproj.gguf")
    with pytest.raises(ConfigError, match=r"mmproj\.gguf: clip.vision.embedding_length: 'None' is not a positive"):
        VisionConfig.from_folder(file)
