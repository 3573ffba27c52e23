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
    """On a CPU only Triton's interpreter, for tests, which TRITON_INTERPRET=1 switches on.

    On a GPU a kernel is compiled to find out, once a process: half a second the first time, and then from Triton's
    cache. PyTorch's operations do the work where it fails.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if torch.version.hip is not None or not torch.cuda.is_available():  # the device is a stand-in
        return False
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    try:
        from model.gpu.probe import runs  # here: it imports Triton

        return runs(device)
    except Exception:  # no compiler, an old driver, a cache folder that cannot be written: whatever it is
        return False
