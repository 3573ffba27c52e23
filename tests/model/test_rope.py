"""Frequencies against `transformers`, and phases against float64 at positions where float32 fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding, apply_rotary_emb

from model.config import RopeParameters, TextConfig
from model.errors import LengthError
from model.rope import phases, rotary_frequencies, rotate
from support.toy_checkpoints import BASE, KINDS

CPU = torch.device("cpu")
KINDS_OF_ROPE = [name for name in KINDS if name.startswith(("rope_", "scout"))]


def config(rope_parameters: dict[str, Any], **fields: Any) -> TextConfig:
    return TextConfig.from_dict(BASE | {"model_type": "llama4_text", "rope_parameters": rope_parameters} | fields)


def released(**rope_parameters: Any) -> TextConfig:
    """True head size, theta and chunk."""
    return config(
        {"rope_type": "default", "rope_theta": 500000.0} | rope_parameters,
        head_dim=128,
        attention_chunk_size=8192,
        max_position_embeddings=10485760,
    )


SCOUT = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("theta", [300.0, 500000.0])
@pytest.mark.parametrize("name", KINDS_OF_ROPE)
def test_frequencies_equal_transformers(name: str, theta: float, head_dim: int) -> None:
    rope = {**BASE, **KINDS[name].changes}["rope_parameters"] | {"rope_theta": theta}
    for table in ("short_factor", "long_factor"):
        if table in rope:
            rope[table] = torch.linspace(1, rope[table][-1], head_dim // 2).tolist()
    theirs = Llama4TextConfig(**(BASE | {"head_dim": head_dim, "rope_parameters": rope}))
    function = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], Llama4TextRotaryEmbedding.compute_default_rope_parameters)
    for length in (16, 100, 256):  # on both sides of the original lengths
        expected, expected_factor = function(theirs, CPU, seq_len=length)
        frequencies, factor = rotary_frequencies(config(rope, head_dim=head_dim), length)
        assert frequencies.dtype == torch.float64 and frequencies.shape == (head_dim // 2,)
        assert torch.allclose(frequencies, expected.double(), rtol=1e-6, atol=0)
        assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_scouts_equal_factors_divide_long_wavelengths_only() -> None:
    """Low == high: nothing lies between, and no 0 / 0. Wavelengths above 8192 are divided by 16."""
    frequencies, _ = rotary_frequencies(released(**SCOUT), 1)
    unscaled = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    is_long = 2 * torch.pi / unscaled > 8192
    assert 0 < is_long.sum() < 64
    assert torch.equal(frequencies[is_long], unscaled[is_long] / 16)
    assert torch.equal(frequencies[~is_long], unscaled[~is_long])


def test_dynamic_is_refused_beyond_its_length() -> None:
    dynamic = config({"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0})
    assert torch.equal(rotary_frequencies(dynamic, 256)[0], rotary_frequencies(config({"rope_theta": 300.0}), 256)[0])
    with pytest.raises(LengthError, match=r"257 tokens.*dynamic.*max_position_embeddings \(256\)"):
        rotary_frequencies(dynamic, 257)
    with pytest.raises(LengthError, match="257"):
        phases(dynamic, 0, 3, 257, CPU)


def test_rotation_equals_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 5, 6, 10, generator=generator)
    rotation = phases(config({"rope_theta": 300.0}), 2, 7, 7, CPU)
    assert rotation.shape == (5, 5) and rotation.dtype == torch.complex64
    expected = apply_rotary_emb(q, k, rotation[None])
    assert torch.equal(rotate(q, rotation), expected[0]) and torch.equal(rotate(k, rotation), expected[1])
    assert rotate(q.bfloat16(), rotation).dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS_OF_ROPE)
def test_phases_by_definition_within_the_first_chunk(name: str) -> None:
    toy = config({**BASE, **KINDS[name].changes}["rope_parameters"])
    frequencies, factor = rotary_frequencies(toy, 60)
    angles = torch.arange(3, 7).double()[:, None] * frequencies
    rotation = phases(toy, 3, 7, 60, CPU)
    assert (rotation.real - factor * angles.cos()).abs().max() < 1e-6
    assert (rotation.imag - factor * angles.sin()).abs().max() < 1e-6


def scores(q: Tensor, k: Tensor, angles: Tensor, factor: float) -> Tensor:
    """Rotary scores (T, T) of q and k (T, D) in float64."""
    cos, sin = factor * angles.cos(), factor * angles.sin()

    def turned(x: Tensor) -> Tensor:
        x = x.double().unflatten(-1, (-1, 2))
        return torch.stack((x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos), -1).flatten(-2)

    return turned(q) @ turned(k).T / q.shape[-1] ** 0.5


def our_scores(q: Tensor, k: Tensor, rotation: Tensor) -> Tensor:
    q, k = (rotate(x[None, :, None], rotation)[0, :, 0] for x in (q, k))
    return q.double() @ k.double().T / q.shape[-1] ** 0.5


@pytest.mark.parametrize(
    "rope", [{}, SCOUT, YARN, {"rope_type": "linear", "factor": 8.0}], ids=["default", "llama3", "yarn", "linear"]
)
@pytest.mark.parametrize("chunk_number", [0, 1, 1220])
def test_scores_within_a_chunk_equal_those_of_absolute_positions(rope: dict[str, Any], chunk_number: int) -> None:
    """Up to ten million tokens, against float64 of absolute positions, over one chunk's whole span."""
    true = released(**rope)
    start, size = chunk_number * 8192, 8192
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, 128, generator=generator)
    offsets = torch.cat((torch.arange(32), torch.arange(size - 32, size)))  # the chunk's first and last tokens
    frequencies, factor = rotary_frequencies(true, start + size)
    expected = scores(q, k, (start + offsets).double()[:, None] * frequencies, factor)
    rotation = phases(true, start, start + size, start + size, CPU)[offsets]
    assert (our_scores(q, k, rotation) - expected).abs().max() < 1e-3
    pieces = torch.cat([phases(true, start + int(i), start + int(i) + 1, start + size, CPU) for i in offsets])
    assert torch.equal(pieces, rotation), "a token's phase does not depend on the forward that it comes with"


def test_float32_phases_of_absolute_positions_would_be_wrong() -> None:
    """The control of the test above: at ten million tokens the usual way is off by a hundred times its bound."""
    true, start = released(), 1220 * 8192 - 8192 + 8100
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, 128, generator=generator)
    positions = start + torch.arange(64)
    frequencies, _ = rotary_frequencies(true, start + 64)
    expected = scores(q, k, positions.double()[:, None] * frequencies, 1.0)
    angles = positions.float()[:, None] * frequencies.float()
    assert (our_scores(q, k, torch.polar(torch.ones_like(angles), angles)) - expected).abs().max() > 0.1


def test_phases_restart_with_each_chunk() -> None:
    toy = config({"rope_theta": 300.0})
    rotation = phases(toy, 0, 30, 30, CPU)
    assert torch.equal(rotation[7:14], rotation[:7]) and torch.equal(rotation[28:], rotation[:2])
    assert torch.equal(phases(toy, 12, 16, 30, CPU), rotation[12:16])


def test_longrope_keeps_its_table_for_the_run() -> None:
    long = config(KINDS["rope_longrope_long"].changes["rope_parameters"])
    tables = long.rope_parameters
    first_of_many, first_of_few = phases(long, 0, 7, 61, CPU), phases(long, 0, 7, 20, CPU)
    assert not torch.allclose(first_of_many, first_of_few)
    only_short = dataclasses.replace(long, rope_parameters=dataclasses.replace(tables, long_factor=tables.short_factor))
    assert torch.equal(phases(only_short, 0, 7, 61, CPU), first_of_few)


def test_yarn_takes_its_factor_from_the_lengths_where_none_is_given() -> None:
    given = released(**YARN | {"factor": 10485760 / 8192})
    derived = released(**{name: value for name, value in YARN.items() if name != "factor"})
    assert derived.rope_parameters.factor is None
    assert torch.equal(rotary_frequencies(given, 1)[0], rotary_frequencies(derived, 1)[0])
    assert rotary_frequencies(given, 1)[1] == rotary_frequencies(derived, 1)[1] > 1


def test_defaults_are_llama_4s() -> None:
    assert RopeParameters() == RopeParameters("default", 500000.0)
