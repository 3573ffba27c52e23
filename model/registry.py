"""The attention backends by the names that users give."""

from __future__ import annotations

from model.backends import Backend, eager
from model.fused import sdpa
from model.products import matmul


def backend(name: str) -> Backend:
    """The backend of that name, one of model.config.BACKEND_NAMES."""
    if name == "flex":
        from model.flex import flex

        return flex
    return {"sdpa": sdpa, "matmul": matmul, "eager": eager}[name]
