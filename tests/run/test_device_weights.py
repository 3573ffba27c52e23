"""--weights-device-memory from the command line to the answer, on a stand-in for a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4ctx.run import sizing
from model.weights import transport
from support.cli_runner import TINY, answer, ask, fact_document, run_here, text_file
from support.transports import LateTransport


def test_weights_are_copied_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transports: list[LateTransport] = []

    def stand_in(_: object) -> LateTransport:
        transports.append(LateTransport())
        return transports[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    monkeypatch.setattr(sizing, "free_on_accelerator", lambda _: 2**32)
    monkeypatch.setattr(transport, "CudaTransport", stand_in)
    text_file(Path("docs/a.md"), fact_document("a"))
    asked = ("docs", "--quiet", "--json", "--dtype", "float32")
    assert json.loads(ask("a", *asked).stdout)["answer"] == answer("a").strip()
    assert not transports
    result = ask("a", *asked, "--weights-device-memory", "1B", "--memory-report")
    assert result.code == 0, result
    told = json.loads(result.stdout)
    assert told["answer"] == answer("a").strip()
    assert len(transports) == 1 and transports[0].is_closed and len(transports[0].sent) > 8
    memory = told["memory"]
    planned = memory["predicted"]
    assert planned["copied_a_step"] > 0
    assert memory["weight_buffers"] == pytest.approx(planned["weight_buffers"], rel=0.01)
    held = {row["owner"]: row for row in memory["weights_by_owner"]}
    for row in planned["weights_by_owner"]:
        assert held[row["owner"]]["memory"] + held[row["owner"]]["mapped"] >= row["memory"]


@pytest.mark.parametrize("command", [["ask", "?", "docs"], ["prefill", "docs", "-o", "c"], ["plan", "--tokens", "9"]])
def test_a_cpu_has_no_such_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(Path("docs/a.md"), "text")
    options = ("--model", str(TINY), "--device", "cpu", "--weights-device-memory", "1GiB")
    result = run_here(*command, *options)
    assert result.code != 0 and "--weights-memory limits that" in result.stderr
