"""File names in a checkpoint folder, and reading its small JSON files. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED_WEIGHTS = re.compile(r"(pytorch_model|model|consolidated|adapter_model)[\w.-]*\.(bin|pth|pt|ckpt)")
"""Never read: loading such a file can execute arbitrary code."""

MAX_JSON_BYTES = 2**26  # an index of 18,000 tensors has 2 MB
UNREADABLE = (OSError, ValueError, RecursionError)
"""What `read_json` raises; RecursionError for lists or objects that are nested too deeply."""


def read_json(file: Path) -> Any:
    """The content of a JSON file of at most MAX_JSON_BYTES. Raises the errors in UNREADABLE.

    Follows links, since the hub's cache consists of them.
    """
    with file.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return json.loads(text.decode("utf-8"))


def read_object(file: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises `error` with a one-line message."""
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except UNREADABLE as reason:
        raise error(f"{file}: cannot be read as JSON ({reason})") from None
    if not isinstance(content, dict):
        raise error(f"{file}: the top level is not an object")
    return content
