"""What recorded steps cost where there are none: the cache is asked once at the most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.gpu import steps
from model.gpu.steps import RecordedSteps


class CountingCache:
    length, offset, asked = 64, 0, 0

    def reserve(self, tokens: int) -> object:
        self.asked += 1
        return object()


def model(watcher: object = None) -> Any:
    weight = torch.zeros(3, 2)
    layer = SimpleNamespace(self_attn=SimpleNamespace(q_proj=SimpleNamespace(weight=weight)))
    owner = SimpleNamespace(weight=weight)
    trunk = SimpleNamespace(embed_tokens=owner, norm=owner, layers=[layer])
    return SimpleNamespace(model=trunk, lm_head=owner, watcher=watcher)


@pytest.mark.parametrize(("moves", "asked"), [(False, 1), (True, 0)])
def test_a_model_that_has_no_recorded_steps_does_not_pay_at_each_token(
    monkeypatch: pytest.MonkeyPatch, moves: bool, asked: int
) -> None:
    monkeypatch.setattr(steps, "has_triton", lambda device: True)
    monkeypatch.setattr(steps, "_forms", lambda model: None)
    recorded, cache, of = RecordedSteps(), CountingCache(), model(SimpleNamespace(moves_weights=moves))
    for _ in range(4):
        assert recorded.run(of, torch.zeros(1, 2, dtype=torch.int64), cache) is None  # type: ignore[arg-type]
    assert cache.asked == asked
