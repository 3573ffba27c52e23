"""Models on a GPU that does not exist: shapes, dtypes and devices are real, numbers are not.

A CPU build of torch has no devices to fake.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.quantization import tables
from model.quantization.form import StoredMatrix
from model.weights.transport import Copies

CUDA = torch.device("cuda", 0)


def needs_cuda_build() -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not torch.backends.cuda.is_built(), reason="a CPU build of torch has no devices to fake: install the CUDA build"
    )


class FakeTransport:
    """Copies at once: shapes, dtypes and sides are checked. `finished` counts how often the host waits."""

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device
        self.sent = self.finished = 0

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        return self.host_memory(num_bytes)

    def send(self, copies: Copies, *after: Any) -> int:
        sides = {(target.device.type, source.device.type) for target, source in copies}
        assert sides in ({("cuda", "cpu")}, {("cpu", "cuda")}), sides
        for target, source in copies:
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            target.copy_(source, non_blocking=True)
        self.sent += 1
        return self.sent

    def mark(self, handed_back: Tensor | None = None) -> int:
        return 0

    def wait(self, event: int) -> None:
        pass

    def finish(self, event: int) -> None:
        self.finished += 1

    def close(self) -> None:
        pass


class FakeMilestone:
    """Counts how many were set, and at how many the host waited for each. Use a subclass for each walk."""

    begun = 0
    waits: ClassVar[list[tuple[int, int]]]  # number of the milestone, and of those set when the host waited for it

    def __init_subclass__(cls) -> None:
        cls.waits = []

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA
        self.number = type(self).begun
        type(self).begun += 1

    def wait(self) -> None:
        self.waits.append((self.number, type(self).begun))


class AtOnce(Executor):
    """Does what it is given while it is given it."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **options))
        return done


class FakeRows:
    """Rows on a disk that holds nothing."""

    is_durable = False

    def __init__(self) -> None:
        self.written, self.read_units = list[int](), list[str]()

    def write(self, row: int, units: Any) -> Any:
        assert all(tensor.device.type == "cpu" for tensors in units.values() for _, tensor in tensors)
        self.written.append(row)
        return self

    def read(self, name: str, into: object) -> None:
        self.read_units.append(name)


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
    to_fake(model, mode, CUDA)


def to_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device | str) -> None:
    """Replaces every weight by a fake one on this device, with the strides that it had."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        if isinstance(module, StoredMatrix):
            module.forget_operand()
