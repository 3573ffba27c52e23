"""Copies of a context by hard links stay independent of each other; each has its own locks, and they are released."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from l4ctx.contexts import locks
from l4ctx.contexts.folder import JOURNAL, READERS_LOCK, WRITER_LOCK
from l4ctx.contexts.journal import Journal
from l4ctx.contexts.reader import ContextReader
from l4ctx.contexts.writer import ContextWriter
from l4ctx.errors import ContextError
from l4ctx.inspection.folder import exit_code, inspect_folder
from support.context_toys import (
    BLOCK,
    Kind,
    answer,
    block_digests,
    changed,
    files,
    fresh_answer,
    keep,
    reading,
    tokens,
)

IDS = tokens(4 * BLOCK + 9)
LONGER = IDS + tokens(2 * BLOCK, seed=1)
OTHER = changed(IDS, BLOCK + 3)


def link_copy(source: Path, target: Path) -> Path:
    """cp -al: new folders, and the same files in them."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    keep(tmp_path / "A", IDS)
    return tmp_path / "A", link_copy(tmp_path / "A", tmp_path / "B")


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files(folder).items()}


CHANGES: dict[str, Callable[[Path], object]] = {
    "more": lambda folder: keep(folder, LONGER),
    "others": lambda folder: keep(folder, OTHER),
    "the same": lambda folder: keep(folder, IDS),
    "interrupted": lambda folder: keep(folder, OTHER, stop=2 * BLOCK),
    "interrupted twice": lambda folder: [keep(folder, LONGER, stop=5 * BLOCK), keep(folder, OTHER, stop=2 * BLOCK)],
    "blocks removed": lambda folder: shutil.rmtree(folder / "blocks"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_copy", [False, True])
def test_what_is_done_to_one_leaves_the_other(copies: tuple[Path, Path], change: str, is_copy: bool) -> None:
    touched, other = copies[::-1] if is_copy else copies
    before = content(other)
    CHANGES[change](touched)
    assert content(other) == before
    assert torch.equal(answer(other), fresh_answer(IDS))
    assert exit_code(inspect_folder(str(other), verify=True)) == 0
    assert keep(other, OTHER) < len(OTHER)  # and it is not in the way of what comes next
    assert torch.equal(answer(other), fresh_answer(OTHER))


def test_both_go_on_in_turn(copies: tuple[Path, Path]) -> None:
    for n in range(4):
        ids = changed(IDS, 20 + 30 * n)
        keep(copies[n % 2], ids)
        assert torch.equal(answer(copies[n % 2]), fresh_answer(ids))
        if n:
            assert torch.equal(answer(copies[1 - n % 2]), fresh_answer(changed(IDS, 30 * n - 10)))


def test_a_copy_made_while_one_is_written(tmp_path: Path) -> None:
    first, copy = tmp_path / "A", tmp_path / "B"
    with closing(ContextWriter(first, Kind().recipe)) as writer:
        steps = reading(writer, IDS)
        while next(steps) < 3 * BLOCK:
            pass
        writer.flush()
        link_copy(first, copy)
        before = content(copy)
        assert keep(copy, IDS) == 2 * BLOCK or keep(copy, IDS) == len(IDS)  # its lock is not the other's
        assert content(copy) != before
        middle = content(copy)
        for _ in steps:
            pass
    assert content(copy) == middle
    for folder in (first, copy):
        assert torch.equal(answer(folder), fresh_answer(IDS))
    assert block_digests(first) == block_digests(copy)


@pytest.mark.parametrize("stop", range(0, 4 * BLOCK, 37))
def test_killed_amid_the_reading_into_one(copies: tuple[Path, Path], stop: int) -> None:
    first, copy = copies
    before = content(first)
    child = os.fork()
    if child == 0:
        try:
            with closing(ContextWriter(copy, Kind().recipe)) as writer:
                for done in reading(writer, OTHER):
                    if done >= stop:
                        os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert content(first) == before and torch.equal(answer(first), fresh_answer(IDS))
    assert torch.equal(answer(copy), fresh_answer(IDS))
    keep(copy, OTHER)
    assert torch.equal(answer(copy), fresh_answer(OTHER)) and torch.equal(answer(first), fresh_answer(IDS))


@pytest.mark.parametrize("torn", [b"", b"0123", b"0" * 400])
def test_a_journal_with_two_names_is_copied_before_it_is_changed(tmp_path: Path, torn: bytes) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.append({"n": 0})
    journal.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(torn)
    os.link(tmp_path / "journal", tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    journal = Journal.open(tmp_path / "journal")
    for n in (1, 2):
        journal.append({"n": n})
    os.link(tmp_path / "journal", tmp_path / "third")  # while it is open
    third = (tmp_path / "third").read_bytes()
    journal.append({"n": 3})
    journal.close()
    assert [record["n"] for record in Journal.read(tmp_path / "journal")] == [0, 1, 2, 3]
    assert (tmp_path / "other").read_bytes() == before and (tmp_path / "third").read_bytes() == third
    assert sorted(os.listdir(tmp_path)) == ["journal", "other", "third"]


def test_a_full_disk_while_the_journal_is_copied(copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, copy = copies
    before = content(first)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(Exception, match="No space left on device"):
            keep(copy, OTHER)
    assert content(first) == before and torch.equal(answer(copy), fresh_answer(IDS))
    keep(copy, OTHER)
    assert torch.equal(answer(copy), fresh_answer(OTHER)) and content(first) == before
    assert not [name for name in content(copy) if name.startswith(".")]


def test_a_journal_that_was_replaced_is_not_written_to(tmp_path: Path) -> None:
    """Its new owner's records would not be chained to ours."""
    journal = Journal.open(tmp_path / JOURNAL)
    journal.append({"n": 0})
    shutil.copy(tmp_path / JOURNAL, tmp_path / "copy")
    os.replace(tmp_path / "copy", tmp_path / JOURNAL)
    with pytest.raises(OSError, match="was replaced by another file"):
        journal.append({"n": 1})
    assert Journal.read(tmp_path / JOURNAL) == [{"n": 0}]


# Locks


@contextmanager
def held(file: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    with file.open("rb") as stream:
        fcntl.flock(stream, kind)
        yield


def test_a_lock_is_not_shared_with_a_copy(copies: tuple[Path, Path]) -> None:
    first, copy = copies
    with closing(ContextWriter(first, Kind().recipe)), closing(ContextReader(first)):
        assert keep(copy, OTHER) < len(OTHER)
        assert len(list((copy / "blocks").iterdir())) == 4  # nobody reads it: what is old is gone
        with pytest.raises(ContextError, match=f"{first}: another process is writing to it"):
            keep(first, OTHER)


def test_a_reader_waits_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "A", IDS)
    monkeypatch.setattr(locks, "READERS_WAIT", 0.7)
    told: list[str] = []
    with held(tmp_path / "A" / READERS_LOCK):
        with pytest.raises(ContextError, match=f"{tmp_path}/A/{READERS_LOCK}: another process has held"):
            ContextReader(tmp_path / "A", told.append)
        with pytest.raises(ContextError, match="another process has held"):
            inspect_folder(str(tmp_path / "A"), verify=False)
    assert len(told) == 1 and "waiting" in told[0]
    assert torch.equal(answer(tmp_path / "A"), fresh_answer(IDS))


def test_a_reader_goes_on_when_the_lock_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "A", IDS)
    stream = (tmp_path / "A" / READERS_LOCK).open("rb")
    fcntl.flock(stream, fcntl.LOCK_EX)
    monkeypatch.setattr(locks.time, "sleep", lambda _: stream.close())
    assert torch.equal(answer(tmp_path / "A"), fresh_answer(IDS))


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_who_holds_the_writers_lock_keeps_writers_out_alone(tmp_path: Path, kind: int) -> None:
    keep(tmp_path / "A", IDS)
    with held(tmp_path / "A" / WRITER_LOCK, kind):
        with pytest.raises(ContextError, match="another process is writing to it"):
            keep(tmp_path / "A", OTHER)
        assert torch.equal(answer(tmp_path / "A"), fresh_answer(IDS))
        assert exit_code(inspect_folder(str(tmp_path / "A"), verify=True)) == 0
