"""Weights larger than a device's memory: the next layer is copied to the device while the present one computes.

What stays on the device follows from `model.weights.residency`. The rest lies in pinned host memory, or in the mapped
files, and goes through two buffers. Which stream copies and what waits for what is behind `Transport`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.quantization.form import StoredMatrix
from model.transformer import Transformer
from model.weights.owners import Owner, owner_of
from model.weights.residency import DeviceResidency, LayerBytes
from model.weights.transport import Copies, Transport

ALIGNMENT = 256
"""Bytes: tensors in a buffer begin at multiples, as in memory that the device's allocator returns."""

PIECE_BYTES = 2**26
"""Pinned memory is taken in pieces of this size: the allocator rounds each up to a power of two."""


class Place(NamedTuple):
    """Where a module has a tensor, and the part of the model that it belongs to."""

    module: nn.Module
    name: str
    owner: Owner

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    def set(self, tensor: Tensor) -> None:
        tensors: dict[str, Any] = self.module._parameters if self._is_parameter else self.module._buffers
        tensors[self.name] = tensor
        if isinstance(self.module, StoredMatrix):
            self.module.forget_operand()

    def like(self, tensor: Tensor) -> Tensor:
        """The tensor as this place holds it."""
        return nn.Parameter(tensor, requires_grad=False) if self._is_parameter else tensor

    @property
    def _is_parameter(self) -> bool:
        return self.name in self.module._parameters


class HostMemory:
    """Bytes without gaps in pieces of equal size."""

    def __init__(self, size: int, transport: Transport) -> None:
        self._piece_bytes = PIECE_BYTES
        self._pieces = [
            transport.host_memory(min(self._piece_bytes, size - start)) for start in range(0, size, self._piece_bytes)
        ]

    def parts(self, start: int, stop: int) -> Iterator[Tensor]:
        """Bytes start .. stop - 1, in order."""
        while start < stop:
            number, first = divmod(start, self._piece_bytes)
            last = min(self._piece_bytes, first + stop - start)
            yield self._pieces[number][first:last]
            start += last - first


@dataclass(eq=False)
class StreamedLayer:
    """The part of a layer that does not stay on the device."""

    places: list[Place]
    on_host: list[Tensor]  # what the places hold while the layer does not compute
    on_device: list[list[Tensor]]  # in each buffer
    copies: list[Copies]  # into each buffer


@dataclass(eq=False)
class Buffer:
    data: Tensor  # (size,) in uint8
    layer: int | None = None  # that it holds, or will hold once it has `arrived`
    arrived: Future[Any] | None = None
    done: tuple[Any, ...] = ()  # the event of the end of the last layer's computing, if there was one


class DeviceStream:
    """Puts a model on a device, and is told by it which layer computes. To be closed, or used in a `with` statement.

    Between forwards, streamed places hold what is on the host, so that a layer never computes with another's weights.
    After a forward that failed, the next one starts with whatever the buffers hold.
    """

    moves_weights = True

    def __init__(self, model: Transformer, transport: Transport, budget: int | None, *, is_pinned: bool) -> None:
        """`budget`: bytes for the layers' weights but norms, biases and routers, and for the buffers. With
        `is_pinned`, host memory holds what is streamed; otherwise it stays where the model has it."""
        self._transport = transport
        layers = [list(_layer_places(layer, number)) for number, layer in enumerate(model.model.layers)]
        self.residency = DeviceResidency([_layer_bytes(places) for places in layers], budget)
        streamed = [_streamed(places, self.residency.streamed(number)) for number, places in enumerate(layers)]
        self._order = [number for number, places in enumerate(streamed) if places]
        on_host = {id(place.tensor) for places in streamed for place in places}
        _move([place for place in _places(model) if id(place.tensor) not in on_host], transport.device)
        sizes = [_layer_bytes(streamed[number]).total for number in self._order]
        self._buffers = [
            Buffer(torch.empty(max(sizes), dtype=torch.uint8, device=transport.device))
            for _ in range(min(DeviceResidency.BUFFERS, len(sizes)))
        ]
        self._host = HostMemory(sum(sizes) if is_pinned else 0, transport)
        starts = [sum(sizes[:n]) if is_pinned else None for n in range(len(sizes))]
        self._layers = {
            number: self._prepared(streamed[number], start) for number, start in zip(self._order, starts, strict=True)
        }
        self._computing: Buffer | None = None
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-copies")

    @property
    def buffer_bytes(self) -> int:
        """On the device."""
        return sum(buffer.data.nbytes for buffer in self._buffers)

    def entering(self, layer: int, tokens: int) -> None:
        """The layer computes next."""
        self._leave()  # only after a forward that failed
        if layer not in self._layers:
            if self._order:
                self._fetch([self._after(layer)])
            return
        self._fetch([layer, self._after(layer)])
        buffer = next(buffer for buffer in self._buffers if buffer.layer == layer)
        assert buffer.arrived is not None
        try:
            self._transport.wait(buffer.arrived.result())
        except BaseException:
            if buffer.arrived.done():
                buffer.layer = None  # it has arrived in part, or not at all: the next forward copies it again
            raise
        self._computing = buffer
        _bind(self._layers[layer].places, self._layers[layer].on_device[self._buffers.index(buffer)])

    def leaving(self, layer: int, tokens: int) -> None:
        """The layer has been computed, or what computes it has been begun."""
        if layer in self._layers:
            self._leave()
            following = self._after(layer)
            self._fetch([following, self._after(following)])

    def close(self) -> None:
        """Ends the thread and waits for copies. The model cannot compute any more."""
        self._leave()
        self._copier.shutdown(cancel_futures=True)
        self._transport.close()

    def __enter__(self) -> DeviceStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepared(self, places: list[Place], start: int | None) -> StreamedLayer:
        """A layer's streamed part. Moves it to host memory from byte `start` on, unless it is None."""
        offsets, size = _offsets(places)
        sources, on_host = [place.tensor for place in places], [place.tensor for place in places]
        buffers = [buffer.data for buffer in self._buffers]
        views = [[_view(data[at:], source) for at, source in zip(offsets, sources, strict=True)] for data in buffers]
        copies: list[Copies] = [list(zip(targets, sources, strict=True)) for targets in views]
        if start is not None:
            for number, (place, at) in enumerate(zip(places, offsets, strict=True)):
                self._write(start + at, place.tensor)
                on_host[number] = place.like(torch.empty_like(place.tensor, device="meta"))
                place.set(on_host[number])
            copies = [list(self._parts(data, start, size)) for data in buffers]
        on_device = [[place.like(view) for place, view in zip(places, targets, strict=True)] for targets in views]
        return StreamedLayer(places, on_host, on_device, copies)

    def _write(self, start: int, tensor: Tensor) -> None:
        """To host memory from byte `start` on, in the order in which the device has it."""
        dense = tensor.detach()
        if dense.stride() != _strides(tensor):
            dense = torch.empty_like(dense).copy_(dense)
        data = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        for part in self._host.parts(start, start + data.nbytes):
            part.copy_(data[: part.nbytes])
            data = data[part.nbytes :]

    def _parts(self, target: Tensor, start: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._host.parts(start, start + size):
            yield target[: part.nbytes], part
            target = target[part.nbytes :]

    def _after(self, layer: int) -> int:
        """The next layer of which something is streamed, that of the next pass after the last one."""
        return next((number for number in self._order if number > layer), self._order[0])

    def _fetch(self, wanted: list[int]) -> None:
        """Begins to copy those of the layers, at most as many as there are buffers, that no buffer holds."""
        for layer in wanted:
            if any(buffer.layer == layer for buffer in self._buffers):
                continue
            buffer = next(buffer for buffer in self._buffers if buffer.layer not in wanted)
            copies = self._layers[layer].copies[self._buffers.index(buffer)]
            buffer.layer, buffer.arrived = layer, self._copier.submit(self._transport.send, copies, *buffer.done)

    def _leave(self) -> None:
        """The layer that computes is done with its buffer, once the device gets there."""
        buffer, self._computing = self._computing, None
        if buffer is not None and buffer.layer is not None:
            buffer.done = (self._transport.mark(buffer.data),)
            _bind(self._layers[buffer.layer].places, self._layers[buffer.layer].on_host)


def _places(model: nn.Module, prefix: str = "") -> Iterator[Place]:
    for path, module in model.named_modules(prefix=prefix):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield Place(module, name, owner_of(path if isinstance(module, StoredMatrix) else f"{path}.{name}"))


def _layer_places(layer: nn.Module, number: int) -> Iterator[Place]:
    """All but norms, biases and routers, which are small."""
    return (place for place in _places(layer, f"model.layers.{number}") if place.owner is not Owner.SMALL)


def _streamed(places: list[Place], part: LayerBytes) -> list[Place]:
    """Those in the units of which the part has some bytes."""
    return [place for place in places if (part.experts if place.owner is Owner.ROUTED else part.always)]


def _offsets(places: Iterable[Place]) -> tuple[list[int], int]:
    """Where each tensor begins in a buffer, and where the last one ends."""
    offsets, end = [], 0
    for place in places:
        offsets.append(end)
        end += -(-place.tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _layer_bytes(places: list[Place]) -> LayerBytes:
    """With what alignment takes."""
    experts = [place for place in places if place.owner is Owner.ROUTED]
    others = [place for place in places if place.owner is not Owner.ROUTED]
    return LayerBytes(_offsets(others)[1], _offsets(experts)[1])


def _move(places: list[Place], device: torch.device) -> None:
    """Tied weights stay tied."""
    moved: dict[int, Tensor] = {}
    kept = [place.tensor for place in places]  # so that no other tensor gets the id of one
    for place, tensor in zip(places, kept, strict=True):
        if id(tensor) not in moved:
            moved[id(tensor)] = place.like(tensor.detach().to(device))
        place.set(moved[id(tensor)])


def _bind(places: Iterable[Place], tensors: Iterable[Tensor]) -> None:
    for place, tensor in zip(places, tensors, strict=True):
        place.set(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those without gaps that a copy of the tensor has."""
    return torch.empty_like(tensor, device="meta").stride()


def _view(data: Tensor, like: Tensor) -> Tensor:
    """The beginning of `data`, bytes on a device, as a tensor that is like another one."""
    return data[: like.nbytes].view(like.dtype).as_strided(like.shape, _strides(like))
