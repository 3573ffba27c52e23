"""What l4ctx inspect says of checkpoints and contexts, whole, damaged in each of their parts, and hostile."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import CONTROLS, TINY, changed_checkpoint, check_refused, run_here, text_only_checkpoint
from context_toys import BLOCK, CHUNK, Kind, changed, keep, reading, tokens
from safetensors.torch import load_file, save_file

from l4ctx import inspection
from l4ctx.context import Context, lock
from l4ctx.context_writer import ContextWriter
from l4ctx.inspection import exit_code, inspect_folder
from l4ctx.listing import listing
from l4ctx.manifest import FILE as MANIFEST
from l4ctx.manifest import HEAD, JOURNAL, READERS_LOCK
from l4ctx.prompt import Span
from model.config import TextConfig, parameter_count

IDS = tokens(6 * BLOCK + CHUNK + 7)
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], object]


def inspected(folder: Path, *, verify: bool = False) -> tuple[dict[str, Any], str]:
    """The report, which must be plain JSON, and the listing, which must be harmless on a terminal."""
    before = snapshot(folder)
    report = inspect_folder(str(folder), verify=verify)
    assert json.loads(json.dumps(report, allow_nan=False)) is not None
    text = listing(report)
    assert not CONTROLS.search(text) and "\t" not in text
    assert snapshot(folder) == before, "inspection changes nothing"
    return report, text


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


def whats(report: dict[str, Any]) -> list[str]:
    return [entry["what"] for entry in report["damage"]]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def cut(file: Path, length: int = -1) -> None:
    file.write_bytes(file.read_bytes()[:length])


# Checkpoints


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
    shown, weights = report["config"], report["weights"]
    assert shown["parameters"] == weights["parameters"] == parameter_count(config)
    assert (shown["num_rope_layers"], shown["num_nope_layers"], shown["moe_layers"]) == (3, 1, (0, 1, 2, 3))
    assert shown["kv_bytes_per_token_bf16"] == 2 * 2 * 64 * 2 and shown["window_bytes_bf16"] == 3 * 2048 * 512
    assert weights["bytes"] == 2 * weights["parameters"] and weights["dtypes"] == {"BF16": weights["tensors"]}
    assert (weights["shards"], weights["ignored_tensors"]) == (2, 0)
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


TEMPLATE = "chat_template.jinja"
SECOND = "model-00002-of-00003.safetensors"
BROKEN_MODELS: dict[str, tuple[Break, list[str], list[str]]] = {  # damage, one text a line, and what is still shown
    "missing shards": (lambda m: [(m / SECOND).unlink(), (m / SECOND.replace("2-", "3-")).unlink()],
                       ["00002-of-00003.safetensors: missing shard", "00003-of-00003.safetensors: missing shard"],
                       ["1 of 3 shards", "3 RoPE", "chat template    yes"]),
    "a link to nothing": (lambda m: [(m / SECOND).unlink(), (m / SECOND).symlink_to("gone")], ["missing shard"],
                          ["2 of 3 shards"]),
    "an index that is a link to nothing": (lambda m: [(m / INDEX).unlink(), (m / INDEX).symlink_to("gone")],
                                           ["not a safetensors index"], ["3 RoPE"]),
    "cut shard": (lambda m: cut(m / SECOND), [f"{SECOND}: truncated"], ["2 of 3 shards"]),
    "overlapping tensors": (lambda m: _overlap(m / SECOND), [f"{SECOND}: cannot be used (SafetensorError"],
                            ["2 of 3 shards"]),
    "a shard of another model": (lambda m: save_file({"x": torch.ones(2)}, m / SECOND), ["is missing, though"],
                                 ["3 shards"]),
    "broken index": (lambda m: (m / INDEX).write_text("{"), ["not a safetensors index"], ["tokenizer        2,304"]),
    "index out of the folder": (lambda m: (m / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}'),
                                ["is not a safetensors file inside the folder"], ["3 RoPE"]),
    "other sizes": (lambda m: _edit_text_config(m, hidden_size=132), ["has shape"], ["size      132", "3 shards"]),
    "quantized": (lambda m: edit_json(m / "config.json", quantization_config={"quant_method": "fp8"}),
                  ["quantized checkpoints are not supported"], ["3 RoPE", "3 shards", "parameters       2,952,320"]),
    "quantized within": (lambda m: _edit_text_config(m, quantization_config={"bits": 4}), ["quantized"], ["3 RoPE"]),
    "another architecture": (lambda m: edit_json(m / "config.json", architectures=["Other\x1b[2J"]), ["architectures"],
                             ["architecture     Other", "3 shards"]),
    "absurd sizes": (lambda m: _edit_text_config(m, hidden_size=2**39, intermediate_size=2**39),
                     ["hidden_size: 549755813888"], ["3 shards"]),
    "large sizes": (lambda m: _edit_text_config(m, hidden_size=2**30, intermediate_size=2**30), [""], ["3 RoPE"]),
    "configuration cut short": (lambda m: cut(m / "config.json", 50), ["cannot be read as JSON"], ["3 shards", "yes"]),
    "configuration of a list": (lambda m: (m / "config.json").write_text("[]"), ["holds no JSON object"], ["yes"]),
    "empty configuration": (lambda m: (m / "config.json").write_text("{}"), ["model_type"], ["3 shards"]),
    "deep configuration": (lambda m: (m / "config.json").write_text("[" * 10**5), ["recursion"], ["3 shards", "yes"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer.json: no such file"], ["3 RoPE", "yes"]),
    "broken tokenizer": (lambda m: cut(m / "tokenizer.json"), ["tokenizer.json: cannot be loaded"], ["3 RoPE", "yes"]),
    "a tokenizer too large": (lambda m: _edit_text_config(m, vocab_size=2303),
                              ["has shape", "2,304 tokens, the model only"], []),
    "a template that fails": (lambda m: (m / TEMPLATE).write_text("{{ 1 / 0 }}"), ["template fails"], ["yes"]),
    "a template that is no text": (lambda m: (m / TEMPLATE).write_bytes(b"\xff"), [TEMPLATE],
                                   ["chat template    cannot be read", "3 shards"]),
    "templates without a name": (lambda m: [(m / TEMPLATE).unlink(), edit_json(
        m / "tokenizer_config.json", chat_template=[{"name": []}])], [""], ["3 shards"]),
    "stop tokens": (lambda m: edit_json(m / "generation_config.json", eos_token_id="x"), ["eos_token_id"], ["3 RoPE"]),
    "a pipe for a shard": (lambda m: _pipe(m / SECOND), ["missing shard"], ["2 of 3 shards"]),
    "a pipe for a tokenizer": (lambda m: _pipe(m / "tokenizer.json"), ["tokenizer.json: not a regular file"], []),
    "a pipe for a configuration": (lambda m: _pipe(m / "config.json"), ["config.json: not a regular file"], []),
    "a folder for an index": (lambda m: [(m / INDEX).unlink(), (m / INDEX).mkdir()], ["not a regular file"], []),
}


def _edit_text_config(model: Path, **changes: Any) -> None:
    text = json.loads((model / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit_json(model / "config.json", text_config=text | changes)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _overlap(shard: Path) -> None:
    """Its first two tensors of one size get the same place."""
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    twin = next(name for name in header if name != last and header[name]["shape"] == header[last]["shape"])
    header[twin]["data_offsets"] = header[last]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size:])


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_part_is_told_and_the_rest_is_shown(case: str, model: Path) -> None:
    breaking, damage, shown = BROKEN_MODELS[case]
    breaking(model)
    report, text = inspected(model)
    found = whats(report)
    assert exit_code(report) == 3 and len(found) == len(damage), found
    for part, line in zip(damage, found, strict=True):
        assert part in line
    for part in shown:
        assert part in text


@pytest.mark.parametrize("piece", [4, 64, 2**24])
def test_numbers_that_are_none(model: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Only reading finds them: in the first piece of a tensor, in the last, and in what is not used."""
    monkeypatch.setattr(inspection, "PIECE_BYTES", piece)
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
        "vision_model.class_embedding holds 0 NaN and 1 infinities; download it again"]


def test_shards_are_read_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = inspected(model, verify=True)
    monkeypatch.setattr(inspection, "PIECE_BYTES", 4096)
    assert inspected(model, verify=True)[0] == report


# Saved contexts


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """complete; interrupted: never complete; changing: another state over a complete one; empty: nothing read."""
    top = tmp_path_factory.mktemp("contexts")
    keep(top / "complete", IDS)
    keep(top / "interrupted", IDS, stop=3 * BLOCK + 1)
    keep(top / "changing", IDS)
    keep(top / "changing", changed(IDS, 4 * BLOCK), stop=5 * BLOCK + 1)
    with closing(ContextWriter(top / "empty", Kind().recipe)):
        pass
    return top


@pytest.fixture
def context(contexts: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(contexts / name, tmp_path / name)


def test_a_complete_context(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    (folder / "tail-0123456789ab.safetensors").write_bytes(b"x" * 77)  # as a crash leaves it
    report, text = inspected(folder, verify=True)
    assert exit_code(report) == 0 and report["made_with"]["weights"] == "1a" * 32 and report["version"] == 1
    [state] = report["states"]
    assert (state["is_newest"], state["is_complete"], state["sealed_blocks"], state["damaged"]) == (True, True, 6, [])
    assert state["tokens"] == state["kept_tokens"] == state["can_keep_tokens"] == len(IDS)
    assert state["documents"] == [{"path": "notes/a.txt", "tokens": 17, "sha256": "00" * 32},
                                  {"path": "b ü.txt", "tokens": len(IDS) - 22, "sha256": "ff" * 32}]
    sizes = report["bytes"]
    on_disk = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes["unused"] == 77 and sum(sizes.values()) == sum(on_disk.values())
    assert sizes["blocks"] == sum(size for name, size in on_disk.items() if name.startswith("blocks/"))
    for part in (f"{len(IDS)} tokens, complete (6 sealed blocks)", "17 tokens  000000000000  notes/a.txt",
                 "unused 77 B", "blocks of 32 tokens in segments of 16", "weights 1a1a1a1a1a1a,",
                 "none, every byte was read"):
        assert part in text


def test_contexts_that_are_not_read_to_the_end(context: Callable[[str], Path]) -> None:
    report, text = inspected(context("interrupted"))
    assert exit_code(report) == 0 and [state["kept_tokens"] for state in report["states"]] == [3 * BLOCK]
    assert f"interrupted after {3 * BLOCK} of {len(IDS)} tokens: the same l4ctx prefill command goes on" in text
    report, text = inspected(context("changing"))
    assert [(state["is_newest"], state["is_complete"]) for state in report["states"]] == [(True, False), (False, True)]
    assert f"interrupted after {5 * BLOCK} of" in text and "before that      " in text
    report, text = inspected(context("empty"))
    assert exit_code(report) == 0 and report["states"] == [] and "none yet: the l4ctx prefill command" in text


def test_many_documents_and_damages_are_cut_for_people(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    report = inspect_folder(str(folder), verify=False)
    report["states"][0]["documents"] *= 12
    report["damage"] = [{"file": "x", "what": f"x {n}"} for n in range(23)]
    text = listing(report)
    assert "and 4 more (--json lists them all)" in text and text.count("notes/a.txt") == 10
    assert "and 3 more (--json lists them all)" in text and "x 19" in text and "x 20" not in text


def state_of(folder: Path, *, newest: bool = True) -> Any:
    made = Context.read(folder)
    return made.states[-1] if newest else made.complete


DAMAGES: dict[str, tuple[str, Break, bool, list[int], str]] = {  # context, damage, is seen unread, kept by state, told
    "a block's bytes": ("complete", lambda f: flip(f / state_of(f).blocks[3].name, -9), False, [3 * BLOCK], "checksum"),
    "a block's header": ("complete", lambda f: flip(f / state_of(f).blocks[3].name, 20), True, [3 * BLOCK], "header"),
    "a block cut short": ("complete", lambda f: cut(f / state_of(f).blocks[2].name), True, [2 * BLOCK], "cut short"),
    "a block missing": ("complete", lambda f: (f / state_of(f).blocks[0].name).unlink(), True, [0], "missing"),
    "a pipe for a block": ("complete", lambda f: _pipe(f / state_of(f).blocks[5].name), True, [5 * BLOCK], "read"),
    "the tail": ("complete", lambda f: flip(f / state_of(f).tail.name, -9), False, [6 * BLOCK], "checksum"),
    "token ids": ("complete", lambda f: flip(f / state_of(f).ids.name, -400), False, [0], "checksum"),
    "documents": ("complete", lambda f: flip(f / state_of(f).ids.name, -1), True, [0], "checksum of documents"),
    "token ids missing": ("interrupted", lambda f: (f / state_of(f).ids.name).unlink(), True, [0], "missing"),
    "of an interrupted one": ("interrupted", lambda f: cut(f / state_of(f).blocks[1].name), True, [BLOCK], "cut short"),
    "a shared block": ("changing", lambda f: flip(f / state_of(f).blocks[1].name, -9), False, [BLOCK, BLOCK],
                       "checksum"),
    "an older block": ("changing", lambda f: flip(f / state_of(f, newest=False).blocks[4].name, -9), False,
                       [5 * BLOCK, 4 * BLOCK], "checksum"),
    "all blocks": ("complete", lambda f: shutil.rmtree(f / "blocks"), True, [0], "missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_and_what_can_be_kept(case: str, context: Callable[[str], Path]) -> None:
    name, breaking, is_seen_unread, kept, told = DAMAGES[case]
    folder = context(name)
    breaking(folder)
    report, text = inspected(folder)
    assert exit_code(report) == (7 if is_seen_unread else 0)
    report, text = inspected(folder, verify=True)
    assert exit_code(report) == 7 and [state["can_keep_tokens"] for state in report["states"]] == kept
    found = whats(report)
    assert len(found) == len(set(found)) == (6 if case == "all blocks" else 1) and told in found[0]
    for state in report["states"]:
        count = f"first {state['can_keep_tokens']:,}" if state["can_keep_tokens"] else "no"
        if state["damaged"]:
            assert f"{count} tokens can be kept: l4ctx prefill --verify" in text.replace("the first", "first")


@pytest.mark.parametrize("case", [case for case, (name, *_) in DAMAGES.items() if name == "complete"])
def test_as_much_is_kept_as_was_said(case: str, context: Callable[[str], Path]) -> None:
    _, breaking, _, [kept], _ = DAMAGES[case]
    folder = context("complete")
    breaking(folder)
    if case == "all blocks":
        (folder / "blocks").mkdir()
    assert keep(folder, IDS, verify=True) == kept
    assert exit_code(inspected(folder, verify=True)[0]) == 0


BEYOND_USE: dict[str, Break] = {
    "manifest changed": lambda f: edit_json(f / MANIFEST, made_with={}),
    "manifest cut": lambda f: cut(f / MANIFEST, 99),
    "manifest emptied": lambda f: cut(f / MANIFEST, 0),
    "manifest deep": lambda f: (f / MANIFEST).write_text("[" * 10**5),
    "journal changed": lambda f: flip(f / JOURNAL, 100),
    "journal cut": lambda f: cut(f / JOURNAL, (f / JOURNAL).read_bytes().rindex(b"\n", 0, -1) + 1),
    "journal emptied": lambda f: cut(f / JOURNAL, 0),
    "journal missing": lambda f: (f / JOURNAL).unlink(),
    "head changed": lambda f: edit_json(f / HEAD, end="0" * 64),
    "head cut": lambda f: cut(f / HEAD, 5),
}


@pytest.mark.parametrize("case", BEYOND_USE)
def test_nothing_can_be_kept(case: str, context: Callable[[str], Path]) -> None:
    folder = context("complete")
    BEYOND_USE[case](folder)
    report, text = inspected(folder)
    assert exit_code(report) == 7 and len(report["damage"]) == 1 and report["states"] == []
    assert (report["made_with"] is None) == case.startswith("manifest")
    assert text.endswith("\nto keep          nothing can be kept\n")


def test_a_newer_format_is_not_given_up(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    edit_json(folder / MANIFEST, version=2)
    report, text = inspected(folder)
    assert exit_code(report) == 7 and "use the l4ctx that made it" in text and "nothing can be kept" not in text


def forge(folder: Path, **made_with: Any) -> None:
    """A manifest that says something else, with the right checksum."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del content["sha256"]
    content["made_with"] |= made_with
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": digest}), encoding="utf-8")


@pytest.mark.parametrize("made_with", [
    {"dtype": "\x1b[2J\nfloat32\t\u202e"}, {"weights": "\x1b[2J\ud800"}, {"date": "2026-11-21\n"}, {"block_tokens": 0},
    {"block_tokens": -32}, {"block_tokens": 10**4000}, {"prefill_chunk_size": -1}], ids=lambda made: str(made)[:40])
def test_a_forged_manifest_does_no_harm(context: Callable[[str], Path], made_with: dict[str, Any]) -> None:
    folder = context("interrupted")
    forge(folder, **made_with)
    inspected(folder, verify=True)


@pytest.mark.parametrize("name", [MANIFEST, HEAD, JOURNAL, READERS_LOCK])
def test_a_pipe_in_a_context_is_not_waited_for(context: Callable[[str], Path], name: str) -> None:
    folder = context("complete")
    _pipe(folder / name)
    report, _ = inspected(folder)
    assert exit_code(report) == (0 if name == READERS_LOCK else 7)


def test_paths_of_documents_are_shown_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import context_toys

    source = "a\n\x1b[2J\u202e\tb"
    monkeypatch.setattr(context_toys, "spans", lambda ids: [Span(source, 0, len(ids))])
    keep(tmp_path / "context", IDS[:50])
    report, text = inspected(tmp_path / "context")
    assert report["states"][0]["documents"][0]["path"] == source
    assert "a \ufffd[2J\ufffd b\n" in text


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_at_random_end_in_no_traceback(context: Callable[[str], Path], model: Path, seed: int) -> None:
    chance = random.Random(seed)
    for folder, limit in ((context("changing"), 10**9), (model, 20_000)):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            kept, data = file.read_bytes(), bytearray(file.read_bytes())
            for _ in range(chance.randrange(1, 4) if data else 0):
                at = chance.randrange(min(len(data), limit))
                data[at:at + chance.randrange(3)] = bytes(chance.choices(b'\0"[]{},:9-\xff', k=chance.randrange(3)))
            file.write_bytes(data)
            inspected(folder, verify=folder != model)
            file.write_bytes(kept)


def test_beside_a_writer(context: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is shown at every moment, and the writer deletes nothing meanwhile."""
    folder = context("complete")
    ids = changed(IDS, 2 * BLOCK)
    locks = []
    work = inspection._bytes_on_disk
    monkeypatch.setattr(inspection, "_bytes_on_disk", lambda made: [
        locks.append(lock(folder / READERS_LOCK, exclusive=True)), work(made)][1])
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        for done in reading(writer, ids):
            report = inspect_folder(str(folder), verify=True)
            assert exit_code(report) == 0, whats(report)
            assert report["states"][0]["kept_tokens"] in range(done // BLOCK * BLOCK - BLOCK, done + 1)
            assert report["states"][-1]["is_complete"]
    assert locks and set(locks) == {None}
    assert [state["tokens"] for state in inspected(folder, verify=True)[0]["states"]] == [len(ids)]


def test_without_permission_to_write(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    (folder / READERS_LOCK).unlink()  # as in a copy for reading
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert exit_code(inspected(folder, verify=True)[0]) == 0
    finally:
        folder.chmod(0o755)
        (folder / "blocks").chmod(0o755)


# The command


def test_the_command_for_people_and_programs(context: Callable[[str], Path], tmp_path: Path) -> None:
    result = run_here("inspect", str(TINY), "--verify")
    assert (result.code, result.stderr) == (0, "") and result.stdout == listing(inspect_folder(str(TINY), verify=True))
    assert "\x1b" not in result.stdout
    folder = context("complete")
    flip(folder / state_of(folder).blocks[3].name, -9)
    assert run_here("inspect", str(folder)).code == 0
    result = run_here("inspect", str(folder), "--verify", "--json")
    assert (result.code, result.stderr) == (7, "") and result.stdout.isascii() and result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == json.loads(json.dumps(inspect_folder(str(folder), verify=True)))
    damaged = changed_checkpoint(tmp_path, without="tokenizer.json")
    assert run_here("inspect", str(damaged)).code == 3


@pytest.mark.parametrize(("arguments", "parts"), [
    ([], ["nothing to inspect", "l4ctx inspect MODEL|CONTEXT"]),
    ([""], ["the path is empty"]),
    (["nothing\x1b"], ["no such folder"]),
    (["file.txt"], ["file.txt: a file"]),
    (["file.txt/inside"], ["file.txt/inside"]),
    (["folder"], ["folder: neither a checkpoint", "config.json", "manifest.json"]),
    (["x" * 300], ["cannot be read: File name too long"]),
], ids=lambda value: str(value)[:40])
def test_what_is_neither_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                    parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    check_refused(run_here("inspect", *arguments), 2, *parts)
