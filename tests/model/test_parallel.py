"""Tensor and context parallelism over gloo, in processes: ranks compute what one process does, and agree on it.

Which bytes a rank holds, in every stored form, is tested in tests/model/weights/test_cutting.py.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from cache.hybrid import HybridKVCache
from l4ctx.engine.prefill import prefill
from model.config import TextConfig
from model.costs import activation_bytes
from model.division import TensorRank, copies_of_kv_heads, divided, exchange_bytes
from model.parallel import GroupExchange, divided_model
from model.weights.loading import load_checkpoint
from support.compressed import RECIPES
from support.quantized_toys import write_compressed
from support.rank_processes import MESHES, PROCESSES, prefill_and_decode, start
from support.storages import LiveStorages
from support.toy_checkpoints import CHUNK, DIVISIBLE, MAVERICK, SCOUT, VOCABULARY, Kind, write_kind

IDS = random.Random(3).choices(range(VOCABULARY), k=5 * CHUNK + 3)
CUTS = [CHUNK, 4 * CHUNK, 4 * CHUNK + 4, *range(4 * CHUNK + 5, len(IDS) + 1)]
"""Prefill in one and several attention chunks, in a piece of one, and token by token over a boundary."""
LIMIT = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for name, kind in (
        ("float32", Kind(DIVISIBLE | MAVERICK | {"num_experts_per_tok": 2})),
        ("bfloat16", Kind(DIVISIBLE | SCOUT, dtype=torch.bfloat16)),
    ):
        write_kind(root / name / "stored", name, kind, 0.2, seed=11)
    for name, recipe in (("int4", "w4a16"), ("FP8", "fp8_dynamic")):
        kind = Kind(DIVISIBLE | SCOUT, nested=True)
        write_compressed(root / name, kind, {"a": (RECIPES[recipe], ["Linear"])}, ["re:.*lm_head"])
    return {folder.name: folder / "stored" for folder in root.iterdir()}


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each process computed, by checkpoint, number of ranks and kind of result."""
    out = tmp_path_factory.mktemp("found")
    spawn(start, (f"file://{out}/meeting", folders, IDS, CUTS, out))
    return [load_file(out / f"{number}.safetensors") for number in range(PROCESSES)]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4", "FP8"])
def test_ranks_compute_what_one_process_computes(
    name: str, folders: dict[str, Path], found: list[dict[str, Tensor]]
) -> None:
    """Over several attention chunks, in prefill and decode; the greedy answer is the same."""
    expected = prefill_and_decode(load_checkpoint(folders[name], dtype=torch.float32), IDS, CUTS)
    assert expected["logits"].std() > 0.1 and len(set(expected["answer"].tolist())) > 2
    for results, ((tensor, context), names) in itertools.product(found, MESHES.items()):
        if name in names:
            assert (results[f"{name}:{tensor}x{context}:logits"] - expected["logits"]).abs().max() <= LIMIT
            assert torch.equal(results[f"{name}:{tensor}x{context}:answer"], expected["answer"])


def test_all_ranks_have_the_same_bits(found: list[dict[str, Tensor]]) -> None:
    for other in found[1:]:
        for what, tensor in found[0].items():
            assert torch.equal(tensor, other[what]), what


MEDIUM = {
    "model_type": "llama4_text",
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 4,
    "attention_chunk_size": 128,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "is_compiling"), [(2, False), (4, True)])
def test_a_forward_holds_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, count: int, is_compiling: bool, dtype: torch.dtype
) -> None:
    """Activations are bounded by their estimate, the exchange's own tensors included; with weights and cache, the peak
    is within a tenth of the plan. Also where torch.compile is in use, as callers then keep their arguments alive."""
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: None)
    monkeypatch.setattr(dist, "broadcast", lambda x, group_src, group: None)
    monkeypatch.setattr(dist, "all_gather", lambda found, x, group: None)
    whole = TextConfig.from_dict(MEDIUM)
    model = divided_model(whole, "sdpa", GroupExchange(TensorRank(1, count))).to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    own, tokens = model.config, 256
    cache = HybridKVCache(own, length=2 * tokens, dtype=dtype)
    list(prefill(model, cache, range(tokens), prefill_chunk_size=tokens))

    def compute() -> None:
        list(prefill(model, cache, range(tokens - 1), prefill_chunk_size=tokens))
        model(torch.tensor([[1]]), cache, logits="last")

    with LiveStorages() as live:
        (torch._dynamo.run(compute) if is_compiling else compute)()
    estimate = max(activation_bytes(own, tokens, dtype.itemsize), exchange_bytes(own, tokens, dtype.itemsize, count))
    assert estimate / 6 <= live.peak <= estimate, f"{live.peak / estimate:.2f} of the estimate"
    beside = model.weight_bytes + cache.held().total
    assert 0.9 * (beside + estimate) <= beside + live.peak


def test_ranks_share_heads_and_inner_dimensions() -> None:
    config = TextConfig.from_dict({"model_type": "llama4_text", **DIVISIBLE})
    for number in range(8):
        own = divided(config, TensorRank(number, 8))
        assert (own.num_attention_heads, own.num_key_value_heads) == (1, 1)
        assert (own.intermediate_size, own.intermediate_size_mlp) == (16, 24)
        assert (own.hidden_size, own.vocab_size, own.head_dim) == (48, VOCABULARY, 16)
    assert [copies_of_kv_heads(config, count) for count in (1, 2, 4, 8)] == [1, 1, 2, 4]
