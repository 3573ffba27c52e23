"""Mutation controls: each known mistake, switched on in our model, must make the oracle suite fail.

A mutation that its configuration does not notice is a hole in the suite. Every mutation names the configuration that
catches it; the same harness passes where nothing is mutated, and where a part is replaced by a naive equal one.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import model.rope
import model.transformer
from model.errors import CheckpointError
from model.moe import MLP, FusedExperts
from support.mutations import (
    Mutation,
    config_with,
    correct_temperature,
    drop_bias,
    each,
    frequencies,
    gelu,
    interleave_gate_and_up,
    llama3_without_division_guard,
    llama3_without_smoothing,
    longrope_table_by_the_forwards_length,
    mask,
    moe,
    normed_across_heads,
    normed_then_rotated,
    phases_from_the_forwards_start,
    qk_eps,
    reversed_flags,
    rotate_halves,
    rotate_with,
    rotated,
    rotated_everywhere,
    same_chunk,
    swap_dense_gate_and_up,
    swap_gate_and_up,
    temperature,
    temperature_on,
    tie_to_embeddings,
    transpose,
    unscaled_scores,
    weights,
    wrong_group_order,
)
from support.oracle_differences import differences, load
from support.toy_checkpoints import SCALES, Toys

# name: (mutation, the configuration that catches it)
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "temperature off by one": (temperature(lambda p, c: correct_temperature(p - 1, c)), "scout"),
    "temperature of relative positions": (temperature(correct_temperature, relative=True), "scout"),
    "temperature without floor": (
        temperature(lambda p, c: torch.log1p((p + 1) / c.floor_scale) * c.attn_scale + 1),
        "maverick",
    ),
    "temperature with log instead of log1p": (
        temperature(lambda p, c: ((p + 1) // c.floor_scale).clamp(min=1).log() * c.attn_scale + 1),
        "maverick",
    ),
    "temperature missing": (config_with(attn_temperature_tuning=False), "scout"),
    "temperature though switched off": (config_with(attn_temperature_tuning=True), "no_temperature"),
    "temperature on RoPE layers too": (temperature_on(lambda layer: True), "scout"),
    "temperature on RoPE layers instead": (temperature_on(lambda layer: layer.uses_rope), "maverick"),
    "temperature on keys": (temperature_on(lambda layer: not layer.uses_rope, keys=True), "scout"),
    # Norm and unit rotations commute; only an attention factor tells their order.
    "norm before rotation": (rotated(normed_then_rotated), "rope_yarn"),
    "norm across heads": (rotated(normed_across_heads), "scout"),
    "norm with eps 1e-6": (qk_eps(1e-6), "scout"),
    "norm on NoPE layers too": (qk_eps(1e-5, nope_too=True), "scout"),
    "norm missing": (config_with(use_qk_norm=False), "scout"),
    "norm though switched off": (config_with(use_qk_norm=True), "maverick"),
    "rotation of NoPE layers": (rotated(rotated_everywhere), "maverick"),
    "rotation of halves": (rotate_with(rotate_halves), "scout"),
    "rotation reversed": (rotate_with(lambda x, r: model.rope.rotate(x, r.conj())), "scout"),
    "rotation missing": (rotate_with(lambda x, r: x), "scout"),
    "rotation of relative positions": (phases_from_the_forwards_start, "scout"),
    "no_rope_layers reversed": (config_with(no_rope_layers=reversed_flags), "scout"),
    "no_rope_layers ignored": (config_with(no_rope_layers=(1, 1, 1, 0) * 2), "nope_first"),
    "NoPE first in each four": (config_with(no_rope_layers=(0, 1, 1, 1) * 2), "scout"),
    "sliding window": (mask(lambda q, k, size: q - k < size), "scout"),
    "chunk one longer": (mask(lambda q, k, size: same_chunk(q, k, size + 1)), "scout"),
    "chunk boundary one early": (mask(lambda q, k, size: same_chunk(q + 1, k + 1, size)), "scout"),
    "chunk boundary off by one for queries": (
        mask(lambda q, k, size: ((q - 1) // size == k // size) | (q == k)),
        "scout",
    ),
    "no chunks": (mask(lambda q, k, size: k >= 0), "scout"),
    "chunks on NoPE layers too": (mask(same_chunk, nope_too=True), "scout"),
    "scores not scaled": (unscaled_scores, "scout"),
    "key heads in the wrong order": (wrong_group_order, "scout"),
    "score on the output": (moe(score_in=0, score_out=1), "scout"),
    "score twice": (moe(score_out=1), "scout"),
    "score missing": (moe(score_in=0), "scout"),
    "score on the shared expert too": (moe(score_shared=1), "scout"),
    "softmax over the chosen": (moe(gate=lambda top, logits: top.softmax(-1)), "top_2"),
    "softmax before top-k": (moe(gate=lambda top, logits: (top - logits.logsumexp(-1, keepdim=True)).exp()), "scout"),
    "experts' results left sorted": (moe(sort_back=False), "scout"),
    "second expert left out": (config_with(num_experts_per_tok=1), "top_2"),
    "third expert left out": (config_with(num_experts_per_tok=2), "top_3"),
    "experts' gate and up swapped": (each(FusedExperts, swap_gate_and_up), "scout"),
    "experts' gate and up interleaved": (each(FusedExperts, interleave_gate_and_up), "scout"),
    "experts transposed": (each(FusedExperts, transpose), "scout"),
    "dense gate and up swapped": (each(MLP, swap_dense_gate_and_up), "moe_none"),
    "gelu": (gelu, "scout"),
    "llama3 ignored": (config_with(rope={"rope_type": "default"}), "scout"),
    "llama3 divides by zero": (
        lambda patch: patch.setattr(model.rope, "_llama3", llama3_without_division_guard),
        "scout",
    ),
    "llama3 divides everything": (
        lambda patch: patch.setattr(model.rope, "_llama3", lambda rope, f: f / rope.factor),
        "scout",
    ),
    "llama3 not smoothed": (lambda patch: patch.setattr(model.rope, "_llama3", llama3_without_smoothing), "scout_old"),
    "linear ignored": (config_with(rope={"rope_type": "default"}), "rope_linear"),
    "dynamic scaled at once": (config_with(rope={"rope_type": "linear"}), "rope_dynamic"),
    "yarn ignored": (config_with(rope={"rope_type": "default"}), "rope_yarn"),
    "yarn attention factor dropped": (frequencies(lambda config, f, factor: (f, 1.0)), "rope_yarn_mscale"),
    "yarn attention factor without mscale": (
        config_with(rope={"mscale": None, "mscale_all_dim": None}),
        "rope_yarn_mscale",
    ),
    "yarn explicit attention factor ignored": (config_with(rope={"attention_factor": None}), "rope_yarn_untruncated"),
    "yarn truncated": (config_with(rope={"truncate": True}), "rope_yarn_untruncated"),
    "yarn betas ignored": (config_with(rope={"beta_fast": None, "beta_slow": None}), "rope_yarn_mscale"),
    "longrope long instead of short": (
        config_with(rope={"original_max_position_embeddings": 4, "attention_factor": 1.0}),
        "rope_longrope_short",
    ),
    "longrope short instead of long": (
        config_with(rope={"long_factor": (1.0, 1.1, 1.3, 1.7, 2.1)}),
        "rope_longrope_long",
    ),
    "longrope table by the forward's length": (longrope_table_by_the_forwards_length, "rope_longrope_long"),
    "longrope attention factor dropped": (frequencies(lambda config, f, factor: (f, 1.0)), "rope_longrope_long"),
    "rope theta 10000": (config_with(rope={"rope_theta": 10000.0}), "scout"),
    "query biases missing": (drop_bias("q_proj"), "biases"),
    "key biases missing": (drop_bias("k_proj"), "biases"),
    "value biases missing": (drop_bias("v_proj"), "biases"),
    "output biases missing": (drop_bias("o_proj"), "biases"),
    "rms_norm_eps 1e-6": (config_with(rms_norm_eps=1e-6), "scout"),
    "norm weights missing": (each(model.transformer.RMSNorm, lambda layer: layer.weight.data.fill_(1)), "scout"),
    "head tied though stored apart": (weights(tie_to_embeddings), "scout"),
}
CASES = [(1, 61), (2, 33)]


def largest_difference(
    toys: Toys, name: str, mutation: Mutation, patch: pytest.MonkeyPatch, enough: float = math.inf
) -> float:
    """By the oracle suite's own harness, in multiples of its limit, over both scales; infinite for NaN. Or the first
    difference that is larger than `enough`.

    Eager, which reads wrong predicates.
    """
    for std in SCALES:
        for case in CASES:
            toys(name, std).limit(*case)  # the oracle answers before anything is patched
    mutation(patch)
    largest = 0.0
    for std, case in itertools.product(reversed(SCALES), CASES):
        found = differences(load, toys(name, std), [case], ["eager"]).values()
        largest = max(largest, *(math.inf if math.isnan(d) else d for d in found))
        if largest > enough:
            break
    return largest


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(toys: Toys, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    apply, name = MUTATIONS[mutation]
    assert largest_difference(toys, name, apply, monkeypatch, enough=2) > 2, f"{name} does not notice: {mutation}"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"moe_layers": tuple(range(0, 8, 2))}, "maverick"),  # every second layer, shifted by one
        ({"moe_layers": tuple(range(8))}, "moe_none"),  # an empty list read as a missing one
        ({"intermediate_size_mlp": 22}, "maverick"),  # dense layers as wide as experts
        ({"attention_bias": False}, "biases"),
        ({"attention_bias": True}, "scout"),
        ({"tie_word_embeddings": False}, "tied"),
        ({"tie_word_embeddings": True}, "scout"),
        ({"num_key_value_heads": 6}, "scout"),
    ],
)
def test_mutation_does_not_even_load(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], name: str
) -> None:
    folder = toys(name, 0.25).folder
    config_with(**changes)(monkeypatch)
    with pytest.raises(CheckpointError, match=r"tensor \S+ (is missing|has shape)|extra tensor|lm_head.weight differs"):
        load(folder, "eager")


CONTROLS: dict[str, Mutation] = {
    "nothing": lambda patch: None,
    "moe": moe(),
    "temperature": temperature(correct_temperature),
    "temperature_on": temperature_on(lambda layer: not layer.uses_rope),
    "mask": mask(same_chunk),
    "qk_eps": qk_eps(1e-5),
    "config_with": config_with(rope={}),
    "rotate_halves": rotate_with(lambda x, r: to_pairs(rotate_halves(to_halves(x), r))),
    "each": each(FusedExperts, lambda experts: None),
    "frequencies": frequencies(lambda config, f, factor: (f, factor)),
}


def to_halves(x: Tensor) -> Tensor:
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def to_pairs(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


NOTICING = ("scout", "top_2", "biases")


@pytest.mark.parametrize(
    ("control", "name"),
    [("nothing", "top_2"), ("nothing", "biases"), *zip(CONTROLS, itertools.cycle(NOTICING), strict=False)],
)
def test_control_of_the_controls(toys: Toys, monkeypatch: pytest.MonkeyPatch, control: str, name: str) -> None:
    """The tools that make the mutations, used to put in something equal, change nothing."""
    assert largest_difference(toys, name, CONTROLS[control], monkeypatch) <= 1
