"""Streaming changes no number; layers are read ahead in time and dropped behind; its thread ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from model.weights import streaming
from model.weights.loading import load_checkpoint
from model.weights.pages import MappedRange
from model.weights.residency import WeightResidency
from model.weights.streaming import LayerRanges, WeightStream
from support.short_runs import run
from support.toy_checkpoints import Toys

only_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where files are mapped")


def streams() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "weight-stream"]


@only_on_linux
@pytest.mark.parametrize("name", ["scout", "maverick", "tied", "moe_none"])
@pytest.mark.parametrize("budget", [0, 20_000, 100_000])
def test_streaming_changes_nothing(toys: Toys, name: str, budget: int) -> None:
    model = load_checkpoint(toys(name, 0.25).folder)
    expected = run(model)
    stream = WeightStream.of(model, budget)
    assert stream is not None and streams()
    with stream:
        model.watcher = stream
        assert torch.equal(run(model), expected)
    assert not streams()


@only_on_linux
def test_no_thread_runs_where_all_layers_fit_or_none_is_mapped(toys: Toys) -> None:
    model = load_checkpoint(toys("scout", 0.25).folder)
    assert WeightStream.of(model, None) is None
    assert WeightStream.of(model, 2**30) is None
    assert WeightStream.of(load_checkpoint(toys("scout", 0.25).folder, is_mapped=False), 0) is None
    assert not streams()


class Recorded:
    """A stream over four layers whose pages are only written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
        self.done: list[tuple[str, int]] = []
        monkeypatch.setattr(streaming, "read_in", lambda ranges, wanted: wanted() and self._record("read", ranges))
        monkeypatch.setattr(streaming.Dropper, "drop", lambda _, ranges: self._record("drop", ranges))
        layers = [
            LayerRanges(
                [MappedRange(1000 * n, 100, "", 1, 0)],
                [MappedRange(1000 * n + 100, 800, "", 1, 0)],
            )
            for n in range(4)
        ]
        residency = WeightResidency([layer.num_bytes for layer in layers], budget)
        self.stream = WeightStream(layers, residency, expert_share=1 / 8, room=residency.peak - residency.kept)

    def forward(self, tokens: int) -> list[tuple[str, int]]:
        """What one forward of so many tokens has read and dropped, as layers, in order."""
        self.done.clear()
        for layer in range(4):
            self.stream.entering(layer, tokens)
            self.stream.wait()
            self.stream.leaving(layer, tokens)
            self.stream.wait()
        return list(self.done)

    def _record(self, what: str, ranges: Iterable[MappedRange]) -> None:
        ranges = list(ranges)
        if ranges:
            self.done.append((what, ranges[-1].address // 1000))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    recorded = Recorded(monkeypatch, 2400)
    yield recorded
    recorded.stream.close()


def test_each_layer_is_read_before_its_use_and_dropped_after_it(recorded: Recorded) -> None:
    first, second = recorded.forward(100), recorded.forward(100)
    assert first == [
        ("read", 0), ("read", 1), ("drop", 0), ("read", 2), ("drop", 1), ("read", 0), ("drop", 2), ("drop", 3),
    ]  # fmt: skip
    assert second == first[1:]  # layer 0 is there since the end of the first step


def test_half_of_the_next_layer_is_read_ahead_where_two_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, 1350)
    first, second = recorded.forward(100), recorded.forward(100)
    assert first[:5] == [("read", 0), ("read", 1), ("drop", 0), ("read", 1), ("read", 2)]
    assert second[0] == ("read", 0)  # its other half
    recorded.stream.close()


def test_a_layer_larger_than_the_budget_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, 800)
    assert recorded.forward(100) == [("drop", layer) for layer in range(4)]
    recorded.stream.close()


def test_generating_reads_nothing_ahead_and_stays_within_the_room(recorded: Recorded) -> None:
    """300 bytes of layers 0 to 2 are streamed, 900 of the last; the room is 600; a token uses an eighth of experts."""
    steps = [recorded.forward(1) for _ in range(4)]
    assert steps == [[], [], [("drop", 2), ("drop", 3)], []]


def test_reading_after_generating_drops_what_that_has_used(recorded: Recorded) -> None:
    recorded.forward(1)
    done = recorded.forward(100)
    assert done[:6] == [("drop", 0), ("drop", 1), ("drop", 2), ("drop", 3), ("read", 0), ("read", 1)]


def test_an_error_in_a_layer_leaves_a_stream_that_can_go_on(recorded: Recorded) -> None:
    recorded.stream.entering(0, 100)
    recorded.stream.entering(1, 100)  # and layer 0 was never left
    assert [entry for entry in recorded.forward(100) if entry[0] == "drop"] == [("drop", n) for n in range(4)]


def test_closing_ends_a_thread_that_is_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def endless(ranges: object, is_wanted: Callable[[], bool]) -> None:
        started.set()
        while is_wanted():
            pass

    recorded = Recorded(monkeypatch, 2400)
    monkeypatch.setattr(streaming, "read_in", endless)
    recorded.stream.entering(0, 100)
    started.wait()
    recorded.stream.close()
    assert not streams()
