"""One rank's part of the stored weights: which elements of which tensors, so that nothing else is read.

Rows of a matrix, its outputs, can be cut anywhere but in blocks of scales. Columns, its inputs, are cut where words,
groups and blocks end. What a form does not allow is refused, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from model.config import TextConfig
from model.division import Division, TensorRank, copies_of_kv_heads, division_of
from model.quantization.affine import AffineScheme
from model.quantization.float4 import Float4Scheme
from model.quantization.float8 import Float8Scheme
from model.quantization.gguf_blocks import GgufScheme
from model.quantization.gguf_types import BY_NAME
from model.quantization.int8_rows import Int8Rows
from model.quantization.mlx_affine import MlxAffine
from model.quantization.scaled import Grain
from model.weights.checks import damaged
from model.weights.expert_parts import ExpertPart
from model.weights.plain import PlainScheme
from model.weights.sources import StoredPart, StoredTensor, WeightSource

_WORD = 32
_ADDED_ONCE = ".o_proj.bias"
"""By the first rank, the only one that has it."""


class Axis(NamedTuple):
    """The axis of a stored tensor along which rows or columns lie, counted from the last one: so many weights are in so
    many elements of it."""

    number: int
    weights: int = 1
    elements: int = 1


def cut_sources(sources: Mapping[str, WeightSource], config: TextConfig, rank: TensorRank) -> dict[str, WeightSource]:
    """The sources of one rank; `config` is the whole model's. Raises CheckpointError for forms that cannot be cut."""
    found = {}
    for name, source in sources.items():
        if rank.number and name.endswith(_ADDED_ONCE):
            continue
        division = division_of(name, config, rank)
        found[name] = source if division is None else _cut(name, source, division, rank)
    return found


class ReadBytes(NamedTuple):
    """Bytes of the stored weights that a rank's model is made of."""

    share: int  # those that no other tensor rank reads
    replicated: int  # those that others read, too


def read_bytes(sources: Mapping[str, WeightSource], config: TextConfig, rank: TensorRank) -> ReadBytes:
    """Of `sources`, which are the whole model's, as is `config`. Raises CheckpointError."""
    share = replicated = 0
    has_copies = copies_of_kv_heads(config, rank.count) > 1
    for name, source in cut_sources(sources, config, rank).items():
        is_copied = has_copies and name.rpartition(".")[0].endswith(("k_proj", "v_proj"))
        is_first_only = name.endswith(_ADDED_ONCE)
        for role, tensor in source.tensors.items():
            is_whole = tensor == sources[name].tensors[role] and not is_first_only
            if rank.count > 1 and (is_whole or is_copied):
                replicated += tensor.num_bytes
            else:
                share += tensor.num_bytes
    return ReadBytes(share, replicated)


def _cut(name: str, source: WeightSource, division: Division, rank: TensorRank) -> WeightSource:
    part = ExpertPart.of(name)
    is_turned = part is not None and part.is_fused
    dimension = -1 if division.is_rows == is_turned or len(source.shape) == 1 else -2
    total = source.shape[dimension]
    tensors = {}
    for role, tensor in source.tensors.items():
        axes = _axes(source, role, tensor, is_turned=is_turned)
        axis = None if axes is None else axes[0 if division.is_rows else 1]
        if axes is None or not (axis is None or _fits(axis, division, total)):
            raise damaged(
                tensor,
                f"is stored as {source.scheme.label}, which cannot be divided over {rank.count} ranks between "
                f"{'outputs' if division.is_rows else 'inputs'}; start fewer",
            )
        tensors[role] = tensor if axis is None else _part(tensor, axis, division)
    shape = list(source.shape)
    shape[dimension] = division.size
    return replace(source, shape=tuple(shape), tensors=tensors)


def _fits(axis: Axis, division: Division, total: int) -> bool:
    """Whether the parts begin and end between units of the axis."""
    return all(
        part.start % axis.weights == 0 and (part.stop % axis.weights == 0 or part.stop == total)
        for part in division.parts
    )


def _part(tensor: StoredTensor, axis: Axis, division: Division) -> StoredTensor:
    def element(weight: int) -> int:
        return -(-weight // axis.weights) * axis.elements

    parts = tuple(range(element(part.start), element(part.stop)) for part in division.parts)
    taken = sum(map(len, parts))
    shape, place = list(tensor.shape), len(tensor.shape) + axis.number
    in_blocks = axis.elements > 1 and tensor.dtype in BY_NAME  # bytes are mapped, but the shape is in weights
    length = element(shape[place]) if in_blocks else shape[place]
    num_bytes = tensor.num_bytes * taken // length
    shape[place] = division.size if in_blocks else taken
    if place == 0 and len(parts) == 1:  # lies together, as a tensor of its own
        start = tensor.offset + tensor.num_bytes // length * parts[0].start
        return replace(tensor, shape=tuple(shape), num_bytes=num_bytes, offset=start)
    return StoredPart(
        tensor.file, tensor.name, tensor.dtype, tuple(shape), num_bytes, tensor.offset, tensor, axis.number, parts
    )


def _axes(
    source: WeightSource, role: str, tensor: StoredTensor, *, is_turned: bool
) -> tuple[Axis | None, Axis | None] | None:
    """The axes of rows and of columns in a stored tensor, None where it is the same for all of them; None: there is no
    rule for this form."""
    scheme, rows, columns = source.scheme, Axis(-2), Axis(-1)
    match scheme, role:
        case PlainScheme(), _:
            if len(tensor.shape) == 1:
                return columns, None
            return (columns, rows) if is_turned else (rows, columns)
        case AffineScheme(), "codes":
            return rows, Axis(-1, _WORD // scheme.bits if scheme.is_packed else 1)
        case AffineScheme(), "zero" if tensor.dtype == "I32":
            found = _of_scales(source, tensor, scheme.grain)
            return (found[0] and found[0]._replace(weights=_WORD // scheme.bits)), found[1]
        case AffineScheme() | Float8Scheme(), "scale" | "zero":
            return _of_scales(source, tensor, scheme.grain)
        case Float8Scheme(), "codes":
            return (columns, rows) if scheme.is_transposed else (rows, columns)
        case Float4Scheme(), "codes" | "scale":
            weights = 2 if role == "codes" else scheme.group_size
            return (columns, Axis(-2, weights)) if scheme.is_transposed else (rows, Axis(-1, weights))
        case Float4Scheme(), _:
            return None, None
        case Int8Rows(), "weight":
            return rows, columns
        case Int8Rows(), _:
            return (columns if role == "absmax" else None), None
        case GgufScheme(), _:
            kind = BY_NAME[scheme.type_name]
            return rows, Axis(-1, kind.block_weights, kind.block_bytes)
        case MlxAffine(), "weight":
            unit = math.gcd(scheme.bits, _WORD)
            return rows, Axis(-1, _WORD // unit, scheme.bits // unit)
        case MlxAffine(), _:
            return rows, Axis(-1, scheme.group_size)
        case _:
            return None


def _of_scales(source: WeightSource, tensor: StoredTensor, grain: Grain) -> tuple[Axis | None, Axis | None]:
    """Of scales (C_out,) or (rows of scales, columns of scales), of fused experts also (1, C_out); stacks have another
    axis before."""
    is_stack = len(source.shape) == 3 and tensor.shape[:1] == source.shape[:1]
    shape = tensor.shape[1:] if is_stack else tensor.shape
    rows = None
    if grain.rows:
        rows = Axis(-1 if len(shape) == 1 or shape[-2] == 1 else -2, grain.rows)
    return rows, Axis(-1, grain.columns) if grain.columns else None
