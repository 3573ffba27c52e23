"""Whatever is given as the model and is no checkpoint folder is named for what it is, with what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from l4ctx.inspection.model_folder import check_model_folder, what_it_is
from model.errors import ConfigError
from support.cli_runner import Result, run_here


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a hub's cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    return tmp_path


def make(*files: str, content: bytes = b"") -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def said(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_model_folder(Path(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["m/consolidated.00.pth", "m/params.json", "m/tokenizer.model"], ["Meta's own format", "convert_llama4"]),
        (["m/params.json", "m/checklist.chk"], ["Meta's own format", "hf download"]),
        (["m/adapter_config.json", "m/adapter_model.safetensors"], ["an adapter (LoRA)", "merge"]),
        (["m/a.gguf", "m/b.gguf"], ["2 GGUF models; give one of them: --model m/a.gguf (or b.gguf)"]),
        (["m/mmproj-F16.gguf"], ["a vision tower alone (mmproj)"]),
        (["m/a.gguf", "m/model-00001-of-00002.safetensors"], ["a GGUF model and safetensors", "--model m/a.gguf"]),
        (["m/pytorch_model.bin"], ["pickle", "safetensors"]),
        (["m/model.onnx"], ["ONNX"]),
        (["m/weights.00.npz"], ["MLX"]),
        (["m/onnx/model.onnx"], ["ONNX"]),
        (["m/model-00001-of-00002.safetensors"], ["no config.json there, though weights are"]),
        (["m/scout/config.json"], ["no config.json there, but in a folder within it: --model m/scout"]),
        (["m/a/config.json", "m/b/config.json"], ["--model m/a (or b)"]),
        (["m/manifest.json"], ["a saved context", "--context", "--model"]),
        (["m/readme.md"], ["no config.json there; expected a checkpoint folder"]),
        (["m/tokenizer.json"], ["no config.json there"]),
    ],
)
def test_folders(files: list[str], parts: list[str]) -> None:
    make(*files)
    assert all(part in said("m") for part in parts), said("m")


def test_an_adapter_names_its_base() -> None:
    make("m/adapter_config.json", content=json.dumps({"base_model_name_or_path": "meta-llama/Scout"}).encode())
    assert "an adapter (LoRA) of meta-llama/Scout" in said("m")
    make("m/adapter_config.json", content=b"[" * 10**6)
    assert said("m").startswith("an adapter (LoRA), no whole model")


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("a.gguf", b"version https://git-lfs", ["named as a GGUF file", "git lfs pull"]),
        ("w.pth", b"PK\3\4", ["pickle", "arbitrary code"]),
        ("w.bin", b"\x80\2", ["pickle"]),
        ("m.tar.gz", b"\x1f\x8b\x08", ["an archive; unpack"]),
        ("m.zip", b"PK\3\4", ["an archive"]),
        ("m.tar", bytes(257) + b"ustar", ["an archive"]),
        ("m.onnx", b"\x08", ["another program's format"]),
        ("lone.safetensors", b"", ["weights alone"]),
        ("notes.txt", b"hello", ["a file; expected a checkpoint folder"]),
    ],
)
def test_files(file: str, content: bytes, parts: list[str]) -> None:
    make(file, content=content)
    assert all(part in said(file) for part in parts), said(file)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_file_of_a_checkpoint(name: str) -> None:
    make("m/config.json", f"m/{name}")
    assert f"give its folder: --model {Path('m')}" in said(f"m/{name}")


def test_a_pipe_is_not_read() -> None:
    os.mkfifo("pipe")
    assert said("pipe").startswith("not a folder")


def test_what_is_not_there() -> None:
    make("llama4-scout/config.json")
    Path("broken").symlink_to("nothing")
    assert said("llama-scout") == "no such folder; did you mean llama4-scout?"
    assert said("zzz") == "no such folder; expected a checkpoint folder"
    assert said("a/b/c/d").startswith("no such folder") and said("broken") == "a link to nothing"
    assert said("llama4-scout/config.json/x").startswith("no such folder")
    assert said("x" * 300) == "cannot be read: File name too long"


@pytest.mark.parametrize("text", ["meta-llama/Llama-4-Scout-17B-16E-Instruct", "https:/huggingface.co/unsloth/Llama-4"])
def test_repositories(text: str) -> None:
    name = "/".join(text.split("/")[-2:])
    assert f"hf download {name} (or with --local-dir DIR, then --model DIR)" in said(text)
    root = f"cache/hub/models--{name.replace('/', '--')}"
    make(f"{root}/snapshots/old/config.json", f"{root}/snapshots/main/config.json", f"{root}/snapshots/part/README.md")
    make(f"{root}/refs/main", content=b"main\n")
    assert f"--model {Path(root).absolute()}/snapshots/main" in said(text)
    for folder in (root, f"{root}/snapshots", "cache/hub"):
        assert f"{root}/snapshots/main" in said(folder) and "the hub's cache" in said(folder)
    check_model_folder(Path(root, "snapshots/main"))


def test_a_cache_without_a_whole_snapshot() -> None:
    make("models--a--b/snapshots/x/README.md")
    assert "hf download a/b" in said("models--a--b")


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "q", "notes.txt", "--model", "m"],
        ["prefill", "notes.txt", "-o", "c", "--model", "m"],
        ["plan", "--tokens", "5", "--model", "m"],
        ["bench", "--model", "m"],
        ["inspect", "m"],
    ],
)
def test_every_command_says_it(command: list[str]) -> None:
    make("m/params.json", "m/consolidated.00.pth", "notes.txt", content=b"text")
    result = run_here(*command)
    assert result.code == (2 if command[0] == "inspect" else 3) and result.stderr.count("\n") == 1, result
    assert "Meta's own format" in result.stderr
    assert "Meta" in what_it_is(Path("m"))


def test_a_folder_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    lexists = os.path.lexists
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as without x, whatever root may
    monkeypatch.setattr(os.path, "lexists", lambda path: not str(path).endswith(".json") and lexists(path))
    assert what_it_is(tmp_path) == "its files cannot be opened: Permission denied"
    line = f"l4ctx: {tmp_path}: its files cannot be opened: Permission denied\n"
    assert run_here("inspect", str(tmp_path)) == Result(2, "", line)
