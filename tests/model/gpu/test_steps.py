"""Recorded steps of a few tokens against the ordinary forward, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cache.hybrid import HybridKVCache
from model.config import TextConfig
from model.quantization.choice import Quantization
from model.transformer import Transformer
from samples.benchmarks.benchmark_gpu import quantize
from support.cached_paths import small_layout
from support.triton import DEVICE, needs_triton

pytestmark = [needs_triton(), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of the interpreter

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
CHUNK = 7
BASE: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 24,
    "intermediate_size_mlp": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 5,
    "attention_chunk_size": CHUNK,
    "max_position_embeddings": 256,
    "no_rope_layers": [1, 0, 1, 0],
    "floor_scale": 9,
    "attn_temperature_tuning": True,
}
DIVISIBLE = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 3}
KINDS = {
    "scout": {"use_qk_norm": True, "num_experts_per_tok": 1},
    "maverick": {"use_qk_norm": False, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2},
    "dense": {"use_qk_norm": False, "interleave_moe_layer_step": 9, "attn_temperature_tuning": False},
}


def make(kind: str, dtype: torch.dtype, quantization: str | None = None) -> Transformer:
    torch.manual_seed(len(kind))
    sizes = {} if quantization is None else DIVISIBLE
    with torch.device("meta"):
        model = Transformer(TextConfig.from_dict(BASE | KINDS[kind] | sizes))
    model = model.to(dtype).to_empty(device=DEVICE).requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.1 if "norm" in name else 3.0 if "router" in name else 0.3  # which expert is chosen must be clear
        parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    if quantization is not None:
        for layer in model.model.layers:
            quantize(layer.feed_forward, Quantization.parse(quantization))
    return model


def make_cache(model: Transformer, *, kv_dtype: str = "auto") -> HybridKVCache:
    layout = small_layout(
        model.config,
        length=64,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=kv_dtype,
        batch_size=1,
        block_chunks=2,
        segment_chunks=1,
    )
    return HybridKVCache(model.config, length=64, dtype=model.dtype, device=DEVICE, layout=layout)


def run(model: Transformer, ids: list[int], counts: list[int]) -> tuple[torch.Tensor, HybridKVCache]:
    """Logits (T, V) of all tokens but the first 3, in steps of so many tokens."""
    cache, found = make_cache(model), []
    model(torch.tensor([ids[:3]], device=DEVICE), cache, logits="none")
    start = 3
    for count in counts:
        logits = model(torch.tensor([ids[start : start + count]], device=DEVICE), cache)
        assert logits is not None and logits.dtype == model.dtype
        found.append(logits[0].float())
        start += count
    return torch.cat(found), cache


@pytest.mark.parametrize(
    ("kind", "quantization"), [*((kind, None) for kind in KINDS), ("scout", "int4-g32"), ("scout", "int8")]
)
def test_logits_are_those_of_the_forward(kind: str, quantization: str | None) -> None:
    """Single tokens and several, over attention chunks, segments and sealed blocks; what is left is the same, too."""
    model = make(kind, HALF, quantization)
    exact, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    plain.steps = None
    ids = torch.randint(0, 97, (38,)).tolist()
    counts = [1, 1, 2, 1, 6, 1, 7, 1, 1, 5, 2, 5, 1, 1]  # some over the end of a chunk, where the forward computes
    found, cache = run(model, ids, counts)
    assert model.steps is not None and model.steps._steps is not None
    expected, _ = run(exact, ids, counts)
    ordinary, other = run(plain, ids, counts)
    off, usual = (found - expected).norm(dim=1), (ordinary - expected).norm(dim=1)
    assert off.median() < 1.5 * usual.median()  # single tokens may get another expert
    assert cache.offset == other.offset and cache.held() == other.held()


def test_a_token_does_not_depend_on_those_computed_with_it() -> None:
    model = make("scout", HALF)
    ids = torch.randint(0, 97, (17,)).tolist()
    one, _ = run(model, ids, [1] * 14)
    several, _ = run(model, ids, [1, 3, 7, 3])
    assert torch.equal(one, several)


def test_a_step_can_be_taken_back() -> None:
    model = make("scout", HALF)
    ids = torch.randint(0, 97, (12,)).tolist()
    expected, _ = run(model, ids, [1] * 3)
    cache = make_cache(model)
    model(torch.tensor([ids[:3]], device=DEVICE), cache, logits="none")
    model(torch.tensor([[ids[3]]], device=DEVICE), cache)
    model(torch.tensor([[ids[4], 90]], device=DEVICE), cache)  # a wrong draft
    cache.rewind(5)
    logits = model(torch.tensor([[ids[5]]], device=DEVICE), cache)
    assert logits is not None and torch.equal(logits[0].float(), expected[2:])


@pytest.mark.parametrize("what", ["float32", "int8 blocks", "several rows", "weights that move"])
def test_what_is_left_to_the_forward(what: str) -> None:
    model = make("scout", torch.float32 if what == "float32" else HALF)
    cache = make_cache(model, kv_dtype="int8" if what == "int8 blocks" else "auto")
    rows = 1
    if what == "int8 blocks":
        model(torch.zeros(1, 15, dtype=torch.int64, device=DEVICE), cache, logits="none")
    if what == "weights that move":
        model.watcher = Moving()
    if what == "several rows":
        rows, cache = 2, HybridKVCache(model.config, length=64, dtype=model.dtype, device=DEVICE, batch_size=2)
    for _ in range(2):
        assert model(torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE), cache) is not None
    assert model.steps is not None and model.steps._steps is None


class Moving:
    moves_weights = True

    def entering(self, layer: int, tokens: int) -> None:
        pass

    def leaving(self, layer: int, tokens: int) -> None:
        pass
