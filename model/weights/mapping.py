"""Files mapped into memory, and tensors as views of them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.weights.sources import StoredPart, StoredTensor

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors uses. Types of other formats are mapped as bytes."""


class MappedFiles:
    """Tensors of files as views of private mappings: nothing is read before it is used, nothing is copied.

    A file must not be cut short while it is mapped: reading behind its end kills the process.
    """

    def __init__(self) -> None:
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def tensor(self, stored: StoredTensor, index: int | None = None) -> Tensor:
        """A tensor of the stored dtype and shape, or what is at `index` of its first axis; of a dtype that torch lacks,
        uint8 (..., bytes of a row). Parts of a tensor are copied. Raises CheckpointError, and RuntimeError
        where memory or the number of open files is limited.
        """
        if isinstance(stored, StoredPart):
            whole, axis = self.tensor(stored.whole, index), stored.axis
            parts = [whole.narrow(axis, part.start, len(part)) for part in stored.parts]
            return torch.cat(parts, axis) if len(parts) > 1 else parts[0].contiguous()
        tensor = self._whole(stored)
        return tensor if index is None else tensor[index]

    def _whole(self, stored: StoredTensor) -> Tensor:
        storage = self._storage(stored.file)
        if stored.offset + stored.num_bytes > storage.nbytes():
            raise CheckpointError(f"{stored.file}: truncated inside tensor {stored.name}; download it again")
        dtype, shape = DTYPES.get(stored.dtype), stored.shape
        if dtype is None:
            rows = math.prod(shape[:-1])
            dtype, shape = torch.uint8, (*shape[:-1], stored.num_bytes // max(rows, 1))
        if math.prod(shape) * dtype.itemsize != stored.num_bytes:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name}: shape {list(stored.shape)} in {stored.dtype} is not "
                f"{stored.num_bytes} bytes"
            )
        if stored.offset % dtype.itemsize:  # allowed by the format, though no tool writes it
            return _view(storage, torch.uint8, stored.offset, (stored.num_bytes,)).clone().view(dtype).view(shape)
        return _view(storage, dtype, stored.offset // dtype.itemsize, shape)

    def _storage(self, file: Path) -> torch.UntypedStorage:
        if file not in self._storages:
            try:
                size = file.stat().st_size
                self._storages[file] = torch.UntypedStorage(0) if size == 0 else _mapped(file, size)
            except (OSError, RuntimeError) as error:
                if "Cannot allocate memory" in str(error) or "Too many open files" in str(error):
                    raise  # which says nothing about the file
                raise CheckpointError(f"{file}: cannot be mapped ({error})") from None
        return self._storages[file]


def _mapped(file: Path, size: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    assert isinstance(storage, torch.UntypedStorage)
    return storage


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
    """`offset` in elements."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
