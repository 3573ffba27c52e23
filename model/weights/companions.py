"""Checks of the tensors of one quantized weight: their presence, dtypes, shapes, and how many codes share a scale."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from model.errors import CheckpointError
from model.quantization.scaled import PER_CHANNEL, PER_TENSOR, Grain
from model.weights.checks import damaged
from model.weights.sources import Group, StoredTensor

FLOATS = ("BF16", "F32", "F16")
_SKIPPED = (
    (re.compile(r".*[._]input_(scale|global_scale|zero_point|scale_ub)"), "static activation scales"),
    (re.compile(r".*\.self_attn(\.[qkv]_proj)?\.([qkv]_scale|[qkv]_zero_point|output_scale|output_zero_point)"),
     "scales of a quantized KV cache"),
)  # fmt: skip


def skipped(name: str) -> str | None:
    """What a stored tensor is for, if weights are read without it: activations are not quantized here.

    For people, such as "static activation scales"; None for all others.
    """
    return next((what for pattern, what in _SKIPPED if pattern.fullmatch(name)), None)


class Companions:
    """The tensors of a group by what follows their module's name, each to be asked for; the rest is surplus."""

    def __init__(self, group: Group, form: str) -> None:
        """`form`, for people, is what they are read as, such as "FP8 weights"."""
        self.tensors = {suffix: tensor for suffix, tensor in group.tensors.items() if skipped(tensor.name) is None}
        self.lead, self.matrix = group.shape[:-2], group.shape[-2:]
        self.form = form
        self._group = group
        self._asked: set[str] = set()

    def name(self, suffix: str) -> str:
        """The name in the file of a tensor, whether it is there or not."""
        known, tensor = next(iter(self._group.tensors.items()))
        return tensor.name.removesuffix(known) + suffix

    def get(self, suffix: str, dtypes: Collection[str]) -> StoredTensor | None:
        """A tensor that may be missing. Raises CheckpointError if it is of none of these dtypes."""
        tensor = self.tensors.get(suffix)
        self._asked.add(suffix)
        if tensor is not None and tensor.dtype not in dtypes:
            raise self.error(tensor, f"has dtype {tensor.dtype} instead of {' or '.join(dtypes)}, for {self.form}")
        return tensor

    def need(self, suffix: str, dtypes: Collection[str]) -> StoredTensor:
        """A tensor. Raises CheckpointError if it is missing or of none of these dtypes."""
        tensor = self.get(suffix, dtypes)
        if tensor is None:
            file = next(iter(self._group.tensors.values())).file
            raise CheckpointError(f"{file}: tensor {self.name(suffix)} is missing, which {self.form} need")
        return tensor

    def check_shape(self, tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
        """Raises CheckpointError if it has none of these shapes."""
        if tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(tensor, f"has shape {list(tensor.shape)} instead of {wanted}, for {self.form}")

    def of_matrix(self, tensor: StoredTensor) -> tuple[int, ...]:
        """Its shape for one matrix, without the leading number of experts; () if one number is for all."""
        if tensor.shape in ((), (1,)):
            return ()
        return tensor.shape[1:] if self.lead and tensor.shape[:1] == self.lead else tensor.shape

    def finish(self) -> None:
        """Raises CheckpointError, naming it, if a tensor was not asked for."""
        for suffix in sorted(self.tensors.keys() - self._asked):
            raise self.error(self.tensors[suffix], f"is a companion that is not known of {self.form}")

    def error(self, tensor: StoredTensor, problem: str) -> CheckpointError:
        return damaged(tensor, problem)


def grain(parts: Companions, scale: StoredTensor, matrix: tuple[int, int], blocks: object = None) -> Grain:
    """How many weights of a matrix (C_out, C_in) share one of these scales; `blocks` is the configuration's word.

    Raises CheckpointError if the shape fits no way to share.
    """
    rows, columns = matrix
    shape = parts.of_matrix(scale)
    if shape in ((), (1,), (1, 1)):
        return PER_TENSOR
    if shape in ((rows,), (rows, 1)):
        return PER_CHANNEL
    if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
        return Grain(1, columns // shape[1])
    if len(shape) == 2 and min(shape) > 0 and shape[0] <= rows and shape[1] <= columns:
        for block in (*_pairs(blocks), (128, 128)):
            if (-(-rows // block[0]), -(-columns // block[1])) == shape:
                return Grain(*block)
        if rows % shape[0] == 0 and columns % shape[1] == 0:
            return Grain(rows // shape[0], columns // shape[1])
    raise parts.error(
        scale,
        f"has shape {list(scale.shape)}, which is no scale a tensor, channel, group or block of {list(matrix)}, "
        f"for {parts.form}",
    )


def float4_group(parts: Companions, codes: StoredTensor, scale: StoredTensor) -> int:
    """The group size of FP4 codes (C_out, C_in / 2). Raises CheckpointError for wrong shapes."""
    rows, columns = parts.matrix
    parts.check_shape(codes, (*parts.lead, rows, columns // 2))
    shape = parts.of_matrix(scale)
    if columns % 2 or len(shape) != 2 or shape[0] != rows or not shape[1] or columns % shape[1]:
        raise parts.error(scale, f"has shape {list(scale.shape)}: no groups of {[rows, columns]}, for {parts.form}")
    return columns // shape[1]


def _pairs(blocks: object) -> Iterable[tuple[int, int]]:
    if isinstance(blocks, list | tuple) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks):
        yield blocks[0], blocks[1]
