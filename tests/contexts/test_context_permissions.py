"""A context is private to its owner, whatever the umask, and nothing planted in it leads outside."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.disk import Scratch
from cache.errors import DiskFullError, UnreadableError
from l4ctx.cli.tables.inspection import listing
from l4ctx.contexts.folder import FILE, HEAD, JOURNAL, READERS_LOCK, RECREATE, WRITER_LOCK
from l4ctx.contexts.manifest import saved_recipe
from l4ctx.contexts.reader import Context, ContextReader
from l4ctx.contexts.writer import ContextWriter
from l4ctx.errors import ContextError
from l4ctx.inspection.folder import exit_code, inspect_folder
from l4ctx.machine.files import write_atomically
from support.context_toys import BLOCK, CHUNK, Kind, answer, changed, files, fresh_answer, keep, tokens

IDS = tokens(3 * BLOCK + CHUNK + 3)
OTHER = changed(IDS, BLOCK + 3)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder.parent).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }


def check_private(folder: Path) -> None:
    found = modes(folder)
    assert len(found) > 8
    assert found == {name: 0o700 if (folder.parent / name).is_dir() else 0o600 for name in found}


def widen(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077, 0o277, 0o777])
def test_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / "context"
    with umask(mask):
        keep(folder, IDS)
        check_private(folder)
        keep(folder, OTHER, stop=2 * BLOCK)
        check_private(folder)
        keep(folder, OTHER)
        assert torch.equal(answer(folder), fresh_answer(OTHER))
    check_private(folder)


def test_folders_above_are_made_as_usual(tmp_path: Path) -> None:
    with umask(0o022):
        keep(tmp_path / "deep" / "er" / "context", IDS)
    assert stat.S_IMODE((tmp_path / "deep" / "er").stat().st_mode) == 0o755
    check_private(tmp_path / "deep" / "er" / "context")


def test_temporary_files_are_private_and_scratch_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def looked(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            seen.append(stat.S_IMODE(status.st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looked)
    with umask(0):
        keep(tmp_path / "context", IDS)
        with closing(Scratch(tmp_path)) as scratch:
            seen.append(stat.S_IMODE(os.fstat(scratch._file.fileno()).st_mode))
    assert len(seen) > 10 and set(seen) == {0o600}


@pytest.mark.parametrize("is_made", [True, False])
def test_a_folder_that_others_may_read_is_narrowed_when_it_is_written_to(tmp_path: Path, is_made: bool) -> None:
    folder = tmp_path / "context"
    if is_made:
        keep(folder, IDS)
        widen(folder)
        before = modes(folder)
        assert torch.equal(answer(folder), fresh_answer(IDS))  # asking changes nothing
        report = inspect_folder(str(folder), verify=True)
        assert exit_code(report) == 0 and "." in report["others_have_rights_on"]
        assert "\npermissions      others may enter the folder" in listing(report)
        assert modes(folder) == before
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        assert len(writer.notes) == 1 and "others could read it; now only you can" in writer.notes[0]
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        assert writer.notes == []
    keep(folder, OTHER)
    check_private(folder)
    assert inspect_folder(str(folder), verify=True)["others_have_rights_on"] == []


def test_files_that_a_copy_shares_keep_their_modes(tmp_path: Path) -> None:
    keep(tmp_path / "A", IDS)
    widen(tmp_path / "A")
    os.mkdir(tmp_path / "B")
    block = next((tmp_path / "A" / "blocks").iterdir())
    os.link(block, tmp_path / "B" / block.name)
    keep(tmp_path / "A", IDS)
    assert stat.S_IMODE(block.stat().st_mode) == 0o644 and stat.S_IMODE((tmp_path / "A").stat().st_mode) == 0o700


def test_modes_that_cannot_be_changed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "A", IDS)
    widen(tmp_path / "A")

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refused)
    with closing(ContextWriter(tmp_path / "A", Kind().recipe)) as writer:
        assert "others may read it, and that cannot be changed: Operation not permitted" in writer.notes[0]
    keep(tmp_path / "A", OTHER)
    assert torch.equal(answer(tmp_path / "A"), fresh_answer(OTHER))


# What is planted


def test_a_link_under_the_old_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("Dear diary,\n")
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / f".{FILE}.{os.getpid()}").symlink_to(victim)
    keep(folder, IDS)
    (folder / f".{HEAD}.{os.getpid()}").symlink_to(victim)
    keep(folder, OTHER)
    assert victim.read_text() == "Dear diary,\n"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_temporary_names_cannot_be_foreseen_and_are_never_opened_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = set(), os.replace

    def noted(source: Any, target: Any) -> None:
        names.add(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    monkeypatch.setattr(Path, "replace", lambda self, target: noted(self, target))
    for _ in range(5):
        write_atomically(tmp_path / "head.json", "{}")
    assert len(names) == 5
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / ".head.json.0000000000000000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "head.json", "{}")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", [READERS_LOCK, WRITER_LOCK, JOURNAL])
@pytest.mark.parametrize("is_made", [True, False])
def test_links_in_the_place_of_locks_and_journal_make_no_file(tmp_path: Path, name: str, is_made: bool) -> None:
    folder, elsewhere = tmp_path / "context", tmp_path / "elsewhere"
    if is_made:
        keep(folder, IDS)
        (folder / name).unlink()
    else:
        folder.mkdir()
    (folder / name).symlink_to(elsewhere)
    if is_made and name == READERS_LOCK:  # old files stay then, no more
        keep(folder, IDS)
    else:
        with pytest.raises((ContextError, DiskFullError), match=f"{folder}.*(symbolic link|holds other files)"):
            keep(folder, IDS)
    assert not elsewhere.exists()


def test_what_a_crash_left_under_a_temporary_name_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "context"
    keep(folder, IDS)
    left = [f".{name}.{end}" for name in (FILE, HEAD, JOURNAL) for end in ("1234", "0123456789abcdef")]
    left.remove(f".{JOURNAL}.1234")
    for name in left:
        (folder / name).write_text("x")
    (folder / ".notes.txt").write_text("mine")
    keep(folder, OTHER)
    assert [name for name in os.listdir(folder) if name.startswith(".")] == [".notes.txt"]


# What cannot be read for a moment


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("pattern", ["blocks/000000-*", "blocks/000002-*", "tail-*", "tokens-*"])
def test_a_file_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, pattern: str
) -> None:
    """Hours of work are not discarded for it; with --verify the blocks are read again."""
    folder = tmp_path / "context"
    keep(folder, IDS)
    before, path, opened = files(folder), next(folder.glob(pattern)), os.open

    def refused(name: Any, *arguments: Any, **others: Any) -> int:
        if Path(name) == path:
            raise OSError(code, os.strerror(code))
        return opened(name, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        for ids in (IDS, OTHER):
            with pytest.raises(UnreadableError, match=os.strerror(code)):
                keep(folder, ids)
    assert files(folder) == before
    assert torch.equal(answer(folder), fresh_answer(IDS))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        assert keep(folder, IDS, verify=True) < len(IDS)
    assert torch.equal(answer(folder), fresh_answer(IDS))


@pytest.mark.parametrize("name", [FILE, HEAD, JOURNAL])
def test_the_reason_is_said_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nobody is told to create a context again that just cannot be opened for a moment."""
    folder = tmp_path / "context"
    keep(folder, IDS)
    before, opened = files(folder), os.open

    def refused(path: Any, *arguments: Any, **others: Any) -> int:
        if Path(path) == folder / name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(ContextError, match=f"{folder / name}: cannot be read: Permission denied") as caught:
            ContextReader(folder)
        assert RECREATE not in str(caught.value)
        with pytest.raises(Exception, match="Permission denied"):
            keep(folder, OTHER)
    assert files(folder) == before


def test_a_folder_that_cannot_be_looked_into_is_no_new_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "A", IDS)
    for function in ("stat", "listdir"):
        with monkeypatch.context() as patch:

            def refused(path: Any, *_: Any, **__: Any) -> Any:
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, function, refused)
            with pytest.raises(ContextError, match="cannot be read: Input/output error"):
                saved_recipe(tmp_path / "A")
    assert len(Context.read(tmp_path / "A").states) == 1


def test_a_context_without_its_blocks_folder_is_read_anew(tmp_path: Path) -> None:
    keep(tmp_path / "A", IDS)
    shutil.rmtree(tmp_path / "A" / "blocks")
    assert keep(tmp_path / "A", IDS) == 0
    assert torch.equal(answer(tmp_path / "A"), fresh_answer(IDS))
    check_private(tmp_path / "A")
