"""What a config.json says of quantization, and the patterns that it names modules by. Imports no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from model.errors import CheckpointError

_MOST_REPEATS = 4
"""Of a pattern: more take long on purpose-made names, and files come from strangers."""


def declared_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config`, or MLX's `quantization`, of a parsed config.json or its text_config; empty without."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "quantization"):
            settings = part.get(name)
            if isinstance(settings, Mapping) and settings:
                return settings
    return {}


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
