"""Models on a GPU that does not exist: shapes, dtypes and devices are real, numbers are not.

A CPU build of torch has no devices to fake.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.quantization import tables
from model.quantization.form import StoredMatrix

CUDA = torch.device("cuda", 0)


def needs_cuda_build() -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not torch.backends.cuda.is_built(), reason="a CPU build of torch has no devices to fake: install the CUDA build"
    )


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """What is made within are fakes. Tables that are kept for a process are forgotten before and after."""
    cached = [x for x in vars(tables).values() if isinstance(x, functools._lru_cache_wrapper)]
    try:
        for table in cached:
            table.cache_clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        for table in cached:
            table.cache_clear()


def to_fake_cuda(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces every weight by a fake one on the device, with the strides that it had."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        if isinstance(module, StoredMatrix):
            module.forget_operand()
