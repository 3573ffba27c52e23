"""Where weights are, by owner: planned, and as a loaded model holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from l4ctx.cli.tables.weights import weights_table
from l4ctx.planning.placement import PlacedWeights, Tier, held_weights, placed_weights
from l4ctx.planning.published import PUBLISHED, plain, quantizing
from l4ctx.planning.workload import Workload
from l4ctx.run.weights import Weights
from model.config import TextConfig
from model.quantization.choice import Quantization
from model.weights.loading import checked_sources, load_checkpoint
from model.weights.owners import Owner
from model.weights.quantizing import quantized_sources
from model.weights.residency import WeightResidency
from model.weights.tiers import held_bytes
from support.toy_checkpoints import Kind, write_kind

SCOUT = TextConfig.from_dict({"model_type": "llama4_text"})
FORMS = {form.name: form for form in PUBLISHED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = Kind({"num_hidden_layers": 3}, dtype=torch.bfloat16)
    return write_kind(tmp_path_factory.mktemp("toy"), "toy", kind, 0.2, seed=2).folder


def workload(weights: Weights, config: TextConfig, dtype: str) -> Workload:
    return Workload(
        config,
        prompt_tokens=100,
        max_new_tokens=9,
        weights=weights.bytes_in(dtype),
        weights_are_mapped=weights.are_mapped(dtype),
        dtype=dtype,
        stored=weights.stored,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "quantization", [None, Quantization("int8"), Quantization("fp8", with_attention=True)], ids=str
)
def test_a_model_holds_what_is_planned_by_owner_and_tier(
    folder: Path, dtype: str, quantization: Quantization | None
) -> None:
    config = TextConfig.from_folder(folder)
    weights = Weights.of(quantized_sources(checked_sources(folder, config), quantization), config)
    planned = placed_weights(workload(weights, config, dtype), WeightResidency(()), on_accelerator=False)
    model = load_checkpoint(folder, dtype=dtype, quantization=quantization, is_mapped=weights.are_mapped(dtype))
    assert held_weights(planned, held_bytes([model])) == planned
    assert sum(row.num_bytes for row in planned) == model.weight_bytes == weights.bytes_in(dtype)
    tiers = {tier for row in planned for tier, num_bytes in row.tiers.items() if num_bytes}
    small = {Tier.MEMORY} if dtype == "float32" else set()
    assert tiers == ({Tier.MEMORY} if quantization else {Tier.MAPPED} | small)
    by_configuration = plain("bfloat16") if quantization is None else quantizing(quantization, plain("bfloat16"))
    assert Weights.in_form(by_configuration, config, "bfloat16").bytes_in(dtype) == weights.bytes_in(dtype)


def streamed(name: str, budget: int) -> tuple[list[PlacedWeights], WeightResidency]:
    weights = Weights.in_form(FORMS[name], SCOUT, "bfloat16")
    of = workload(weights, SCOUT, "float32")
    residency = of.weight_residency(budget)
    return placed_weights(of, residency, on_accelerator=False), residency


@pytest.mark.parametrize("name", ["bfloat16", "w4a16", "MLX 4 bit"])
@pytest.mark.parametrize("budget", [4 * 2**30, 40 * 2**30])
def test_experts_are_streamed_first(name: str, budget: int) -> None:
    rows, residency = streamed(name, budget)
    by_owner = {row.owner: row.tiers for row in rows}
    sums = sum(tiers[Tier.STREAMED] for tiers in by_owner.values())
    assert sums == pytest.approx(sum(residency.streamed(layer) for layer in range(48)), abs=1000)
    assert by_owner[Owner.EMBEDDINGS][Tier.STREAMED] == by_owner[Owner.HEAD][Tier.STREAMED] == 0
    shares = {
        owner: by_owner[owner][Tier.STREAMED] / (by_owner[owner][Tier.STREAMED] + by_owner[owner][Tier.MAPPED])
        for owner in (Owner.ATTENTION, Owner.SHARED, Owner.ROUTED)
    }
    assert shares[Owner.ROUTED] >= shares[Owner.ATTENTION] == pytest.approx(shares[Owner.SHARED], rel=1e-6)
    assert shares[Owner.ATTENTION] < 0.03 or shares[Owner.ROUTED] == 1


def test_on_an_accelerator_and_where_nothing_is_known() -> None:
    of = workload(Weights.in_form(FORMS["FP8"], SCOUT, "bfloat16"), SCOUT, "bfloat16")
    rows = placed_weights(replace(of, weights_are_mapped=False), WeightResidency(()), on_accelerator=True)
    assert all(row.num_bytes == row.tiers[Tier.DEVICE] > 0 for row in rows)
    assert placed_weights(replace(of, stored=None), WeightResidency(()), on_accelerator=False) == []


@pytest.mark.parametrize("name", FORMS)
def test_the_table_fits_into_80_columns(name: str) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(weights_table(streamed(name, 8 * 2**30)[0]))
    title, head, *lines = captured.get().splitlines()
    assert title.strip() == "weights" and head.split()[:3] == ["mapped", "read", "again"]
    assert len(lines) == 6 and all(" (" not in line for line in lines)
    assert lines[2].startswith("routed experts: ") and lines[2].endswith(("GiB", " "))
