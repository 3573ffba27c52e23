"""Layers on two devices, from the command line to the answer: two stand-ins for GPUs, each too small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from l4ctx.planning.memory_plan import MARGIN_BYTES
from l4ctx.run import inputs, sizing
from model.config import TextConfig
from model.costs import parameter_count
from support.cli_runner import TINY, answer, ask, fact_document, question, run_here, text_file
from support.device_labels import CPUS

HOW = ("--quiet", "--dtype", "float32", "--prefill-chunk-size", "256")
ROOM = round(3.6 * parameter_count(TextConfig.from_folder(TINY)))
"""Bytes that do not hold the model, its windows and activations; twice as many do."""
Gpus = Callable[[int, int], None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Sets how much is free on each, beside the margin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setattr(inputs, "usable_devices", lambda name: CPUS[:2])
    text_file(Path("docs/a.md"), fact_document("a"))

    def free(*sizes: int) -> None:
        monkeypatch.setattr(sizing, "free_on_accelerator", lambda device: MARGIN_BYTES + sizes[device.index])

    return free


def test_a_model_that_neither_holds(gpus: Gpus) -> None:
    gpus(most := ROOM, most)
    result = ask("a", "docs", *HOW, "--json", "--memory-report", "--cite")
    assert result.code == 0, result
    told = json.loads(result.stdout)
    assert told["answer"] == answer("a").strip() and told["citations"]
    memory = told["memory"]
    shares, held = memory["predicted"]["devices"], memory["devices"]
    assert [share["device"] for share in shares] == [0, 1] and shares[0]["layers"][0] == 0
    assert shares[1]["layers"][0] == shares[0]["layers"][1] + 1
    for share, there in zip(shares, held, strict=True):
        assert share["needed"] <= most + MARGIN_BYTES
        assert (there["weights"], there["layers"]) == (share["weights"], share["layers"])
    assert sum(there["weights"] for there in held) == memory["weights"]


def test_too_small_together(gpus: Gpus) -> None:
    gpus(most := ROOM // 3, most)
    refused = ask("a", "docs", *HOW)
    assert refused.code == 5 and "accelerator memory" in refused.stderr and "--device cpu" in refused.stderr


def test_contexts_and_many_questions(gpus: Gpus) -> None:
    """What is saved is what one device saves; questions are forks."""
    saved = dict[str, dict[str, Tensor]]()
    for name, most in (("one", 9 * ROOM), ("two", ROOM)):
        gpus(most, most)
        result = run_here("prefill", "docs", "-o", name, *HOW)
        assert result.code == 0, result
        saved[name] = {
            f"{file.name.partition('-')[0]}/{key}": tensor
            for file in Path(name).rglob("*.safetensors")
            for key, tensor in load_file(file).items()
        }
    assert saved["one"].keys() == saved["two"].keys() and "tail/0.keys" in saved["one"]
    assert all(torch.equal(tensor, saved["two"][key]) for key, tensor in saved["one"].items())
    text_file(Path("q.txt"), f"{question('a')}\n{question('b')}\n")
    result = run_here("ask", "--context", "one", "--questions", "q.txt", *HOW[:3])
    assert result.code == 0, result
    assert json.loads(result.stdout.splitlines()[0])["answer"] == answer("a").strip()
