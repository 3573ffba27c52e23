"""Checks of stored tensors, each raising one line that names the tensor."""

from __future__ import annotations

from collections.abc import Iterable

from model.errors import CheckpointError
from model.weights.sources import Group, StoredTensor


def damaged(tensor: StoredTensor, what: str) -> CheckpointError:
    """An error that continues "tensor NAME"."""
    return CheckpointError(f"{tensor.file}: tensor {tensor.name} {what}")


def require(group: Group, suffix: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> StoredTensor:
    """The group's tensor with that suffix, of one of these dtypes and, if given, that shape. Raises CheckpointError."""
    tensor = group.tensors.get(suffix)
    if tensor is None:
        own = ".weight" if ".weight" in group.tensors else next(iter(group.tensors))
        beside = group.tensors[own]
        raise damaged(beside, f"is there, but {beside.name.removesuffix(own)}{suffix} is missing")
    if tensor.dtype not in dtypes:
        raise damaged(tensor, f"has dtype {tensor.dtype} instead of {' or '.join(dtypes)}")
    if shape is not None and tensor.shape != shape:
        raise damaged(tensor, f"has shape {list(tensor.shape)} instead of {list(shape)}")
    return tensor


def no_others(group: Group, known: Iterable[str]) -> None:
    """Raises CheckpointError if the group has tensors with other suffixes than those in `known`."""
    for suffix, tensor in group.tensors.items():
        if suffix not in known:
            raise damaged(tensor, "has no meaning beside the quantized weights of its module")
