"""Weights are counted by owner and stored form, and a line says how a checkpoint is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.config import TextConfig
from model.quantization.mlx_affine import MlxAffine
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.vision.tower import VisionTower
from model.weights.census import census, description
from model.weights.loading import checked_sources, checked_vision_sources
from model.weights.owners import Owner, owner_of
from model.weights.plain import PlainScheme
from model.weights.sources import Scheme, StoredTensor, WeightSource
from support.toy_checkpoints import Toys

INT4, INT8, PLAIN = MlxAffine(4, 64), MlxAffine(8, 32), PlainScheme("bfloat16")
LAYER = "model.layers.0"
ATTENTION, ROUTER, NORM = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.feed_forward.router.weight", "model.norm.weight"
EXPERT, OTHER = (f"{LAYER}.feed_forward.experts.{e}.gate_proj.weight" for e in (0, 1))


def source(scheme: Scheme, file: str = "model.safetensors", shape: tuple[int, ...] = (6, 4)) -> WeightSource:
    sizes = (8,) if scheme == PLAIN else (5, 2)
    tensors = {str(i): StoredTensor(Path(file), str(i), "U8", (size,), size, 0) for i, size in enumerate(sizes)}
    return WeightSource(shape, scheme, tensors)


def test_every_weight_of_a_checkpoint_has_its_owner(toys: Toys) -> None:
    folder = toys("nested_sharded", 0.25).folder
    config, vision = TextConfig.from_folder(folder), VisionConfig.from_folder(folder)
    assert vision is not None
    sources = checked_sources(folder, config)
    tower = checked_vision_sources(folder, vision, config.hidden_size)
    found = {share.owner: share for share in census(sources | tower)}
    assert list(found) == list(Owner)
    with torch.device("meta"):
        text_model, vision_model = Transformer(config), VisionTower(vision, config.hidden_size)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    layers = text_model.model.layers
    dense, moe = layers[::2], layers[1::2]
    assert {owner: share.parameters for owner, share in found.items()} == {
        Owner.ATTENTION: sum(count(layer.self_attn) for layer in layers),
        Owner.SHARED: sum(count(layer.feed_forward.shared_expert) for layer in moe),
        Owner.ROUTED: sum(count(layer.feed_forward.experts) for layer in moe),
        Owner.DENSE: sum(count(layer.feed_forward) for layer in dense),
        Owner.SMALL: sum(count(layer.feed_forward.router) for layer in moe)
        + (2 * len(layers) + 1) * config.hidden_size,
        Owner.EMBEDDINGS: count(text_model.model.embed_tokens),
        Owner.HEAD: count(text_model.lm_head),
        Owner.VISION: count(vision_model),
    }
    assert all(share.stored == "float32" and share.num_bytes == 4 * share.parameters for share in found.values())
    assert owner_of("model.layers.3.self_attn.q_proj.bias") is Owner.SMALL


def test_forms_of_one_owner_are_counted_apart() -> None:
    shares = census({EXPERT: source(INT4), OTHER: source(PLAIN), ATTENTION: source(INT4), ROUTER: source(PLAIN)})
    assert [(str(share.owner), share.stored, share.parameters, share.num_bytes) for share in shares] == [
        ("attention", INT4.label, 24, 7),
        ("routed experts", "bfloat16", 24, 8),
        ("routed experts", INT4.label, 24, 7),
        ("routers, norms, biases", "bfloat16", 24, 8),
    ]


@pytest.mark.parametrize(
    ("schemes", "settings", "line"),
    [
        ({ATTENTION: PLAIN, NORM: PLAIN}, {}, "bfloat16, not quantized"),
        ({ATTENTION: INT4, NORM: PLAIN}, {}, "MLX: int4 (affine, groups of 64)"),
        (
            {ATTENTION: PLAIN, EXPERT: INT4, ROUTER: PLAIN, NORM: PLAIN, "lm_head.weight": PLAIN},
            {"quant_method": "compressed-tensors"},
            "compressed-tensors: int4 (affine, groups of 64); not quantized: attention, routers, head",
        ),
        (
            {EXPERT: INT4, OTHER: PLAIN, ATTENTION: INT8},
            {"quant_method": 3},
            "MLX: int4 (affine, groups of 64), int8 (affine, groups of 32); not quantized: some routed experts",
        ),
    ],
)
def test_a_line_says_how_it_is_stored(schemes: dict[str, Scheme], settings: dict[str, Any], line: str) -> None:
    shapes = {NORM: (6,)}
    sources = {name: source(scheme, shape=shapes.get(name, (6, 4))) for name, scheme in schemes.items()}
    assert description(sources, settings) == line


def test_many_forms_are_cut_short() -> None:
    sources = {f"{LAYER}.self_attn.{n}.weight": source(MlxAffine(4, n), "a.gguf") for n in range(1, 8)}
    line = description(sources, {"quant_method": "ignored"})
    assert line.startswith("GGUF: int4 (affine, groups of 1), ") and line.endswith(" and 3 more")
