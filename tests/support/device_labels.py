"""Several devices where there is one: `cpu:0`, `cpu:1`, ... are told apart, as if operands had to lie on the same one.

Memory is labelled by the device that it was asked for on. Tensors for which none was named (tables of the host, results
beside them) may be used everywhere. Vector code outside of PyTorch is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPUS = tuple(torch.device("cpu", number) for number in range(4))


class Move(NamedTuple):
    source: torch.device
    target: torch.device
    shape: tuple[int, ...]


class DeviceLabels(TorchDispatchMode):
    """Fails at any operation of tensors on different devices, but for copies, which it lists in `moves`."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self._labels: dict[int, tuple[torch.device, Any]] = {}  # by storage, which is kept so that no other gets its id

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._labels[storage._cdata] = device, storage

    def of(self, tensor: Tensor) -> torch.device | None:
        known = self._labels.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # in inference mode composite operations come as a whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        asked, name = kwargs.get("device"), func._schema.name.removeprefix("aten::")
        if name == "copy_" and (source := self.of(args[1])) is not None and (target := self.of(args[0])) is not None:
            if source != target:
                self.moves.append(Move(source, target, tuple(args[1].shape)))
            return func(*args, **kwargs)
        found = set(self._labelled((args, kwargs)))
        assert len(found) <= 1, f"{name}: operands on {sorted(map(str, found))}"
        out = func(*args, **kwargs)
        label = next(iter(found), None)
        if asked is not None and asked.index is not None:
            if label is not None and label != asked:
                self.moves.append(Move(label, asked, tuple(args[0].shape)))
            label = asked
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and label is not None and self.of(tensor) is None:
                self.put(tensor, label)
        return out

    def _labelled(self, arguments: Any) -> Iterator[torch.device]:
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor) and (label := self.of(tensor)) is not None:
                yield label
