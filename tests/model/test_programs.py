"""Layers as programs of vector code against the same layers in PyTorch: logits through caches, batches, many sequences.

Sizes have whole steps, as the published ones; tests/test_oracle.py compares PyTorch's path with other implementations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache.hybrid import HybridKVCache
from model.moe import Expert, FusedExperts, SplitExperts
from model.programs import HeadProgram, LayerProgram, Programs
from model.quantization.choice import Quantization
from model.quantization.form import StoredMatrix
from model.quantization.gguf_blocks import GgufMatrix
from model.quantization.gguf_types import NATIVE
from model.quantization.plain import PlainMatrix
from model.simd import products
from model.simd.products import FEW_ROWS
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.quantized_checkpoints import SIZES
from support.toy_checkpoints import MAVERICK, SCOUT, VOCABULARY, Kind, write_kind

pytest.importorskip("llvmlite")

TOKENS = 45
KINDS = {
    "dense and MoE, no QK norm": MAVERICK,
    "MoE, QK norm": SCOUT,
    "two experts a token": {"num_experts_per_tok": 2},
    "NoPE first, biases": {"no_rope_layers": [0, 1, 0, 1], "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "attn_temperature_tuning": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("toys")
    return {
        name: write_kind(place / str(number), name, Kind(SIZES | changes), 0.25, seed=number).folder
        for number, (name, changes) in enumerate(KINDS.items())
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the programs that have run."""
    found = []
    for kind in (LayerProgram, HeadProgram):
        run = kind.__call__

        def counted(self: Any, *arguments: Any, run: Any = run) -> Tensor:
            found.append(type(self).__name__)
            result: Tensor = run(self, *arguments)
            return result

        monkeypatch.setattr(kind, "__call__", counted)
    return found


def some_ids(count: int = TOKENS, rows: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(5))


def by_pytorch(model: Transformer, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """All logits in one forward, by PyTorch alone, with the weights in this dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "find_engine", lambda: None)
        model = copy.deepcopy(model).to(dtype)
        model.programs = Programs()
        logits = model(ids, logits="all")
    assert logits is not None
    return logits.float()


def in_steps(model: Transformer, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    cache = HybridKVCache(model.config, length=ids.shape[1], dtype=model.dtype, batch_size=len(ids))
    pieces = []
    for count in cuts:
        tokens = ids[:, cache.offset : cache.offset + count]
        pieces.append(model(tokens, cache, logits="all"))
    return torch.cat(pieces, 1).float()


def assert_as_exact(model: Transformer, ids: Tensor, found: Tensor) -> None:
    """Logits in 16 bits are as near to those in float32 as PyTorch's are; but some tokens may go to other experts."""
    exact = by_pytorch(model, ids)
    ours, theirs = ((x - exact).norm(dim=-1).median() for x in (found, by_pytorch(model, ids, model.dtype)))
    assert 0 < ours < 1.1 * theirs


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


CUTS = [1, 2, 3, 4, 5, 6, 7, 8, 8, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_of_tokens(folders: dict[str, Path], kind: str, calls: list[str]) -> None:
    """From 1 to FEW_ROWS tokens a step, over ends of attention chunks."""
    assert sum(CUTS) == TOKENS and max(CUTS) == FEW_ROWS
    model, ids = load_checkpoint(folders[kind], dtype=torch.float32), some_ids()
    assert_close(in_steps(model, ids, CUTS), by_pytorch(model, ids))
    assert calls == (["LayerProgram"] * len(model.model.layers) + ["HeadProgram"]) * len(CUTS)


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_no_cache(folders: dict[str, Path], threads: int, calls: list[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, ids = load_checkpoint(folders["MoE, QK norm"], dtype=torch.float32), some_ids(4, rows=2)
        assert_close(in_steps(model, ids, [1, 3]), by_pytorch(model, ids))
        assert_close(model(ids, logits="all"), by_pytorch(model, ids))
        assert_close(model(ids, logits="last"), by_pytorch(model, ids)[:, -1:])
        assert model(ids, logits="none") is None and len(calls) == 5 * 4 + 4
    finally:
        torch.set_num_threads(before)


def test_several_sequences(folders: dict[str, Path], calls: list[str]) -> None:
    """Each at its own position, with its own number of tokens, in one forward."""
    model, ids = load_checkpoint(folders["MoE, QK norm"], dtype=torch.float32), some_ids(20, rows=3)
    expected = by_pytorch(model, ids)
    caches = [HybridKVCache(model.config, length=20) for _ in range(3)]
    for cache, row, start in zip(caches, ids, (3, 9, 16), strict=True):
        model(row[None, :start], cache, logits="none")
    calls.clear()
    new = [ids[0, 3:4].tolist(), ids[1, 9:13].tolist(), ids[2, 16:18].tolist()]
    found = model.forward_ragged(new, caches, logits="all")
    for some, row, start in zip(found, expected, (3, 9, 16), strict=True):
        assert_close(some, row[start : start + len(some)])
    last = model.forward_ragged([[5], [6, 7], [8]], caches, logits="last")
    assert [some.shape for some in last] == [(1, VOCABULARY)] * 3 and calls.count("HeadProgram") == 2


@pytest.mark.parametrize("form", ["int8", "fp8", "int4-g32"])
def test_stored_forms(folders: dict[str, Path], form: str, calls: list[str]) -> None:
    quantization = Quantization.parse(form)
    for kind in ("dense and MoE, no QK norm", "two experts a token"):
        model, ids = load_checkpoint(folders[kind], dtype=torch.float32, quantization=quantization), some_ids()
        assert any(isinstance(part, StoredMatrix) for part in model.modules())
        assert_close(in_steps(model, ids, CUTS), by_pytorch(model, ids))
        assert len(calls) == 5 * len(CUTS)
        calls.clear()


def random_gguf(c_out: int, c_in: int, name: str = "Q4_K") -> GgufMatrix:
    kind = next(kind for kind in NATIVE if kind.name == name)
    generator = torch.Generator().manual_seed(c_out + c_in)
    blocks = torch.randint(256, (c_out, c_in // 256, kind.block_bytes), dtype=torch.uint8, generator=generator)
    halves = torch.randn(c_out, c_in // 256, 2, generator=generator) * 2e-3
    blocks[..., :4] = halves.half().view(torch.uint8)
    return GgufMatrix(blocks.flatten(1), kind, (c_out, c_in))


def test_blocks_of_gguf(folders: dict[str, Path], calls: list[str]) -> None:
    """Experts whose input has whole blocks: gate, up and down in types of their own."""
    model, ids = load_checkpoint(folders["two experts a token"], dtype=torch.float32), some_ids(9)
    size, c = model.config.intermediate_size, model.config.hidden_size
    for layer in model.model.layers:
        experts = layer.feed_forward.experts
        joined = [experts.gate_up_proj[e].t() for e in range(model.config.num_local_experts)]
        layer.feed_forward.experts = SplitExperts(
            Expert(PlainMatrix(part[:size].contiguous()), part[size:].contiguous(), None, random_gguf(c, size))
            for part in joined
        )
    assert_close(in_steps(model, ids, [1, 8]), by_pytorch(model, ids))
    assert len(calls) == 10


@pytest.mark.parametrize("by_columns", [False, True])
def test_fused_experts_in_both_layouts(folders: dict[str, Path], by_columns: bool, calls: list[str]) -> None:
    model, ids = load_checkpoint(folders["two experts a token"], dtype=torch.bfloat16), some_ids(8)
    for layer in model.model.layers:
        experts = layer.feed_forward.experts
        assert isinstance(experts, FusedExperts)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            stored = weight.contiguous() if by_columns else weight.transpose(1, 2).contiguous().transpose(1, 2)
            setattr(experts, name, nn.Parameter(stored, requires_grad=False))
    assert_as_exact(model, ids, in_steps(model, ids, [8]))
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_at_least_as_exact_as_pytorch(folders: dict[str, Path], dtype: torch.dtype) -> None:
    for kind in KINDS:
        model, ids = load_checkpoint(folders[kind], dtype=dtype), some_ids()
        assert_as_exact(model, ids, in_steps(model, ids, CUTS))


def test_more_tokens_are_left_to_pytorch(folders: dict[str, Path], calls: list[str]) -> None:
    model, ids = load_checkpoint(folders["MoE, QK norm"], dtype=torch.float32), some_ids()
    in_steps(model, ids, [FEW_ROWS + 1, TOKENS - FEW_ROWS - 1])
    model(some_ids(3, rows=3))
    assert not calls


def test_nothing_without_a_compiler(
    folders: dict[str, Path], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "find_engine", lambda: None)
    model, ids = load_checkpoint(folders["MoE, QK norm"], dtype=torch.float32), some_ids(8)
    in_steps(model, ids, [1, 7])
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 2, 3])
def test_layers_without_code_are_left_to_pytorch(
    folders: dict[str, Path], dtype: torch.dtype, which: int, calls: list[str]
) -> None:
    model, ids = load_checkpoint(folders["dense and MoE, no QK norm"], dtype=dtype), some_ids()
    gap = torch.randn(model.config.hidden_size, 2 * model.model.layers[0].self_attn.o_proj.in_features) * 0.02
    model.model.layers[which].self_attn.o_proj.weight = nn.Parameter(gap.to(dtype)[:, ::2], requires_grad=False)
    found = in_steps(model, ids, CUTS)
    if dtype == torch.float32:
        assert_close(found, by_pytorch(model, ids))
    else:
        assert_as_exact(model, ids, found)
    assert calls.count("LayerProgram") == 3 * len(CUTS)


def test_weights_that_are_replaced_are_noticed(folders: dict[str, Path], calls: list[str]) -> None:
    model, ids = load_checkpoint(folders["two experts a token"], dtype=torch.float32), some_ids(8)

    def check() -> None:
        assert_close(in_steps(model, ids, [1, 7]), by_pytorch(model, ids))

    check()
    layer = model.model.layers[1]
    layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight.flip(0), requires_grad=False)
    check()
    down = layer.feed_forward.shared_expert.down_proj.weight
    down.data = torch.full_like(down, 0.1)
    check()
    layer.input_layernorm.weight.mul_(1.5)  # in place
    check()
    matrix = PlainMatrix(layer.self_attn.k_proj.weight.clone())
    del layer.self_attn.k_proj._parameters["weight"]
    layer.self_attn.k_proj.weight = matrix
    check()
    matrix.weight = matrix.weight.flip(0)
    matrix.forget_operand()
    check()
    other = copy.deepcopy(model)
    layer.feed_forward.router.weight.data.mul_(-1)
    check()
    assert not torch.equal(in_steps(other, ids, [8]), in_steps(model, ids, [8]))
    assert len(calls) == (7 * 2 + 2) * 5
    model.bfloat16()
    assert in_steps(model, ids, [8]).isfinite().all() and len(calls) == (7 * 2 + 3) * 5


def test_logits_stay_when_others_are_computed(folders: dict[str, Path]) -> None:
    model = load_checkpoint(folders["tied"], dtype=torch.float32)
    first = model(some_ids(3))
    kept = first.clone()
    model(some_ids(8).flip(1))
    assert torch.equal(first, kept)
