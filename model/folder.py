"""What lies in a checkpoint folder, by name, and how its small JSON files are read. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED_WEIGHTS = re.compile(r"(pytorch_model|model|consolidated|adapter_model)[\w.-]*\.(bin|pth|pt|ckpt)")
"""Never read: such a file can run any program."""

MAX_JSON_BYTES = 2**26  # an index of 18,000 tensors has 2 MB
UNREADABLE = (OSError, ValueError, RecursionError)
"""What `read_json` raises; the last for lists or objects that are nested too deeply."""


def read_json(file: Path) -> Any:
    """What a JSON file says, of at most MAX_JSON_BYTES. Raises what is in UNREADABLE.

    Links are followed: the hub's cache consists of them.
    """
    with file.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return json.loads(text.decode("utf-8"))


def read_object(file: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """The object that a JSON file holds, empty where there is no such file. Raises `error`, of one line."""
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except UNREADABLE as reason:
        raise error(f"{file}: cannot be read as JSON ({reason})") from None
    if not isinstance(content, dict):
        raise error(f"{file}: the top level is not an object")
    return content
