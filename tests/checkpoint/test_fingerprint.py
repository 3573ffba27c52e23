"""Fingerprints: equal for equal checkpoints however they are stored, different for whatever is looked at."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from l4ctx.checkpoint.chat_template import ChatTemplate, PromptError
from l4ctx.checkpoint.fingerprint import FIELDS, fingerprint
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from model.config import RopeParameters, TextConfig
from model.errors import CheckpointError
from model.weights.shards import read_header, text_tensors
from support.places import TINY
from support.tokenizer_fixtures import toy_tokenizer_folder

SAMPLE = TINY
CONFIG = TextConfig.from_folder(SAMPLE)
ITEM_SIZES = {"F32": 4, "BF16": 2, "F16": 2}
K = 4096

Tensors = dict[str, tuple[str, list[int], bytes]]  # dtype, shape, data


def made_up() -> Tensors:
    chance = random.Random(7)
    shapes = {
        "model.norm.weight": ("BF16", [42]),
        "model.embed_tokens.weight": ("F32", [97, 42]),
        "model.layers.0.large": ("BF16", [50, 1000]),
        "model.layers.0.odd": ("F16", [3 * K + 1]),
        "model.layers.1.limit": ("BF16", [3 * K // 2]),
        "model.empty": ("F32", [0]),
    }
    return {
        name: (dtype, shape, chance.randbytes(product(shape) * ITEM_SIZES[dtype]))
        for name, (dtype, shape) in shapes.items()
    }


def product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def write_shard(file: Path, tensors: Tensors, padding: int = 0) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode() + b" " * padding
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_shards(folder: Path, shards: dict[str, Tensors]) -> None:
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard, tensors in shards.items():
        write_shard(folder / shard, tensors)


def differing(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what differs or is missing in either: FIELDS in their order, then unknown ones sorted."""
    names = [*FIELDS, *sorted((saved.keys() | now.keys()) - set(FIELDS))]
    return [name for name in names if name not in saved or name not in now or saved[name] != now[name]]


def of(folder: Path, config: TextConfig = CONFIG) -> dict[str, str]:
    return fingerprint(folder, config, text_tensors(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = toy_tokenizer_folder(tmp_path / "checkpoint")
    write_shard(path / "model.safetensors", made_up())
    return path


def test_offsets_are_those_of_safetensors(folder: Path) -> None:
    for file in (folder / "model.safetensors", *SAMPLE.glob("*.safetensors")):
        data = file.read_bytes()
        header = read_header(file)
        with safe_open(file, framework="pt") as shard:
            assert set(shard.keys()) == header.keys()
            for name, stored in header.items():
                expected = shard.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()
                assert data[stored.offset : stored.offset + stored.num_bytes] == expected


def test_the_rule_for_weights(folder: Path) -> None:
    digests = b""
    for name, (dtype, shape, data) in sorted(made_up().items()):
        size = len(data)
        seen = data if size <= 3 * K else data[:K] + data[(size - K) // 2 :][:K] + data[-K:]
        head = json.dumps([name, dtype, shape], separators=(",", ":")) + "\n"
        digests += hashlib.sha256(head.encode() + seen).hexdigest().encode()
    assert of(folder)["weights"] == hashlib.sha256(digests).hexdigest()


def test_all_digests_are_as_they_were(tmp_path: Path) -> None:
    """Saved contexts hold them: whoever changes a rule, or adds a field to the configuration, outdates them all."""
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]\n")
    write_shard(tmp_path / "model.safetensors", made_up())
    now = of(tmp_path, TextConfig.from_dict({"model_type": "llama4_text"}))
    assert tuple(now) == FIELDS
    assert now["tokenizer"] == hashlib.sha256(b'"<s>"\n{}').hexdigest()
    template = {"source": "[{{ messages[0].content }}]\n", "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}}
    assert now["template"] == hashlib.sha256(json.dumps(template, separators=(",", ":")).encode()).hexdigest()
    assert now["weights"] == "b156a919765c83f5c0e259d0e99a9970c8989344e1788e28861db46bbb85ac83"
    assert now["config"] == "6e128d833615452680ace75fffc42ef8e7b3d944c8aacb572ee748fd2afd07ef"


@pytest.mark.parametrize("way", ["backwards", "padded header", "two shards", "one shard each", "nested names", "link"])
def test_it_does_not_matter_how_weights_are_stored(folder: Path, way: str) -> None:
    before = of(folder)
    tensors = made_up()
    names = list(tensors)
    (folder / "model.safetensors").unlink()
    if way == "backwards":
        write_shard(folder / "model.safetensors", {name: tensors[name] for name in reversed(names)})
    elif way == "padded header":
        write_shard(folder / "model.safetensors", tensors, padding=1234)
    elif way == "two shards":
        write_shards(folder, {f"model-{n}.safetensors": {name: tensors[name] for name in names[n::2]} for n in (0, 1)})
    elif way == "one shard each":
        write_shards(folder, {f"{n}.safetensors": {name: tensors[name]} for n, name in enumerate(reversed(names))})
    elif way == "nested names":
        others: Tensors = {"vision_model.a": ("F32", [2], bytes(8))}
        write_shards(folder, {"z.safetensors": {f"language_model.{name}": tensors[name] for name in names} | others})
    else:
        write_shard(folder / "blob", tensors)
        (folder / "model.safetensors").symlink_to("blob")
    assert of(folder) == before
    moved = folder.rename(folder.with_name("moved"))
    assert of(moved) == before


LARGE = 100_000  # bytes of model.layers.0.large
MIDDLE = (LARGE - K) // 2


@pytest.mark.parametrize(
    ("name", "place", "seen"),
    [
        ("model.layers.0.large", 0, True),
        ("model.layers.0.large", K - 1, True),
        ("model.layers.0.large", K, False),
        ("model.layers.0.large", MIDDLE - 1, False),
        ("model.layers.0.large", MIDDLE, True),
        ("model.layers.0.large", MIDDLE + K - 1, True),
        ("model.layers.0.large", MIDDLE + K, False),
        ("model.layers.0.large", LARGE - K - 1, False),
        ("model.layers.0.large", LARGE - K, True),
        ("model.layers.0.large", LARGE - 1, True),
        *[("model.layers.1.limit", place, True) for place in range(0, 3 * K, 1023)],
        ("model.norm.weight", 0, True),
        ("model.norm.weight", 83, True),
    ],
)
def test_which_bytes_are_seen(folder: Path, name: str, place: int, seen: bool) -> None:
    before = of(folder)
    offset = text_tensors(folder)[name].offset
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(offset + place)
        byte = stream.read(1)[0]
        stream.seek(offset + place)
        stream.write(bytes([byte ^ 1]))
    assert differing(before, of(folder)) == (["weights"] if seen else [])


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def described(name: str, dtype: str, shape: list[int]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (dtype, shape, tensors[name][2])})


def swapped(one: str, other: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({one: tensors[other], other: tensors[one]})


@pytest.mark.parametrize(
    "change",
    [
        renamed("model.norm.weight", "model.norm.weights"),
        renamed("model.empty", "model.void"),
        described("model.norm.weight", "F16", [42]),
        described("model.norm.weight", "BF16", [6, 7]),
        described("model.norm.weight", "BF16", [7, 6]),
        described("model.norm.weight", "F32", [21]),
        described("model.empty", "F32", [0, 5]),
        swapped("model.norm.weight", "model.layers.0.large"),
        lambda tensors: tensors.pop("model.empty"),
        lambda tensors: tensors.update({"model.more": ("F32", [0], b"")}),
    ],
)
def test_what_changes_the_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    before = of(folder)
    tensors = made_up()
    change(tensors)
    write_shard(folder / "model.safetensors", tensors)
    assert differing(before, of(folder)) == ["weights"]


def test_every_field_of_the_configuration_counts_but_the_dtype(folder: Path) -> None:
    before = of(folder)
    for field in dataclasses.fields(TextConfig):
        value = getattr(CONFIG, field.name)
        changed: Any = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v * 1.5,
            tuple: lambda v: (*v, 1),
            str: lambda v: f"{v}x",
            type(None): lambda _: "float16",
            RopeParameters: lambda v: dataclasses.replace(v, rope_theta=v.rope_theta + 1),
        }[type(value)](value)
        config = dataclasses.replace(CONFIG, **{field.name: changed})
        assert differing(before, of(folder, config)) == ([] if field.name == "torch_dtype" else ["config"]), field.name
    rope = {"factor": 2.0, "low_freq_factor": 1.5, "short_factor": (1.0, 2.5), "truncate": False, "rope_type": "yarn"}
    for name, changed in rope.items():
        parameters = dataclasses.replace(RopeParameters(), **{name: changed})
        assert of(folder, dataclasses.replace(CONFIG, rope_parameters=parameters))["config"] != before["config"]


def test_equal_configurations_have_equal_digests(folder: Path) -> None:
    """Files say 8 or 8.0, and that is all the difference."""
    whole, real = (
        dataclasses.replace(CONFIG, rope_parameters=RopeParameters("longrope", theta, short_factor=table))
        for theta, table in ((500_000, (1, 2, 1.5)), (500_000.0, (1.0, 2.0, 1.5)))
    )
    assert whole == real and of(folder, whole) == of(folder, real)


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """Fields of a JSON file set; None takes one out."""

    def apply(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        content = {key: value for key, value in (content | changes).items() if value is not None}
        file.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (edited("tokenizer_config.json", model_max_length=5), []),
        (edited("tokenizer_config.json", add_bos_token=None), []),
        (edited("tokenizer_config.json", bos_token={"content": "<|begin_of_text|>"}), []),
        (edited("special_tokens_map.json", bos_token="<|eot|>"), []),  # the other file has the last word
        (edited("generation_config.json", temperature=1), []),
        (edited("tokenizer.json", version="1.1"), ["tokenizer"]),
        (edited("tokenizer_config.json", add_bos_token=False), ["tokenizer"]),
        (edited("tokenizer_config.json", bos_token="<|eot|>"), ["tokenizer", "template"]),
        (edited("tokenizer_config.json", eos_token="<|image|>"), ["template"]),
        (edited("special_tokens_map.json", unk_token="\udcff"), ["template"]),
        (edited("tokenizer_config.json", chat_template="hidden behind the file"), []),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"), ["template"]),
        (lambda folder: (folder / "chat_template.jinja").write_text(""), ["template"]),
        (lambda folder: (folder / "chat_template.jinja").unlink(), ["template"]),
    ],
)
def test_what_changes_tokenizer_and_template(folder: Path, change: Callable[[Path], object], fields: list[str]) -> None:
    before, bos_before = of(folder), Tokenizer.from_folder(folder).bos_id
    template_before = ChatTemplate.from_folder(folder)
    change(folder)
    assert differing(before, of(folder)) == fields
    assert "tokenizer" in fields or Tokenizer.from_folder(folder).bos_id == bos_before
    assert ("template" in fields) == (ChatTemplate.from_folder(folder) != template_before)


def test_templates_are_not_mixed_up_with_none(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    base = of(folder)["template"]
    (folder / "chat_template.jinja").write_text("none")
    assert of(folder)["template"] != base


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), TokenizerError, r"tokenizer\.json: no such file"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), TokenizerError, r"config\.json: cannot be"),
        (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), PromptError, r"jinja: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, r"safetensors: .*No such file"),
        (lambda folder: os.truncate(folder / "model.safetensors", 999), CheckpointError, r"safetensors: truncated"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    stored = text_tensors(folder)
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        fingerprint(folder, CONFIG, stored)
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)


@pytest.mark.parametrize("offset", [-(10**4), -(10**30), 2**63, 10**30])
def test_offsets_that_no_file_has(folder: Path, offset: int) -> None:
    stored = text_tensors(folder)
    stored["model.norm.weight"] = dataclasses.replace(stored["model.norm.weight"], offset=offset)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as caught:
        fingerprint(folder, CONFIG, stored)
    assert str(caught.value).isprintable()


def test_a_large_checkpoint_is_quick(folder: Path) -> None:
    """A thousand tensors of 4 MiB, all of them holes in the file."""
    size = 4 << 20
    text = json.dumps(
        {
            f"model.layers.{n}.weight": {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [n * size, (n + 1) * size],
            }
            for n in range(1000)
        }
    ).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + 1000 * size)
    stored = text_tensors(folder)
    began = time.process_time()
    fingerprint(folder, CONFIG, stored)
    assert time.process_time() - began < 0.5  # 0.03 s when nothing else runs


@pytest.mark.parametrize(
    ("saved", "now", "names"),
    [
        ({"config": "1", "weights": "2"}, {"config": "1", "weights": "2"}, ["tokenizer", "template"]),
        ({}, {}, list(FIELDS)),
        (dict.fromkeys(FIELDS, "1"), dict.fromkeys(FIELDS, "1"), []),
        (dict.fromkeys(FIELDS, "1"), dict.fromkeys(reversed(FIELDS), "2"), list(FIELDS)),
        (dict.fromkeys(FIELDS, "1") | {"template": "2"}, dict.fromkeys(FIELDS, "1"), ["template"]),
        (dict.fromkeys([*FIELDS, "z", "b"], "1"), dict.fromkeys([*FIELDS, "a"], "1"), ["a", "b", "z"]),
        (dict.fromkeys(["b", "template", "tokenizer"], "1"), dict.fromkeys(FIELDS, "1"), ["config", "weights", "b"]),
    ],
)
def test_what_differs(saved: dict[str, str], now: dict[str, str], names: list[str]) -> None:
    assert differing(saved, now) == differing(now, saved) == names


def test_a_copy_is_equal(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SAMPLE, tmp_path / "copy"))
    assert differing(of(SAMPLE), of(copy, TextConfig.from_folder(copy))) == []
