"""Finds out how each weight is stored: by its tensors' own dtypes and companions, then by the configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.weights import bitsandbytes, compressed_tensors, fbgemm, gguf, mlx, modelopt, plain, refused
from model.weights.companions import skipped
from model.weights.expert_parts import ExpertPart, missing_part, parts_by_weight, surplus_part
from model.weights.plain import PlainScheme
from model.weights.sources import Group, Reader, StoredTensor, WeightSource

READERS: tuple[Reader, ...] = (
    plain.read,
    compressed_tensors.read,
    modelopt.read,
    fbgemm.read,
    gguf.read,
    mlx.read,
    bitsandbytes.read,
    refused.read,
)
"""Asked in this order; the first that knows a group's tensors says what they mean."""

Shapes = Mapping[str, tuple[int, ...]]


def find_sources(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    expected: Shapes,
    settings: Mapping[str, Any],
    optional: frozenset[str] = frozenset(),
) -> dict[str, WeightSource]:
    """How each weight is stored, by its name in the model; experts that are stored apart have names of their own.

    `stored`: tensors by the model's names for them. `expected`: shapes of the model's parameters. Raises
    CheckpointError for missing, surplus and damaged tensors, and for formats that are not read.
    """
    groups, extra = _grouped(stored, expected, settings)
    sources: dict[str, WeightSource] = {}
    for name, group in groups.items():
        source = next((source for reader in READERS if (source := reader(group)) is not None), None)
        if source is None:
            raise _unknown(group)
        sources[name] = source
    parts = parts_by_weight(name for name in sources if name not in expected or ExpertPart.of(name))
    for fused, those in parts.items():
        experts = expected[fused][0]
        if (surplus := surplus_part(those, experts)) is not None:
            tensor = _first(sources[surplus[0]])
            raise CheckpointError(f"{tensor.file}: extra tensor {tensor.name}: {surplus[1]}")
        if (missing := missing_part(those, experts)) is not None:
            raise CheckpointError(f"{folder}: tensor {missing} is missing, though other experts are there")
    _check_complete(folder, sources.keys() | parts.keys() | optional, expected, extra)
    for name, source in sources.items():
        _check_shape(source, groups[name].shape)
    return sources


def _grouped(
    stored: Mapping[str, StoredTensor], expected: Shapes, settings: Mapping[str, Any]
) -> tuple[dict[str, Group], dict[str, StoredTensor]]:
    """The tensors by the weight that they belong to, and those that belong to none."""
    found: dict[str, dict[str, StoredTensor]] = {}
    extra: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if skipped(name) is not None:
            continue
        weight = _weight_of(name, stored, expected)
        if weight is None:
            extra[name] = tensor
        else:
            found.setdefault(weight, {})[name.removeprefix(weight.removesuffix(".weight"))] = tensor
    groups = {}
    for weight, tensors in found.items():
        path = weight.removesuffix(".weight")
        part = ExpertPart.of(weight)
        shape = expected[weight] if part is None else part.shape(expected[part.fused])
        groups[weight] = Group(path, tensors, shape, settings)
    return groups, extra


def _weight_of(name: str, stored: Mapping[str, StoredTensor], expected: Shapes) -> str | None:
    """The name of the weight that a stored tensor is, or is a companion of; None if the model has no such weight."""
    if name in expected:
        return name
    for cut in (len(name), *(place for place in range(len(name) - 1, 0, -1) if name[place] in "._")):
        path = name[:cut]
        with_suffix = f"{path}.weight"
        if path in expected and with_suffix not in stored and not path.endswith((".weight", ".bias")):
            return path  # fused experts
        for weight in (path, with_suffix):
            part = ExpertPart.of(weight)
            is_one = part is not None and not part.is_fused and part.fused in expected
            if is_one or (weight in expected and weight == with_suffix):
                return weight
    return None


def _check_complete(folder: Path, there: set[str], expected: Shapes, extra: Mapping[str, StoredTensor]) -> None:
    for name in expected:
        if name not in there:
            near = difflib.get_close_matches(name, sorted(extra), 1, 0.8)
            hint = f", though {extra[near[0]].name} is there" if near else ""
            raise CheckpointError(f"{folder}: tensor {name} is missing{hint}")
    for tensor in extra.values():
        raise CheckpointError(f"{tensor.file}: extra tensor {tensor.name}, which the model does not have")


def _check_shape(source: WeightSource, shape: tuple[int, ...]) -> None:
    """Quantized weights were checked by their reader, which knows the shapes of their parts."""
    if source.shape != shape:
        tensor = _first(source)
        wanted = list(shape)
        found = list(source.shape if not isinstance(source.scheme, PlainScheme) else tensor.shape)
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} has shape {found} instead of {wanted}")


def _unknown(group: Group) -> CheckpointError:
    """The error for tensors that no reader knows."""
    itself = next((tensor for suffix, tensor in group.tensors.items() if suffix in ("", ".weight")), None)
    others = [tensor for _, tensor in sorted(group.tensors.items()) if tensor is not itself]
    if others and itself is not None and itself.dtype in plain.DTYPE_NAMES:
        return CheckpointError(f"{others[0].file}: extra tensor {others[0].name}, which the model does not have")
    return refused.unknown(group)


def _first(source: WeightSource) -> StoredTensor:
    return next(iter(source.tensors.values()))
