"""Arrays of MLX as tensors, and the other way. Imported only by tests that skip where mlx is not installed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16, torch.float32: mx.float32}


def from_torch(tensor: Tensor) -> Any:
    """The same numbers in the same dtype."""
    return mx.array(tensor.float().numpy()).astype(DTYPES[tensor.dtype])


def to_torch(array: Any) -> Tensor:
    """The same numbers in the same dtype."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
