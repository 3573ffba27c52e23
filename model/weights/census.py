"""Counts a checkpoint's weights by owner and stored form, and says in one line how it is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from model.quantization.mlx_affine import MlxAffine
from model.weights.owners import Owner, Share, is_router, owner_of, shares
from model.weights.plain import PlainScheme
from model.weights.sources import WeightSource

MOST_LISTED = 4
"""Stored forms that are named in a line; GGUF files may have a dozen."""


def census(sources: Mapping[str, WeightSource]) -> tuple[Share, ...]:
    """All weights, owners in their order and the larger forms of each first."""
    return shares(
        Share(owner_of(name), source.scheme.label, source.parameters, source.num_bytes)
        for name, source in sources.items()
    )


def description(sources: Mapping[str, WeightSource], settings: Mapping[str, Any]) -> str:
    """Format, schemes, and what is not quantized of what could be. `settings`: config.json's quantization_config.

    Such as "compressed-tensors: w4a16 (int4, groups of 128); not quantized: attention, routers, embeddings, head".
    """
    quantized = {name: source for name, source in sources.items() if not isinstance(source.scheme, PlainScheme)}
    if not quantized:
        return f"{_labels(sources.values())}, not quantized"
    line = f"{_format(sources, settings)}: {_labels(quantized.values())}"
    touched = {_part(name) for name in quantized}
    plain: dict[str, None] = {}  # in order, each once
    for name, source in sorted(sources.items(), key=lambda item: list(Owner).index(owner_of(item[0]))):
        part = _part(name)
        if name not in quantized and part and len(source.shape) > 1:
            plain[f"some {part}" if part in touched else part] = None
    return f"{line}; not quantized: {', '.join(plain)}" if plain else line


def _part(name: str) -> str:
    owner = owner_of(name)
    return str(owner) if owner is not Owner.SMALL else "routers" if is_router(name) else ""


def _format(sources: Mapping[str, WeightSource], settings: Mapping[str, Any]) -> str:
    """By the files' type, then by what config.json says of quantization, then by the forms themselves."""
    if any(tensor.file.suffix == ".gguf" for source in sources.values() for tensor in source.tensors.values()):
        return "GGUF"
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method
    return "MLX" if any(isinstance(source.scheme, MlxAffine) for source in sources.values()) else "quantized"


def _labels(sources: Iterable[WeightSource]) -> str:
    """The stored forms, those with the most bytes first."""
    num_bytes: Counter[str] = Counter()
    for source in sources:
        num_bytes[source.scheme.label] += source.num_bytes
    found = [label for label, _ in num_bytes.most_common()]
    more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    return ", ".join(found[:MOST_LISTED]) + more
