"""Recognises what was given as the model if it is no checkpoint, and says what to do instead.

Looks only at a few names and at a file's first bytes; loads nothing.
"""

from __future__ import annotations

import os
import re
import stat
from itertools import islice
from pathlib import Path
from typing import Any

from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.documents.recognition import is_archive
from l4ctx.machine.places import hub_cache
from l4ctx.machine.suggestions import did_you_mean
from model.errors import ConfigError
from model.folder import CONFIG, PICKLED_WEIGHTS, UNREADABLE, read_json
from model.gguf.files import SUFFIX, find_gguf, models_in

MAX_NAMES = 5000
REPOSITORY = re.compile(
    r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/tree/[\w.-]+)?"
)
_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
_EXPECTED = "expected a checkpoint folder"
_DOWNLOAD = "hf download meta-llama/Llama-4-Scout-17B-16E-Instruct --local-dir DIR, then --model DIR"
_PICKLE = (
    "PyTorch's pickle format, which is not loaded, as such a file can execute arbitrary code; use the safetensors of "
    "the same model"
)


def check_model_folder(path: Path) -> None:
    """Raises ConfigError, saying what `path` is and what to give instead, if it is no checkpoint.

    A folder with a config.json, and a GGUF model, count as one.
    """
    if not os.path.lexists(path / CONFIG) and find_gguf(path) is None:
        raise ConfigError(f"{path}: {what_it_is(path)}")


def what_it_is(path: Path) -> str:
    """Says, for a one-line error, what something that is not a checkpoint folder is, and what to do."""
    try:
        names = sorted(_names(path))
    except FileNotFoundError:
        return _missing(path)
    except NotADirectoryError:
        return _file(path) if os.path.exists(path) else _missing(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return _folder(path, names) if os.access(path, os.X_OK) else "its files cannot be opened: Permission denied"


def _names(folder: Path) -> list[str]:
    """Names of at most MAX_NAMES entries. Raises OSError."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in islice(entries, MAX_NAMES)]


def _missing(path: Path) -> str:
    text = str(path)
    if os.path.lexists(path):
        return "a link to nothing"
    if text.startswith("~") and os.path.exists(os.path.expanduser(text)):
        return f"no such folder; the shell left ~ as it is: write {os.path.expanduser(text)}"
    repository = REPOSITORY.fullmatch(text)
    if repository is not None and not os.path.exists(path.parts[0]):
        name = repository[1]
        snapshots = snapshots_of(hub_cache() / f"models--{name.replace('/', '--')}")
        if snapshots:
            return f"no such folder, but the repository is in the hub's cache: --model {snapshots[0]}"
        return (
            f"no such folder, and no such repository in the hub's cache; to download it: hf download {name} (or with "
            "--local-dir DIR, then --model DIR)"
        )
    return f"no such folder{did_you_mean(text) or f'; {_EXPECTED}'}"


def _file(path: Path) -> str:
    name, start = path.name.lower(), _first_bytes(path, 512)
    if start is None:
        return f"not a folder; {_EXPECTED}"
    if name.endswith(SUFFIX):
        return "named as a GGUF file, but does not begin like one; download it again (git lfs pull in a clone)"
    if os.path.lexists(path.parent / CONFIG):
        part = "one shard of a checkpoint" if name.endswith(".safetensors") else "one file of a checkpoint"
        return f"{part}; give its folder: --model {path.parent}"
    if name.endswith(_PICKLED):
        return f"a file in {_PICKLE}"
    if name.endswith(".safetensors"):
        what = _folder(path.parent, _names_if_any(path.parent))
        return f"weights alone, without the config.json and tokenizer.json of a checkpoint (its folder: {what})"
    if name.endswith((".onnx", ".npz", ".mlmodel", ".h5", ".tflite")):
        return f"a model in another program's format; a safetensors checkpoint is needed: {_DOWNLOAD}"
    if is_archive(start):
        return "an archive; unpack it, and give the folder that has config.json in it"
    return f"a file; {_EXPECTED}"


def _folder(path: Path, names: list[str]) -> str:
    there = set(names)
    endings = {Path(name).suffix.lower() for name in names}
    if MANIFEST in there:
        return "a saved context, no checkpoint: give it as --context, and the folder of its model as --model"
    if "adapter_config.json" in there:
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return (
            f"an adapter (LoRA){of}, no whole model: merge it into its base model (merge_and_unload of peft, then "
            "save_pretrained), and give that folder"
        )
    if (cached := _in_the_hubs_cache(path, names)) is not None:
        return cached
    if (
        "checklist.chk" in there
        or "params.json" in there
        or any(re.fullmatch(r"consolidated.*\.pth", name) for name in names)
    ):
        return (
            "a checkpoint in Meta's own format, which is not read: convert it with "
            "convert_llama4_weights_to_hf.py of transformers, or download the converted one: " + _DOWNLOAD
        )
    if SUFFIX in endings:
        return _gguf_files(path)
    inner = [name for name in names[:200] if os.path.lexists(path / name / CONFIG)]
    if inner:
        others = f" (or {', '.join(inner[1:4])})" if len(inner) > 1 else ""
        return f"no config.json there, but in a folder within it: --model {path / inner[0]}{others}"
    if ".safetensors" in endings:
        return "no config.json there, though weights are: download the other files of the repository, too"
    if ".onnx" in endings or ".npz" in endings or "onnx" in there:
        return (
            "no config.json there, but a model in another program's format (ONNX, MLX); a safetensors checkpoint "
            f"is needed: {_DOWNLOAD}"
        )
    if any(PICKLED_WEIGHTS.fullmatch(name) for name in names):
        return f"no config.json there, but files in {_PICKLE}"
    return f"{'an empty folder, ' * (not names)}no config.json there; {_EXPECTED}"


def _gguf_files(path: Path) -> str:
    models = models_in(path)
    if not models:
        return "GGUF files of a vision tower alone (mmproj); the text model's file is needed, too"
    if len(models) == 1:
        return f"a GGUF model and safetensors; give the file: --model {models[0]}"
    others = ", ".join(model.name for model in models[1:4])
    return f"{len(models)} GGUF models; give one of them: --model {models[0]} (or {others})"


def _in_the_hubs_cache(path: Path, names: list[str]) -> str | None:
    """For a folder of the hub's cache, what it is; None for any other."""
    root = path.parent if path.name == "snapshots" else path
    if root.name.startswith("models--"):
        repository = root.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = snapshots_of(root)
        if not snapshots:
            return (
                f"the hub's cache of {repository}, in which no snapshot has a config.json: download it again, with "
                f"hf download {repository}"
            )
        return f"the hub's cache of {repository}; give a snapshot in it: --model {snapshots[0]}"
    hub = path / "hub" if "hub" in names and path.name == "huggingface" else path
    models = [name for name in (names if hub == path else _names_if_any(hub)) if name.startswith("models--")]
    if not models:
        return None
    found = [snapshot for name in models for snapshot in snapshots_of(hub / name)[:1]]
    llama = [snapshot for snapshot in found if "llama-4" in str(snapshot).lower()] or found
    return "the hub's cache; give a snapshot in it" + (f": --model {llama[0]}" if llama else "")


def snapshots_of(root: Path) -> list[Path]:
    """Snapshots with a config.json of a repository in the hub's cache: the main branch's first, then the newest."""
    main = (_first_bytes(root / "refs" / "main", 100) or b"").decode("ascii", "replace").strip()
    found = [root / "snapshots" / name for name in _names_if_any(root / "snapshots")]
    return sorted(
        (folder for folder in found if os.path.exists(folder / CONFIG)),
        key=lambda folder: (folder.name != main, -os.stat(folder).st_mtime, folder.name),
    )


def _names_if_any(folder: Path) -> list[str]:
    """Sorted names; empty if the folder cannot be listed."""
    try:
        return sorted(_names(folder))
    except OSError:
        return []


def _first_bytes(file: Path, count: int) -> bytes | None:
    """None if it is not a readable regular file."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return None
        with file.open("rb") as stream:
            return stream.read(count)
    except OSError:
        return None


def _json(file: Path) -> dict[str, Any]:
    """A small JSON object; empty if there is none that can be read."""
    try:
        content = read_json(file) if file.is_file() else {}
    except UNREADABLE:
        return {}
    return content if isinstance(content, dict) else {}
