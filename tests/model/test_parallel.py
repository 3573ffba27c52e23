"""Tensor and context parallelism over gloo, in processes: ranks compute what one process does, and agree on it.

Which bytes a rank holds, in every stored form, is tested in tests/model/weights/test_cutting.py.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from model.config import TextConfig
from model.division import TensorRank, copies_of_kv_heads, divided
from model.weights.loading import load_checkpoint
from support.compressed import RECIPES
from support.quantized_toys import write_compressed
from support.rank_processes import MESHES, PROCESSES, prefill_and_decode, start
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


def test_ranks_share_heads_and_inner_dimensions() -> None:
    config = TextConfig.from_dict({"model_type": "llama4_text", **DIVISIBLE})
    for number in range(8):
        own = divided(config, TensorRank(number, 8))
        assert (own.num_attention_heads, own.num_key_value_heads) == (1, 1)
        assert (own.intermediate_size, own.intermediate_size_mlp) == (16, 24)
        assert (own.hidden_size, own.vocab_size, own.head_dim) == (48, VOCABULARY, 16)
    assert [copies_of_kv_heads(config, count) for count in (1, 2, 4, 8)] == [1, 1, 2, 4]
