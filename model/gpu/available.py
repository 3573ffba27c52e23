"""Whether Triton, which the CUDA builds of torch bring, can compile kernels for a device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

MIN_CAPABILITY = (8, 0)
"""bfloat16 products."""


@functools.cache
def has_triton(device: torch.device) -> bool:
    """On a CPU only Triton's interpreter, for tests, which TRITON_INTERPRET=1 switches on."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
