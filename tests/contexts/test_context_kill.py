"""Readings into a context that stop anywhere: killed, by a power loss, interrupted, or because the disk is full.

Each time readers have a whole set of documents or none, and the next run ends with the bytes and the answer of one that
nothing interrupted.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cache.disk import UnitFile
from cache.errors import DiskFullError
from l4ctx.contexts.folder import HEAD
from l4ctx.contexts.reader import Context
from l4ctx.errors import ContextError
from support.context_toys import (
    BLOCK,
    CHUNK,
    Kind,
    answer,
    block_digests,
    changed,
    journal_types,
    keep,
    tokens,
)
from support.places import ROOT

KIND = Kind(prefill_chunk_size=BLOCK)
IDS = tokens(2 * BLOCK + CHUNK + 3)
OTHER_IDS = changed(IDS, BLOCK + CHUNK + 2)

OsFunction = Callable[..., Any]
Failure = Callable[[int, str, OsFunction, tuple[Any, ...]], Any]


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "soak" / "kill_prefill.py"), "--kills", "12", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"12 kills in \d+ trials: .*; 0 mismatches \(.*\)\n", done.stdout)


class PowerCut(BaseException):
    """Nothing happens after it."""


class FileCalls:
    """Counts the calls that change files in a folder; from call `number` on, `failure` happens instead.

    `failure` gets how many calls after that one it is, the function's name, the function and its arguments.
    """

    def __init__(self, folder: Path, number: int, failure: Failure) -> None:
        self.folder, self.number, self.failure = folder, number, failure
        self.count = 0
        self._lock = threading.RLock()
        self._unsynced: dict[Path, int] = {}  # files, and their length when they last were on the disk
        self._names: dict[Path, bytes | None] = {}  # that were made or given away since, and what they named before

    def replacement(self, name: str, function: OsFunction) -> OsFunction:
        def call(*arguments: Any, **named: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else arguments[0])
            if self.folder not in path.parents and (path, name) != (self.folder, "fsync"):
                return function(*arguments, **named)
            if name == "open" and not arguments[1] & os.O_CREAT:
                return function(*arguments, **named)
            with self._lock:
                self.count += 1
                if self.count > self.number:
                    return self.failure(self.count - self.number - 1, name, function, arguments)
                self._note(name, path, arguments)
                return function(*arguments, **named)

        return call

    def _note(self, name: str, path: Path, arguments: tuple[Any, ...]) -> None:
        """Records what a power loss could undo, before it is done."""
        if name == "fsync":
            for synced in [path] if path.is_file() else [p for p in self._names if p.parent == path]:
                (self._unsynced if path.is_file() else self._names).pop(synced, None)
        elif name in ("write", "pwrite"):
            self._unsynced.setdefault(path, path.stat().st_size)
        elif name == "replace":
            target = Path(arguments[1])
            self._names[target] = target.read_bytes() if target.exists() else None
        elif name == "unlink" or not path.exists():
            self._names[path] = path.read_bytes() if path.exists() else None

    def lose_power(self, chance: random.Random) -> None:
        """Loses some of what was not synced."""
        for path, length in self._unsynced.items():
            if path.exists() and chance.random() < 0.7:
                content = path.read_bytes()
                kept = chance.randint(length, len(content))
                path.write_bytes(content[:kept] + bytes(len(content) - kept) * chance.randrange(2))
        for path, content in self._names.items():
            if chance.random() < 0.5:
                if content is not None:
                    path.write_bytes(content)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def patched(calls: FileCalls) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "write", "pwrite", "fsync", "ftruncate", "replace", "unlink", "mkdir"):
            patch.setattr(os, name, calls.replacement(name, getattr(os, name)))
        yield


def power_cut(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    raise PowerCut


def interrupt(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    if later == 0:
        raise KeyboardInterrupt
    return function(*arguments)


def interrupt_after(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    result = function(*arguments)
    if later == 0:
        raise KeyboardInterrupt
    return result


def disk_full(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    if name in ("open", "write", "pwrite", "mkdir"):
        raise OSError(errno.ENOSPC, "No space left on device")
    return function(*arguments)


def short_write(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    if later == 0 and name in ("write", "pwrite"):
        descriptor, content, *position = arguments
        return function(descriptor, content[: len(content) // 2], *position)
    return function(*arguments)


def disk_full_after_a_part(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    return (disk_full if later else short_write)(later, name, function, arguments)


def full_for_a_moment(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    return disk_full(later, name, function, arguments) if later == 0 else function(*arguments)


def sync_fails(later: int, name: str, function: OsFunction, arguments: tuple[Any, ...]) -> Any:
    if name == "fsync":
        raise OSError(errno.EIO, "Input/output error")
    return function(*arguments)


# What happens, how the run ends, and of which calls: of every one, second or third.
FAILURES: dict[str, tuple[Failure, type[BaseException], int]] = {
    "power cut": (power_cut, PowerCut, 1),
    "interrupt": (interrupt, KeyboardInterrupt, 3),
    "interrupt after": (interrupt_after, KeyboardInterrupt, 3),
    "disk full": (disk_full, DiskFullError, 2),
    "disk full after a part": (disk_full_after_a_part, DiskFullError, 3),
    "full for a moment": (full_for_a_moment, DiskFullError, 3),
    "short write": (short_write, DiskFullError, 3),
    "sync fails": (sync_fails, DiskFullError, 2),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "context"


class Whole(NamedTuple):
    """A context that nothing interrupted."""

    folder: Path
    digests: list[str]
    answer: torch.Tensor


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """A context, and the same once its documents were changed."""
    top = tmp_path_factory.mktemp("whole")
    keep(top / "new", IDS, KIND)
    shutil.copytree(top / "new", top / "change")
    keep(top / "change", OTHER_IDS, KIND)
    return {name: Whole(top / name, block_digests(top / name), answer(top / name, KIND)) for name in ("new", "change")}


@pytest.mark.parametrize("what", ["new", "change"])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_last_that_is_done_to_a_file(tmp_path: Path, wholes: dict[str, Whole], what: str, failure: str) -> None:
    """At each of a run's calls in turn."""
    act, error, step = FAILURES[failure]
    ids = IDS if what == "new" else OTHER_IDS
    failed = 0
    for number in itertools.count(step=step):
        folder = tmp_path / f"{number}" / "context"
        folder.mkdir(parents=True)
        if what == "change":
            shutil.copytree(wholes["new"].folder, folder, dirs_exist_ok=True)
        calls = FileCalls(folder, number, act)
        said = None
        try:
            with patched(calls):
                keep(folder, ids, KIND)
        except error as caught:
            said = str(caught)
            failed += 1
        if calls.count <= number:
            break
        if failure == "power cut":
            calls.lose_power(random.Random(number))
        elif error is DiskFullError and said is not None:
            for file in folder.rglob("*.safetensors"):
                UnitFile(file, header_sha256=None).verify()  # nothing is left that was written in part
        check_readers(folder, [wholes["new"]] if what == "new" else [wholes["new"], wholes["change"]])
        start = keep(folder, ids, KIND)
        if error is DiskFullError and said is not None:
            check_message(folder, said, start if what == "new" else None)
        assert block_digests(folder) == wholes[what].digests, number
        assert torch.equal(answer(folder, KIND), wholes[what].answer), number
        ends = [n for n, name in enumerate(journal_types(folder), 1) if name == "end"]
        assert json.loads((folder / HEAD).read_text())["records"] == ends[-1], number
        if failure != "power cut":
            assert not [path for path in folder.iterdir() if path.name.startswith(".")], number
    assert failed > 5 or failure == "short write"


def check_readers(folder: Path, wholes: list[Whole]) -> None:
    """Readers see the newest complete set of documents, if there is any."""
    try:
        complete = sum(state.is_complete for state in Context.read(folder).states)
    except ContextError:
        complete = 0
    assert complete or len(wholes) == 1
    if complete:
        assert torch.equal(answer(folder, KIND), wholes[complete - 1].answer)
    else:
        with pytest.raises(ContextError, match=r"no manifest|nothing was read|reading was interrupted"):
            answer(folder, KIND)


def check_message(folder: Path, said: str, kept: int | None) -> None:
    """One line that names the folder, the reason, what is kept, and the remedy."""
    why = r"No space left on device|Input/output error|File too large|only \d+ of a journal line's \d+ bytes .*"
    match = re.fullmatch(
        rf"{re.escape(str(folder))}: cannot be written: ({why}); "
        r"(nothing of this was|[\d,]+ tokens are) kept: (free some space|fix that|.*\(ulimit -f\).*,) and .* again",
        said,
    )
    assert match, said
    if kept is not None:
        assert match[2] in ([f"{kept} tokens are"] if kept else ["nothing of this was", "0 tokens are"]), (said, kept)


def test_the_systems_limit_of_a_files_size(folder: Path, wholes: dict[str, Whole]) -> None:
    """A real one, repeatedly: what still fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 400, 1500, 3000, 9000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(DiskFullError) as caught:
                keep(folder, IDS, KIND)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        check_message(folder, str(caught.value), 0)
        check_readers(folder, [wholes["new"]])
    keep(folder, IDS, KIND)
    assert block_digests(folder) == wholes["new"].digests
