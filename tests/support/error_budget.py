"""Limits the error of a float32 result to a few times that of the float32 reference itself.

Errors are relative to the reference computed in float64. The float32 reference's error is measured for each case on the
processor that runs the tests, so that no limit is tuned to a processor, a library or a thread count.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)

FACTOR = 4.0
"""Two correct orders of summation differ by such a factor in their largest error: 2.3 at most over all toys."""

FLOOR = 4 * torch.finfo(torch.float32).eps
"""Of the largest number: an error below it is luck, and no measure for another order."""

UNFIT = 3e-5
"""Of the largest number: a reference that is off by more is none, and a multiple of it would excuse anything."""

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class InFloat64(TorchFunctionMode):
    """A context in which explicit requests for float32 (norms, phases, softmax) get float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*(_wider(arg) for arg in args), **{name: _wider(arg) for name, arg in (kwargs or {}).items()})


def _wider(argument: Any) -> Any:
    return WIDER.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def in_float64(module: Module, run: Callable[[Module], Tensor]) -> Tensor:
    """The result of `run` on a float64 copy of the module, computed entirely in float64; the module is unchanged."""
    twin = copy.deepcopy(module).double()
    with torch.no_grad(), InFloat64():
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RotaryEmbedding"):  # from `transformers`: its phases were float32
                    assert "config" in inspect.signature(type(child)).parameters
                    setattr(parent, name, type(child)(config=child.config))
        result = run(twin)
    assert result.dtype == torch.float64, "something was computed in float32 after all"
    return result


def difference(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest exact number. NaN if there is one, which exceeds every limit."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    return ((ours - exact).abs().max() / exact.abs().max()).item()


def limit(exact: Tensor, *references: Tensor) -> float:
    """The largest allowed `difference` from `exact`, given float32 references of the same numbers."""
    assert exact.dtype == torch.float64 and all(reference.dtype == torch.float32 for reference in references)
    return limit_by(*(difference(reference, exact) for reference in references))


def limit_by(*errors: float) -> float:
    """The same, given the errors themselves."""
    assert errors and all(error <= UNFIT for error in errors), errors
    return FACTOR * max(FLOOR, *errors)
