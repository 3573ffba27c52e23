"""Which of a process's devices computes which layers. Whole layers: attention and experts do not know of it.

Hidden states move where a layer is on another device than the one before it (see `model.transformer`). Which layers go
where is decided elsewhere. Not run on two GPUs yet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Spread:
    """Embeddings are with the first layer. Norm and output matrix are with the last one, or with the embeddings where
    they are the same weights."""

    layers: tuple[torch.device, ...]  # of each layer, in order
    is_tied: bool = False

    @property
    def first(self) -> torch.device:
        return self.layers[0]

    @property
    def last(self) -> torch.device:
        return self.layers[-1]

    @property
    def head(self) -> torch.device:
        return self.first if self.is_tied else self.last

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each once, in the order of the layers."""
        return tuple(dict.fromkeys(self.layers))

    def begins(self, layer: int) -> bool:
        """Whether hidden states have to move before this layer."""
        return layer > 0 and self.layers[layer] != self.layers[layer - 1]

    def computing(self, layer: int) -> AbstractContextManager[object]:
        """Makes the layer's device CUDA's current one, which is where kernels of our own are launched."""
        return current(self.layers[layer])

    def of_weight(self, name: str) -> torch.device:
        """`name`: in Transformer."""
        if (layer := _LAYER.match(name)) is not None:
            return self.layers[int(layer[1])]
        return self.first if name.startswith("model.embed_tokens") else self.head

    def divided(self, named: Iterable[tuple[str, _T]]) -> Iterator[tuple[torch.device, dict[str, _T]]]:
        """What belongs to the weights of these names, by device."""
        found: dict[torch.device, dict[str, _T]] = {}
        for name, what in named:
            found.setdefault(self.of_weight(name), {})[name] = what
        yield from found.items()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes it CUDA's current device, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
