"""What a run is told of when its memory is planned."""

from __future__ import annotations

import pytest

from l4ctx.planning.weights import StoredWeights, WeightBytes
from l4ctx.planning.workload import Workload
from l4ctx.run import sizing
from model.config import TextConfig

CONFIG = TextConfig.from_dict({"model_type": "llama4_text", "hidden_size": 64, "num_hidden_layers": 1})


def workload(stored: str, num_bytes: int, dtype: str) -> Workload:
    name = "model.layers.0.feed_forward.experts.down_proj"
    weights = StoredWeights.of(CONFIG, [WeightBytes.of(name, stored, num_bytes, num_bytes)])
    return Workload(CONFIG, 10, 10, weights.num_bytes, True, dtype, stored=weights)


@pytest.mark.parametrize(
    ("stored", "num_bytes", "dtype", "expected"),
    [
        ("Q4_K", 2**30, "float32", True),
        ("bfloat16", 2**30, "float32", True),
        ("bfloat16", 2**30, "bfloat16", False),
        ("float32", 2**30, "bfloat16", False),  # converted when it is loaded
        ("Q4_K", 2**20, "float32", False),  # small enough to expand for each token
    ],
)
def test_a_missing_package_is_named_where_it_would_help(
    stored: str, num_bytes: int, dtype: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "find_spec", lambda name: None)
    assert sizing.would_profit(workload(stored, num_bytes, dtype)) == expected
    monkeypatch.setattr(sizing, "find_spec", lambda name: object())
    assert not sizing.would_profit(workload(stored, num_bytes, dtype))
