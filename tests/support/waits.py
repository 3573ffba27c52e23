"""Notices what would make the host wait for a GPU: reading numbers, and shapes that depend on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique_dim",
    "_unique2",
}


class NoWaits(TorchDispatchMode):
    """Fails at any operation that waits for `device_type`, of which the tensors may be fakes; the CPU may stand in.

    Copies between a GPU and host memory must not block.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "aten":
            with self:  # in inference mode composite operations come as a whole
                decomposed = func.decompose(*args, **(kwargs or {}))
            if decomposed is not NotImplemented:
                return decomposed
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        is_there = any(isinstance(x, Tensor) and x.device.type == self._device_type for x in args)
        if is_there and (name in WAITING or f"{name}.{overload}" in WAITING):
            raise AssertionError(f"the host waits for the device at {name}")
        if is_there and name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("the host waits for the device at an index of booleans")
        out = func(*args, **(kwargs or {}))
        if name in ("copy_", "_to_copy"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            is_blocking = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if is_blocking and {source.device.type, target.device.type} == {"cpu", "cuda"}:
                raise AssertionError(f"the host waits for the device at {name} from {source.device} to {target.device}")
        return out
