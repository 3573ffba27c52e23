"""The devices that --device names, without any."""

from __future__ import annotations

import pytest
import torch

from l4ctx.errors import RequestError
from l4ctx.machine import device
from l4ctx.machine.device import available_on_each, usable_devices


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (100 + number, 999))
    monkeypatch.setattr(device, "available_on_gpu", lambda index=0: 200 + index if index < 3 else None)
    monkeypatch.setattr(device, "_torch_may_use_gpus", lambda: True)


def test_auto_takes_all_gpus_that_are_visible(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_devices("auto") == tuple(torch.device("cuda", number) for number in range(3))
    assert usable_devices("cuda:1") == (torch.device("cuda", 1),) and usable_devices("cpu") == (torch.device("cpu"),)
    assert available_on_each("auto", quick=True) == [200, 201, 202]
    assert available_on_each("auto", quick=False) == [100, 101, 102]
    assert available_on_each("cuda:1", quick=True) == [201] and available_on_each("cpu", quick=True) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_devices("auto") == (torch.device("cuda"),)


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_devices("auto") == (torch.device("cpu"),) and available_on_each("auto", quick=False) == []
    with pytest.raises(RequestError, match="no such device"):
        available_on_each("nothing", quick=True)
