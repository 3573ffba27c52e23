"""Errors of a file system at every call: the harness itself, and a share of what `walk.py` walks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.operations import OPERATIONS, Place
from faults.shim import FAULTS, compile_shim
from faults.walk import Walk, chosen, summary
from support.cli_runner import run_process

BY_NAME = {operation.name: operation for operation in OPERATIONS}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    top = tmp_path_factory.mktemp("faults").resolve()
    library = compile_shim(top)
    if isinstance(library, str):
        pytest.skip(library)
    place = Place(top / "place", library)
    yield Walk(place)
    place.close()


@pytest.mark.faults
def test_a_fork_does_what_a_process_does(walk: Walk) -> None:
    place, operation = walk.place, BY_NAME["ask"]
    place.put_back(operation.start)
    ended = place.run(operation.arguments)
    process = run_process(*operation.arguments, folder=place.top)
    assert (ended.code, ended.stdout) == (process.code, process.stdout) == (0, ended.stdout)


@pytest.mark.slow
def test_points_are_counted_and_fail(walk: Walk) -> None:
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


@pytest.mark.faults
def test_every_fault(walk: Walk, tmp_path: Path) -> None:
    """FAULTS_MOST: how many; FAULTS_SHARD: K/N, the K-th of N parts. `walk.py` can be stopped and continued."""
    most, shard = int(os.environ.get("FAULTS_MOST", "1000000")), os.environ.get("FAULTS_SHARD", "1/1")
    part, parts = (int(number) for number in shard.split("/"))
    lines = []
    for operation, fault in chosen(walk, list(BY_NAME), part - 1, parts):
        if len(lines) >= most:
            break
        lines.append({"operation": operation.name, "fault": fault, **vars(walk.attempt(operation, fault))})
    assert not [line for line in lines if line["outcome"] == "bad"], summary(lines)
