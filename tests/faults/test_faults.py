"""Errors of a file system at every call, and cuts of the power: a share of what `walk.py` and `power.py` try."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.operations import BY_NAME, Place
from faults.power import CUT, Cut, Power, each
from faults.shim import FAULTS, compile_shim
from faults.walk import Walk, chosen, summary
from support.cli_runner import run_process

SHARE = ("prefill", "replace")
MOST, SHARD = int(os.environ.get("FAULTS_MOST", "1000000")), os.environ.get("FAULTS_SHARD", "1/1")
PART, PARTS = (int(number) for number in SHARD.split("/"))


@contextmanager
def placed(top: Path, *warm_up: str) -> Iterator[Walk]:
    library = compile_shim(top.resolve())
    if isinstance(library, str):
        pytest.skip(library)
    place = Place(top.resolve() / "place", library, *([warm_up] if warm_up else []))
    try:
        yield Walk(place)
    finally:
        place.close()


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    with placed(tmp_path_factory.mktemp("faults")) as walk:
        yield walk


@pytest.mark.slow
def test_a_share(tmp_path: Path) -> None:
    with placed(tmp_path, "prefill", "ask-context") as walk:  # one process for all
        check_share(walk)


def check_share(walk: Walk) -> None:
    check_points(walk)
    check_faults(walk, SHARE, 12)
    power = Power(walk)
    check_cuts(power, SHARE, 50, per_full=13)
    check_that_syncs_matter(power)


def check_points(walk: Walk) -> None:
    """What is counted, and that it fails when it is told to."""
    place, operation = walk.place, BY_NAME["prefill"]
    points = walk.base(operation).points
    assert points.keys() >= {
        "open docs/sub/b.txt",
        "read docs/a.md",
        "readdir docs",
        "pwrite state/ctx/blocks/000001-*.safetensors",
        "fsync state/ctx/blocks/000001-*.safetensors",
        "fsync state/ctx/blocks",
        "write state/ctx/journal",
        "rename state/ctx/.manifest.json.*",
        "mkdir state/ctx/blocks",
        "flock state/ctx/writer.lock",
        "pthread_create process",
    }
    assert {point.split()[0] for point in points} <= FAULTS.keys()
    place.put_back(operation.start)
    ended = place.run(operation.arguments, fault=["write state/ctx/journal", 2, "ENOSPC"])
    assert ended.code == 5 and os.strerror(errno.ENOSPC) in ended.stderr and ended.told["fired"]


def check_faults(walk: Walk, names: Collection[str], most: int) -> None:
    some = itertools.islice(chosen(walk, names, PART - 1, PARTS), most)
    lines = [
        {"operation": operation.name, "fault": fault, **vars(walk.attempt(operation, fault))}
        for operation, fault in some
    ]
    assert not [line for line in lines if line["outcome"] == "bad"], summary(lines)


def check_cuts(power: Power, names: Collection[str], cuts: int, per_full: int) -> None:
    lines = [
        {"operation": operation.name, "cut": cut, **vars(power.attempt(operation, cut, per_full=per_full))}
        for operation, cut in each(power, names, cuts)
    ]
    assert not [line for line in lines if line["outcome"] == "bad"], summary(lines)


def check_that_syncs_matter(power: Power) -> None:
    """Without the changes that sync, some cut loses an earlier context: the model finds what is missing."""
    operation = BY_NAME["replace"]
    changes = power.changes(operation)
    unsynced = [change for change in changes if change.what != "sync"]
    assert len(unsynced) < len(changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(power._changes, operation.name, unsynced)
        cuts = (Cut(operation.name, 9 + n % (len(unsynced) - 8), n) for n in itertools.count())
        found = (power.attempt(operation, cut, per_full=10**9) for cut in itertools.islice(cuts, 40))
        assert any(verdict.why.startswith("the context is lost") for verdict in found)


@pytest.mark.faults
def test_a_fork_does_what_a_process_does(walk: Walk) -> None:
    place, operation = walk.place, BY_NAME["ask"]
    place.put_back(operation.start)
    ended = place.run(operation.arguments)
    process = run_process(*operation.arguments, folder=place.top)
    assert (ended.code, ended.stdout) == (process.code, process.stdout) == (0, ended.stdout)


@pytest.mark.faults
def test_every_fault(walk: Walk) -> None:
    """FAULTS_MOST: how many; FAULTS_SHARD: K/N, the K-th of N parts. `walk.py` can be stopped and continued."""
    check_faults(walk, BY_NAME, MOST)


@pytest.mark.faults
def test_cuts_of_the_power(walk: Walk) -> None:
    check_cuts(Power(walk), CUT, min(MOST, 5000), per_full=5)
