"""The path over a GPU walked without one: no error, and no wait of the host but for the step before."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

import cache.layout
import cache.tiers
import l4ctx.engine.prefill
import model.moe
import model.rope
import model.spread
import model.transformer
import model.weights.device_stream
from cache.chunked import ChunkedKVCache
from cache.hybrid import HybridKVCache
from cache.residency import Residency, held_bytes
from l4ctx.engine.prefill import as_batch, prefill
from model.kernels.masks import AttentionMask
from model.quantization.choice import Quantization
from model.spread import Spread
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.weights.device_stream import DeviceStream
from model.weights.loading import load_checkpoint, load_vision
from support.fake_cuda import (
    CUDA,
    AtOnce,
    FakeMilestone,
    FakeRows,
    FakeTransport,
    fake_cuda,
    needs_cuda_build,
    to_fake,
    to_fake_cuda,
)
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, VISION, Kind, write_kind
from support.waits import NoWaits

pytestmark = [pytest.mark.fake_cuda, needs_cuda_build()]
KINDS = {
    "scout": DIVISIBLE | SCOUT,
    "maverick": DIVISIBLE | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, (name, changes) in enumerate(KINDS.items()):
        found[name] = tmp_path_factory.mktemp(name)
        write_kind(found[name], name, Kind(changes, dtype=torch.bfloat16), 0.25, seed)
    return found


@pytest.fixture(autouse=True)
def _new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernels multiply by groups: to ask a GPU that does not exist fails."""
    monkeypatch.setattr(model.moe, "has_kernel", lambda device: device.type == "cuda")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes of one mode cannot be used by several threads."""
    for module in (cache.tiers, model.weights.device_stream):
        monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)


def walked(loaded: Transformer, kept: HybridKVCache, length: int, *, answers_wait: bool = False) -> None:
    """Prefill in chunks and two single tokens, whose logits have the right shape, dtype and device.

    In prefill, the host waits for the end of the step before the one that it has just begun, and for nothing else.
    """
    ids = [7] * length

    class Ends(FakeMilestone):
        pass

    with pytest.MonkeyPatch.context() as patch, NoWaits("cuda"):
        patch.setattr(l4ctx.engine.prefill, "Milestone", Ends)
        steps = [step.step for step in prefill(loaded, kept, ids, prefill_chunk_size=2 * CHUNK)]
    count = len(steps)
    assert count >= length // (2 * CHUNK) and kept.offset == length
    assert Ends.waits == [(number, min(number + 2, count)) for number in range(count)]
    with contextlib.nullcontext() if answers_wait else NoWaits("cuda"):
        for _ in range(2):
            logits = loaded(as_batch(ids[:1], CUDA), kept, logits="last")
            assert logits is not None and logits.device == CUDA
            assert logits.shape == (1, 1, loaded.config.vocab_size) and logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "matmul", "eager"])
def test_on_the_device(folders: dict[str, Path], name: str, attention: str) -> None:
    loaded = load_checkpoint(folders[name], attention=attention)
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        everything = Residency(None, 99, on_accelerator=True)
        kept = HybridKVCache(
            loaded.config,
            length=80,
            dtype=loaded.dtype,
            device=CUDA,
            residency=everything,
            transport=FakeTransport(),
        )
        walked(loaded, kept, 61)


@pytest.mark.parametrize("name", KINDS)
def test_on_two_devices(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and a step of the answer, with blocks that stay on either and blocks that pass through.

    No driver is there to make a device the current one.
    """
    monkeypatch.setattr(model.spread, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(model.transformer, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cache.tiers, "stays_on_host", lambda layout, queries: False)
    monkeypatch.setattr(cache.layout, "MIN_BLOCK_BYTES", 1)
    loaded = load_checkpoint(folders[name])
    devices = (CUDA, torch.device("cuda", 1))
    with fake_cuda() as mode:
        loaded.spread = spread = Spread((devices[0],) * 2 + (devices[1],) * 2)
        for number, layer in enumerate(loaded.model.layers):
            to_fake(layer, mode, spread.layers[number])
        to_fake(loaded.model.embed_tokens, mode, spread.first)
        for module in (loaded.model.norm, loaded.lm_head):
            to_fake(module, mode, spread.head)
        kept = HybridKVCache(
            loaded.config,
            length=80,
            dtype=loaded.dtype,
            residency=Residency(None, 1, on_accelerator=True),
            devices=spread.layers,
            transports={device: FakeTransport(device) for device in devices},
        )
        with NoWaits("cuda"):
            for start in range(0, 60, 2 * CHUNK):
                loaded(as_batch([7] * min(2 * CHUNK, 60 - start), CUDA), kept, logits="none")
        logits = loaded(as_batch([7], CUDA), kept, logits="last")
        assert logits is not None and logits.device == devices[1] and kept.offset == 61
        for layer, device in zip(kept.layers, spread.layers, strict=True):
            if isinstance(layer, ChunkedKVCache):
                assert layer.window.keys.device == device
            else:
                assert {block.keys.device for block in layer.open.values()} == {device}


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "float16"])
@pytest.mark.parametrize(("device_rows", "host_rows"), [(0, None), (1, None), (1, 1), (0, 0)])
def test_tiers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kv_dtype: str, device_rows: int, host_rows: int | None
) -> None:
    """Segments pass through the ring; the host waits only for what it writes to disk, and for buffers that it reads
    into again."""
    loaded = load_checkpoint(folders["scout"])
    monkeypatch.setattr(cache.tiers, "stays_on_host", lambda layout, queries: False)
    monkeypatch.setattr(cache.tiers, "as_bytes", lambda tensor: None)
    monkeypatch.setattr(cache.layout, "MIN_BLOCK_BYTES", 1)
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        rows, transport = FakeRows(), FakeTransport()
        kept = HybridKVCache(
            loaded.config,
            length=80,
            dtype=loaded.dtype,
            kv_dtype=kv_dtype,
            device=CUDA,
            residency=Residency(host_rows, device_rows, on_accelerator=True),
            rows=rows if host_rows is not None else None,
            transport=transport,
        )
        walked(loaded, kept, 61)
        sealed, stores = 63 // CHUNK, len(kept.stores)
        assert [block.is_on_device for block in kept.stores[0].sealed] == [
            n >= sealed - device_rows for n in range(sealed)
        ]
        on_disk = 0 if host_rows is None else sealed - device_rows - host_rows
        assert rows.written == list(range(on_disk)) and bool(rows.read_units) == bool(on_disk)
        if not on_disk:
            assert transport.sent > sealed * stores and not transport.finished
        assert kept.held() == held_bytes(kept.layout, kept.offset, kept.residency)


@pytest.mark.parametrize("name", KINDS)
def test_weights_that_are_copied(folders: dict[str, Path], name: str) -> None:
    loaded = load_checkpoint(folders[name])
    with fake_cuda() as mode:
        to_fake(loaded, mode, "cpu")
        transport = FakeTransport()
        with DeviceStream(loaded, transport, 0, is_pinned=True) as stream:
            loaded.watcher = stream
            kept = HybridKVCache(
                loaded.config,
                length=80,
                dtype=loaded.dtype,
                device=CUDA,
                residency=Residency(on_accelerator=True),
                transport=transport,
            )
            walked(loaded, kept, 61)


def test_images(tmp_path: Path) -> None:
    """The vision tower takes pixels in host memory."""
    kind = Kind(DIVISIBLE | SCOUT, nested=True, vision=VISION)
    write_kind(tmp_path, "nested", kind, 0.25, 7)
    config = VisionConfig.from_folder(tmp_path)
    assert config is not None
    tower = load_vision(tmp_path, config, DIVISIBLE["hidden_size"], dtype="bfloat16")
    with fake_cuda() as mode:
        to_fake_cuda(tower, mode)
        pixels = torch.zeros(3, 3, VISION["image_size"], VISION["image_size"], dtype=torch.bfloat16)
        with NoWaits("cuda"):
            features = tower(pixels)
        assert features.device == CUDA and features.shape == (3, 1, DIVISIBLE["hidden_size"])


def test_block_masks() -> None:
    """What flex attention reads; compiling it wants a driver."""
    with fake_cuda(), NoWaits("cuda"):
        for mask in (AttentionMask(), AttentionMask(300)):
            found = mask.block_mask(range(256, 600), range(600), (128, 128), CUDA)
            assert found.kv_indices.device == CUDA


@pytest.mark.parametrize("kind", ["int8", "int4-g32", "fp8"])
def test_stored_weights(folders: dict[str, Path], kind: str) -> None:
    """Attention's too. Only single tokens wait: the host has to know which experts to expand."""
    loaded = load_checkpoint(folders["scout"], quantization=Quantization.parse(f"{kind}+attention"))
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        with NoWaits("cuda"):
            assert loaded(torch.zeros(1, 29, dtype=torch.int64, device=CUDA), logits="none") is None


def test_a_wait_on_the_way_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a table that is copied plainly, once a step."""
    loaded = load_checkpoint(folders["scout"])
    monkeypatch.setattr(model.rope, "to_device", lambda x, device: x.to(device))
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        ids = torch.zeros(1, 9, dtype=torch.int64, device=CUDA)
        with NoWaits("cuda"), pytest.raises(AssertionError, match="the host waits for the device at _to_copy"):
            loaded(ids, logits="none")
