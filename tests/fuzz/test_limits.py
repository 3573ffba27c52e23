"""The harness itself: what a reader does wrong is found, and attributed to the input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.inputs import Failure, Files, Folder, Reader, check, kind_of, one_of
from fuzz.limits import attempt
from fuzz.mutation import mutate_json
from l4ctx.errors import CHECKPOINT, INPUT, InputError
from support.places import ROOT

IN_PROCESSES = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from fuzz.inputs import Reader
from fuzz import limits

limits.SECONDS, limits.WAITING = 0.3, 3.0

def read(folder):
    number = int((folder / "number").read_bytes())
    if number == 3:
        os.abort()
    if number == 5:
        print("panicked", file=sys.stderr, flush=True)
    if number == 7:
        os._exit(9)
    if number == 8:
        while True:
            pass
    if number == 9:
        bytes(2**30)
    if number == 11:
        time.sleep(60)
    if number == 12:
        raise KeyError(number)

count = iter(range(100))
reader = Reader("toy", lambda: {{"a": {{"number": b"0"}}}}, None, read, frozenset())
limits.mutated = lambda reader, seed, draws: {{"number": str(limits.now).encode()}}
limits.seed_and_draws = lambda reader, seed, number: (setattr(limits, "now", number), ("a", []))[1]
tally = limits.run(reader, 1, 0, 14)
found = ((first, kind.split(" in ")[0][:22], often) for kind, (often, first, _) in tally.failures.items())
print(tally.inputs, sorted(found))
"""


def test_what_ends_a_process_costs_one_input() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESSES.format(root=str(ROOT))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    expected = [
        (3, "the process ended with", 1), (5, "noise on standard erro", 1), (7, "the process ended with", 1),
        (8, "more than 0.3 s", 1), (9, "MemoryError", 1), (11, "no end within 0.6 s, a", 1), (12, "KeyError", 1),
    ]  # fmt: skip
    assert done.stdout == f"14 {expected}\n"


def reader(read: object, codes: frozenset[int] = frozenset([INPUT])) -> Reader:
    return Reader("toy", dict, one_of(("", mutate_json)), read, codes)  # type: ignore[arg-type]


def test_an_error_of_the_wrong_kind_fails(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise InputError("no")

    assert check(reader(refuse), tmp_path) == "InputError"
    with pytest.raises(Failure, match="InputError"):
        check(reader(refuse, frozenset([CHECKPOINT])), tmp_path)


def test_limits_are_put_back(tmp_path: Path) -> None:
    def grow(folder: Path) -> None:
        bytes(1 << 30)

    def spin(folder: Path) -> None:
        while True:
            pass

    folder = Folder(tmp_path)
    with pytest.raises(Failure, match="MemoryError"):
        attempt(reader(grow), folder, {"a": b"1"})
    assert len(bytearray(1 << 30)) == 1 << 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuzz.limits.SECONDS", 0.1)
        with pytest.raises(Failure, match=r"more than 0\.1 s"):
            attempt(reader(spin), folder, {"a": b"1"})


def test_a_folder_holds_one_input_after_another(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first, second = Files({"a/b": b"1", "c": b"2"}), Files({"a": b"3", "c": b"2"})
    for files in (first, second, first, {}):
        folder.hold(files)
        found = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert found == files
    assert not list(tmp_path.iterdir())


def test_faults_are_told_apart_by_place() -> None:
    from l4ctx.formatting import parse_size

    with pytest.raises(ValueError, match="not a size") as raised:
        parse_size("x")
    assert kind_of(raised.value) == "ValueError in l4ctx/formatting.py:parse_size"
