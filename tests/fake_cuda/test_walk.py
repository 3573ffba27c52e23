"""The path over a GPU walked without one: no error, and no wait of the host for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import model.moe
import model.rope
from cache.hybrid import HybridKVCache
from cache.residency import Residency
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.fake_cuda import CUDA, fake_cuda, needs_cuda_build, to_fake_cuda
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, Kind, write_kind
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


def walked(loaded: Transformer, cache: HybridKVCache, length: int) -> None:
    """Prefill in chunks and two single tokens, whose logits have the right shape, dtype and device."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=CUDA)
    with NoWaits():
        for start in range(0, length, 2 * CHUNK):
            assert loaded(ids[:, start : start + 2 * CHUNK], cache, logits="none") is None
        for _ in range(2):
            logits = loaded(ids[:, :1], cache, logits="last")
            assert logits is not None and logits.device == CUDA
            assert logits.shape == (1, 1, loaded.config.vocab_size) and logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "matmul", "eager"])
def test_on_the_device(folders: dict[str, Path], name: str, attention: str) -> None:
    loaded = load_checkpoint(folders[name], attention=attention)
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        everything = Residency(None, 99, on_accelerator=True)
        cache = HybridKVCache(loaded.config, length=80, dtype=loaded.dtype, device=CUDA, residency=everything)
        walked(loaded, cache, 61)


@pytest.mark.parametrize("kind", ["int8", "int4-g32", "fp8"])
def test_stored_weights(folders: dict[str, Path], kind: str) -> None:
    """Attention's too. Only single tokens wait: the host has to know which experts to expand."""
    loaded = load_checkpoint(folders["scout"], quantization=Quantization.parse(f"{kind}+attention"))
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        with NoWaits():
            assert loaded(torch.zeros(1, 29, dtype=torch.int64, device=CUDA), logits="none") is None


def test_a_wait_on_the_way_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a table that is copied plainly, once a step."""
    loaded = load_checkpoint(folders["scout"])
    monkeypatch.setattr(model.rope, "to_device", lambda x, device: x.to(device))
    with fake_cuda() as mode:
        to_fake_cuda(loaded, mode)
        ids = torch.zeros(1, 9, dtype=torch.int64, device=CUDA)
        with NoWaits(), pytest.raises(AssertionError, match="the host waits for the device at _to_copy"):
            loaded(ids, logits="none")
