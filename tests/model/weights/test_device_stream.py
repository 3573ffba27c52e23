"""Copying weights to a device changes no number; two buffers are enough; failures leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights import device_stream
from model.weights.device_stream import DeviceStream
from model.weights.loading import load_checkpoint
from model.weights.owners import Owner
from model.weights.residency import DeviceResidency, LayerBytes
from model.weights.tiers import DEVICE, MEMORY, held_bytes
from support.short_runs import run
from support.toy_checkpoints import Toys
from support.transports import LateTransport, UnrulyTransport


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_stream, "PIECE_BYTES", 1000)
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weight-copies")]


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the last bits: on some processors they depend on where in memory a weight begins."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def budget_for(model: Transformer, share: float) -> int:
    """Bytes between the least and all."""
    with DeviceStream(model, LateTransport(), None, is_pinned=False) as stream:
        layers = stream.residency.layers
    least = DeviceResidency(layers, 0).peak
    return round(least + share * (sum(layer.total for layer in layers) - 1 - least))


@pytest.mark.parametrize("name", ["scout", "maverick", "tied", "moe_none"])
@pytest.mark.parametrize("share", [0, 0.4, 1])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_copying_changes_nothing(toys: Toys, name: str, share: float, is_pinned: bool) -> None:
    model = load_checkpoint(toys(name, 0.25).folder)
    expected, budget = run(model), budget_for(model, share)
    transport = LateTransport()
    with DeviceStream(model, transport, budget, is_pinned=is_pinned) as stream:
        model.watcher = stream
        check_equal(run(model), expected)
        check_equal(run(model), expected)
        residency = stream.residency
        assert residency.is_streamed and residency.peak <= max(budget, DeviceResidency(residency.layers, 0).peak)
        assert stream.buffer_bytes == residency.buffers
        assert transport.host_bytes == (residency.copied_a_pass if is_pinned else 0)
        assert transport.in_flight <= 2
    assert transport.is_closed


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_copies_changes_nothing(toys: Toys, seed: int) -> None:
    model = load_checkpoint(toys("scout", 0.25).folder)
    expected = run(model)
    with DeviceStream(model, UnrulyTransport(seed), budget_for(model, seed / 4), is_pinned=True) as stream:
        model.watcher = stream
        check_equal(run(model), expected)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_are_copied_as_they_are_stored(toys: Toys, kind: str, dtype: str) -> None:
    model = load_checkpoint(toys("scout", 0.25).folder, dtype=dtype, quantization=Quantization.parse(kind))
    expected, budget = run(model), budget_for(model, 0.3)
    with DeviceStream(model, LateTransport(), budget, is_pinned=True) as stream:
        model.watcher = stream
        check_equal(run(model), expected)


def test_where_all_fits_nothing_is_copied(toys: Toys) -> None:
    model, transport = load_checkpoint(toys("scout", 0.25).folder), LateTransport()
    expected = run(model)
    with DeviceStream(model, transport, 2**30, is_pinned=True) as stream:
        model.watcher = stream
        check_equal(run(model), expected)
        assert not transport.sent and stream.buffer_bytes == transport.host_bytes == 0


def test_each_layer_is_copied_once_a_pass_in_order(toys: Toys) -> None:
    model, transport = load_checkpoint(toys("scout", 0.25).folder), LateTransport()
    with DeviceStream(model, transport, 0, is_pinned=True) as stream:
        layers = len(stream.residency.layers)
        assert stream._order == list(range(layers))
        number = {id(copies): layer for layer in range(layers) for copies in stream._layers[layer].copies}
        model.watcher = stream
        for passes in (1, 2):
            model(torch.arange(9)[None])
            stream._copier.submit(int).result()  # what was begun is sent
            sent = [number[id(copies)] for copies, _ in transport.sent]
            assert sent == [n % layers for n in range(passes * layers + 2)]  # the next two are on their way
        afters = [after for _, after in transport.sent]
        assert afters == [(), (), *((n,) for n in range(len(afters) - 2))]  # each overwrites the layer before the last


def test_two_layers_of_the_buffers_stay_in_them(toys: Toys) -> None:
    """Where only two are streamed, they are copied once."""
    model, transport = load_checkpoint(toys("scout", 0.25).folder), LateTransport()
    stream = DeviceStream(model, transport, 0, is_pinned=True)
    with stream:
        stream._order = stream._order[:2]
        for _ in range(3):
            for layer in stream._order:
                stream.entering(layer, 1)
                stream.leaving(layer, 1)
    assert len(transport.sent) == 2


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_forward_that_fails_leaves_nothing_behind(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    model, transport = load_checkpoint(toys("scout", 0.25).folder), LateTransport()
    expected = run(model)
    with DeviceStream(model, transport, 0, is_pinned=is_pinned) as stream:
        model.watcher = stream
        for layer in (0, 3, len(model.model.layers) - 1):
            with monkeypatch.context() as patched:
                patched.setattr(model.model.layers[layer], "forward", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    run(model)
            check_equal(run(model), expected)
        transport.fails_at = len(transport.sent) + 3
        with pytest.raises(OSError, match="unreadable"):
            run(model)
        check_equal(run(model), expected)


def test_where_weights_are(toys: Toys) -> None:
    """Between forwards, streamed layers hold no data on the device."""
    model = load_checkpoint(toys("scout", 0.25).folder)
    before = held_bytes([model])
    budget = budget_for(model, 0.5)
    with DeviceStream(model, LateTransport(), budget, is_pinned=True) as stream:
        model.watcher = stream
        run(model)
        held, residency = held_bytes([model]), stream.residency
        meta = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.device.type == "meta")
        assert meta == pytest.approx(residency.copied_a_pass, rel=0.01) and meta > 0
        assert sum(held.values()) == sum(before.values()) and held[Owner.ROUTED, MEMORY] >= meta
        assert not any(tier == DEVICE for _, tier in held)  # the stand-in's device is the CPU


SCOUT = [LayerBytes(400, 4400)] * 6
MAVERICK = [LayerBytes(600), LayerBytes(400, 32000)] * 4


@pytest.mark.parametrize("layers", [SCOUT, MAVERICK, [LayerBytes(7)], [LayerBytes(5, 3)] * 2])
def test_what_stays_on_the_device(layers: list[LayerBytes]) -> None:
    total, copied = sum(layer.total for layer in layers), 2**62
    assert not DeviceResidency(layers).is_streamed and not DeviceResidency(layers, total).is_streamed
    least = DeviceResidency(layers, 0)
    for budget in range(0, total, max(1, total // 97)):
        residency = DeviceResidency(layers, budget)
        streamed = [residency.streamed(number) for number in range(len(layers))]
        assert residency.is_streamed and residency.kept + residency.copied_a_pass == total
        assert residency.copied_a_pass == sum(layer.total for layer in streamed)
        assert residency.buffers <= 2 * max(layer.total for layer in streamed)
        assert residency.peak <= budget or residency.peak == least.peak > budget
        if residency.peak <= budget:
            assert residency.copied_a_pass <= copied
            copied = residency.copied_a_pass
        if any(layer.always for layer in streamed):
            assert all(part.experts == layer.experts for part, layer in zip(streamed, layers, strict=True))
