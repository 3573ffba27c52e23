"""Block types that the package gguf expands, with NumPy: optional, and slow."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from model.errors import CheckpointError


def check_installed(type_name: str) -> None:
    """Raises CheckpointError, with what to install, if the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"weights of type {type_name} need the package gguf: pip install 'l4ctx[gguf]'")


def expansion(type_name: str) -> Callable[[Tensor, Tensor], None]:
    """What writes the weights of blocks (n, bytes), uint8, to float32 (n, weights). Raises CheckpointError."""
    check_installed(type_name)
    import gguf
    import gguf.quants

    kind = gguf.GGMLQuantizationType[type_name]

    def expand(blocks: Tensor, out: Tensor) -> None:
        with warnings.catch_warnings():  # infinite scales of damaged files: NumPy warns of what becomes NaN
            warnings.simplefilter("ignore", RuntimeWarning)
            values = gguf.quants.dequantize(blocks.cpu().contiguous().numpy(), kind)
        out.copy_(torch.from_numpy(values))

    return expand
