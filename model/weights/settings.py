"""What a configuration says of quantization, and the patterns that it names modules by. Imports no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint_files import checkpoint_files
from model.errors import CheckpointError
from model.folder import CONFIG, read_object

OLDER_SETTINGS = "hf_quant_config.json"
"""What older versions of modelopt wrote instead of settings in config.json."""

_MOST_REPEATS = 4
"""Of a pattern: more take long on purpose-made names, and files come from strangers."""


def quantization_settings(path: Path) -> Mapping[str, Any]:
    """What config.json says of quantization: `quantization_config`, or MLX's `quantization`; else modelopt's own file.

    Empty if nothing is said. Raises CheckpointError.
    """
    config = checkpoint_files(path).object(CONFIG, CheckpointError)
    return declared_settings(config) or (older_settings(path) if path.is_dir() else {})


def declared_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config`, or MLX's `quantization`, of a parsed config.json or its text_config; empty without."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "quantization"):
            settings = part.get(name)
            if isinstance(settings, Mapping) and settings:
                return settings
    return {}


def older_settings(folder: Path) -> Mapping[str, Any]:
    """Those of older versions of modelopt, under the names of newer ones; empty if there are none.

    Raises CheckpointError.
    """
    said = read_object(folder / OLDER_SETTINGS, CheckpointError).get("quantization")
    if not isinstance(said, dict):
        return {}
    found = {"quant_method": "modelopt", "quant_algo": said.get("quant_algo"), "group_size": said.get("group_size")}
    found |= {"ignore": said.get("exclude_modules"), "kv_cache_scheme": said.get("kv_cache_quant_algo")}
    return {name: value for name, value in found.items() if value is not None}


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression of a configuration. Raises CheckpointError for those that are not tried."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        raise CheckpointError(f"config.json: quantization_config: pattern {pattern!r} repeats too much to be tried")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"config.json: quantization_config: pattern {pattern!r} is not one ({error})") from None
