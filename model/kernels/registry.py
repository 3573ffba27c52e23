"""The attention backends by name."""

from __future__ import annotations

from model.kernels.attend import Backend
from model.kernels.cudnn import cudnn
from model.kernels.eager import eager
from model.kernels.matmul import matmul
from model.kernels.sdpa import sdpa


def backend(name: str) -> Backend:
    """The backend called `name`, one of model.config.BACKEND_NAMES."""
    if name == "flex":
        from model.kernels.flex import flex

        return flex
    return {"sdpa": sdpa, "cudnn": cudnn, "matmul": matmul, "eager": eager}[name]
