"""Experts whose weights are quantized get their scores where Llama 4 has them: on what goes in.

Several engines were wrong in this for one of their quantized kernels only, and some for one row only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.moe import MoE, SplitExperts
from model.quantization.choice import Quantization
from model.quantization.form import StoredMatrix
from model.weights.loading import load_checkpoint
from support.quantized_checkpoints import SIZES
from support.toy_checkpoints import SCOUT, Kind, write_kind


@pytest.fixture(scope="module", params=[1, 2])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = Kind(SIZES | SCOUT | {"num_hidden_layers": 1, "num_experts_per_tok": request.param})
    return write_kind(tmp_path_factory.mktemp("toy") / "toy", "toy", kind, 0.25, seed=2).folder


def exact(matrix: object) -> Tensor:
    assert isinstance(matrix, StoredMatrix)
    return matrix.expanded().double()


def by_hand(layer: MoE, tokens: Tensor, *, is_score_inside: bool) -> Tensor:
    """Token by token in float64 (N, C), with the score on the expert's input or on its output."""
    assert isinstance(layer.experts, SplitExperts)
    rows = []
    for token in tokens.double():
        best = (layer.router.weight.double() @ token).topk(layer.top_k)
        shared = layer.shared_expert
        total = exact(shared.down_proj.weight) @ (
            F.silu(exact(shared.gate_proj.weight) @ token) * (exact(shared.up_proj.weight) @ token)
        )
        for score, number in zip(best.values.sigmoid(), best.indices.tolist(), strict=True):
            expert = layer.experts.experts[number]
            gate, up = exact(expert.gate_up).chunk(2) if expert.is_joined else (exact(expert.gate), exact(expert.up))
            x = token * score if is_score_inside else token
            result = exact(expert.down) @ (F.silu(gate @ x) * (up @ x))
            total = total + (result if is_score_inside else result * score)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["int8", "fp8", "int4-g32"])
def test_scores_multiply_what_goes_into_an_expert(folder: Path, form: str) -> None:
    model = load_checkpoint(folder, dtype=torch.float32, quantization=Quantization.parse(form))
    (layer,) = (module for module in model.modules() if isinstance(module, MoE))
    tokens = torch.randn(40, layer.router.in_features, generator=torch.Generator().manual_seed(4))
    expected = by_hand(layer, tokens, is_score_inside=True)
    limit = 1e-5 * expected.abs().max()
    assert (by_hand(layer, tokens, is_score_inside=False) - expected).abs().max() > 1000 * limit
    for count in (1, 3, 40):
        assert (layer(tokens[None, :count])[0] - expected[:count]).abs().max() <= limit
    for number in range(40):
        assert (layer(tokens[None, number : number + 1])[0, 0] - expected[number]).abs().max() <= limit
