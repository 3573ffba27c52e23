"""Where a model's weights are held: mapped from files, in memory, or on a device, by owner.

Tensors without data, on the meta device, stand for weights in host memory that `model.weights.device_stream` copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.spread import Spread
from model.weights.owners import Owner, owner_of
from model.weights.pages import MappedRange, mapped_files, ranges_of

MAPPED, MEMORY, DEVICE = "mapped", "memory", "device"


def held_bytes(models: Iterable[nn.Module]) -> dict[tuple[Owner, str], int]:
    """Bytes of parameters and buffers, by owner and tier; tied ones count once."""
    files, found = mapped_files(), Counter[tuple[Owner, str]]()
    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found[owner_of(name), _tier(tensor, files)] += tensor.nbytes
    return dict(found)


def bytes_by_device(model: nn.Module, spread: Spread) -> dict[torch.device, int]:
    """Bytes of parameters and buffers on each of several devices; tied ones count once."""
    found = dict.fromkeys(spread.devices, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[spread.of_weight(name)] += tensor.nbytes
    return found


def _tier(tensor: Tensor, files: list[MappedRange]) -> str:
    if tensor.device.type == "meta":
        return MEMORY
    if tensor.device.type != "cpu":
        return DEVICE
    return MAPPED if ranges_of([tensor], files) else MEMORY
