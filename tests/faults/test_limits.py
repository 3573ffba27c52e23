"""Commands under limits, on disks without room, without permissions, and ended by signals: `limits.py` tries them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.limits import DISKS, KINDS, Condition, Limits, reachable_folder, run_limited, why_no_disks
from faults.operations import BY_NAME, Operation
from faults.shim import Fault, compile_shim
from support.cli_runner import ANSWER, DOCUMENT, QUESTION
from support.places import TINY

pytestmark = pytest.mark.faults
WRITERS = ("prefill", "resume", "grow", "replace", "ask-save", "ask-disk", "questions", "quantize")
SIGNALS = ("SIGTERM", "SIGHUP")
PER_WRITER = 16  # points at which a signal comes


@pytest.fixture(scope="module")
def limits() -> Iterator[Limits]:
    with reachable_folder() as top:
        library = compile_shim(top)
        if isinstance(library, str):
            pytest.skip(library)
        limits = Limits(top, library)
        try:
            yield limits
        finally:
            limits.close()


def check(limits: Limits, operation: Operation, conditions: list[Condition]) -> None:
    verdicts = {condition.name: limits.attempt(operation, condition) for condition in conditions}
    bad = {name: verdict for name, verdict in verdicts.items() if verdict.outcome == "bad"}
    assert not bad, json.dumps({name: vars(verdict) for name, verdict in bad.items()}, indent=1)


@pytest.mark.parametrize("operation", BY_NAME)
def test_limits(limits: Limits, operation: str) -> None:
    check(limits, BY_NAME[operation], KINDS["limit"])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
@pytest.mark.parametrize("operation", BY_NAME)
def test_disks_without_room(limits: Limits, tmp_path: Path, operation: str) -> None:
    if why := why_no_disks(tmp_path / "disk"):
        pytest.skip(why)
    check(limits, BY_NAME[operation], DISKS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become an ordinary user")
@pytest.mark.parametrize("operation", BY_NAME)
def test_an_ordinary_user(limits: Limits, operation: str) -> None:
    check(limits, BY_NAME[operation], KINDS["user"])


@pytest.mark.parametrize("operation", WRITERS)
def test_signals(limits: Limits, operation: str) -> None:
    """Those that end a process at once: no traceback, and the same command goes on."""
    chosen = random.Random(operation)
    points = limits.walk.base(BY_NAME[operation]).points
    writes = sorted(point for point in points if " state" in point)
    for number in range(PER_WRITER):
        point = chosen.choice(writes)
        fault = Fault(point, chosen.randint(1, points[point]), f"signal {SIGNALS[number % 2]}")
        verdict = limits.kill(BY_NAME[operation], fault)
        assert verdict.outcome != "bad", (fault, verdict)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "a.txt").write_text(DOCUMENT, encoding="utf-8")
    (folder / "model").symlink_to(TINY)
    return folder


COMMANDS = {
    "ask": ["ask", QUESTION, "a.txt", "--model", "model", "--max-new-tokens", "30", "--quiet"],
    "bench": [
        *("bench", "--config", "model", "--tokens", "40", "--decode", "2", "--rounds", "1"),
        *("--no-ceilings", "--device", "cpu", "--quiet"),
    ],
    "inspect": ["inspect", "model", "--verify"],
}
ULIMITS = [
    *(f"-n {files}" for files in (6, 10, 15, 16, 20, 32, 128)),
    *(f"-v {kib}" for kib in (60_000, 200_000, 1_000_000, 1_600_000, 8_000_000)),
    *(f"-d {kib}" for kib in (100_000, 1_000_000)),
    *(f"-f {blocks}" for blocks in (0, 1, 1000)),
    *(f"-s {kib}" for kib in (64, 256, 1024)),
]


@pytest.mark.parametrize("ulimit", ULIMITS)
@pytest.mark.parametrize("command", COMMANDS)
def test_processes_under_limits(place: Path, command: str, ulimit: str) -> None:
    """From the interpreter's start on; where even that cannot start, it is not tried."""
    ended = run_limited(ulimit, *COMMANDS[command], folder=place)
    if ended.code == 0:
        assert ended.stdout == ANSWER if command == "ask" else ended.stdout, ended
        return
    lines = ended.stderr.splitlines()
    assert ended.code in range(1, 8) and len(lines) == 1 and lines[0].startswith("l4ctx: "), ended
