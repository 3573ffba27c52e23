"""Weights larger than memory: reads mapped layers ahead of their use, and gives their memory back after it.

Weights stay mapped from the checkpoint's files and are never copied. A thread reads the next layer in while the present
one computes, and drops the one before. What stays in memory follows from `model.weights.residency` and not from the
system's page cache, which evicts what was used longest ago: in a cycle, always the page that is needed next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import TracebackType

from torch import nn

from model.transformer import Transformer
from model.weights.pages import Dropper, MappedRange, mapped_files, num_bytes, ranges_of, read_in, split
from model.weights.residency import LayerBytes, WeightResidency

ROUTED_TOKENS = 4
"""From so many routed tokens an expert on, nearly every expert has some, and layers are read as a whole."""


@dataclass(frozen=True)
class LayerRanges:
    """One layer's mapped weights: what every token multiplies, and the routed experts."""

    always: list[MappedRange]
    experts: list[MappedRange]

    @classmethod
    def of(cls, layer: nn.Module, files: list[MappedRange]) -> LayerRanges:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        routed = [tensor for name, tensor in tensors if ".experts." in name]
        others = [tensor for name, tensor in tensors if ".experts." not in name]
        return cls(ranges_of(others, files), ranges_of(routed, files))

    @property
    def num_bytes(self) -> LayerBytes:
        return LayerBytes(num_bytes(self.always), num_bytes(self.experts))

    def split(self, streamed: int) -> tuple[list[MappedRange], list[MappedRange]]:
        """What stays, and the `streamed` bytes that do not."""
        return split([*self.always, *self.experts], self.num_bytes.total - streamed)


class WeightStream:
    """Is told by the model which layer computes. To be closed, or to be used in a `with` statement.

    Reading a prompt, layers are read ahead as a whole. Generating, the few experts that are used are read by using
    them. What they take is estimated, and a layer for which there is no room is dropped after its use: those that stay
    are needed sooner.
    """

    moves_weights = False

    def __init__(
        self, layers: list[LayerRanges], residency: WeightResidency, *, expert_share: float, room: int
    ) -> None:
        """`expert_share`: of a layer's routed experts, that one token uses. `room`: bytes for generating, beside what
        stays."""
        self.residency = residency
        self._layers, self._room = layers, room
        parts = [layer.split(residency.streamed(number)) for number, layer in enumerate(layers)]
        self._kept, self._streamed = [kept for kept, _ in parts], [streamed for _, streamed in parts]
        self._cycle = [number for number in range(len(layers) - 1) if self._streamed[number]]
        self._first = [split(streamed, residency.ahead)[0] for streamed in self._streamed]
        self._is_whole = residency.ahead >= residency.streamed_a_layer  # are layers read ahead as a whole?
        self._fits = residency.kept + residency.streamed_a_layer <= (residency.budget or 0)
        self._expert_share = expert_share
        self._used = [0.0] * len(layers)  # bytes of the streamed part that generating has read, estimated
        self._ahead: set[int] = set()  # layers that are in memory as a whole, or will be
        self._seen: set[int] = set()  # layers whose kept part has been read
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_closing = False
        self._error: Exception | None = None  # that ended the thread
        self._dropper = Dropper()
        self._thread = threading.Thread(target=self._run, name="weight-stream", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, model: Transformer, budget: int | None) -> WeightStream | None:
        """For a model's mapped layers within `budget` bytes; None if they fit, or if none is mapped."""
        files = mapped_files()
        layers = [LayerRanges.of(layer, files) for layer in model.model.layers]
        residency = WeightResidency([layer.num_bytes for layer in layers], budget)
        if not residency.is_streamed:
            return None
        head = num_bytes(ranges_of([*model.lm_head.parameters(), *model.lm_head.buffers()], files))
        share = model.config.num_experts_per_tok / max(1, model.config.num_local_experts)
        return cls(layers, residency, expert_share=share, room=max(0, residency.peak - residency.kept - head))

    def entering(self, layer: int, tokens: int) -> None:
        """The layer computes next, for so many tokens. Raises what ended the thread."""
        if self._error is not None:
            raise self._error
        if not self._uses_whole_layers(tokens):
            return
        for number, used in enumerate(self._used):
            if used:
                self._drop(number)
        if layer in self._cycle and self._fits and not (self._is_whole and layer in self._ahead):
            self._ahead.add(layer)
            self._tasks.put(partial(self._read, layer, self._streamed[layer]))
        following = self._after(layer)
        if following is not None and self._first[following] and following not in self._ahead:
            self._ahead.add(following)
            self._tasks.put(partial(self._read, following, self._first[following]))

    def leaving(self, layer: int, tokens: int) -> None:
        """The layer has been computed."""
        if self._uses_whole_layers(tokens):
            self._ahead.discard(layer)
            self._drop(layer)
            return
        streamed = num_bytes(self._streamed[layer])
        experts = min(streamed, self._layers[layer].num_bytes.experts)
        used = max(self._used[layer], streamed - experts) + experts * min(1.0, tokens * self._expert_share)
        self._used[layer] = min(streamed, used)
        if sum(self._used) > self._room:
            self._drop(layer)

    def wait(self) -> None:
        """Until all that was begun is done."""
        done = threading.Event()
        self._tasks.put(done.set)
        done.wait()

    def close(self) -> None:
        """Ends the thread; what is mapped stays mapped."""
        self._is_closing = True
        self._tasks.put(None)
        self._thread.join()
        self._dropper.close()

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _uses_whole_layers(self, tokens: int) -> bool:
        return tokens * self._expert_share >= ROUTED_TOKENS

    def _after(self, layer: int) -> int | None:
        """The next layer of which something is streamed, that of the next prefill step after the last one."""
        return next((number for number in self._cycle if number > layer), self._cycle[0] if self._cycle else None)

    def _drop(self, layer: int) -> None:
        self._used[layer] = 0.0
        self._tasks.put(partial(self._dropper.drop, self._streamed[layer]))

    def _read(self, layer: int, wanted: list[MappedRange]) -> None:
        if layer not in self._seen:
            self._seen.add(layer)
            wanted = self._kept[layer] + wanted
        read_in(wanted, lambda: layer in self._ahead and not self._is_closing)

    def _run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None and not self._is_closing:
                task()
        except Exception as error:  # raised by the thread that computes
            self._error = error
