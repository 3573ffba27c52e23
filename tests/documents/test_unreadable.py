"""A folder of which something cannot be read for a moment is refused, so that no kept context loses a document."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4ctx.documents import reader
from l4ctx.documents.document import DocumentError
from l4ctx.documents.reader import read_documents
from support.cli_runner import TINY, run_here
from support.places import ROOT

ERRORS = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENAMETOOLONG]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.md", "sub/b.md", "sub/deep/c.md", "z.md"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(f"text of {name}")
    return tmp_path / "d"


def failing(monkeypatch: pytest.MonkeyPatch, operation: str, end: str, number: int) -> None:
    """os.`operation` of every path with that end fails."""
    original: Callable[..., Any] = getattr(os, operation)

    def fails(path: Any, *rest: Any, **named: Any) -> Any:
        if not isinstance(path, int) and os.fspath(path).endswith(end):
            raise OSError(number, os.strerror(number), path)
        return original(path, *rest, **named)

    monkeypatch.setattr(os, operation, fails)


def reason_of(number: int) -> str:
    gone = number == errno.ENOENT
    return "vanished while the folder was read" if gone else f"cannot be read: {os.strerror(number)}"


@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[number] for number in ERRORS])
@pytest.mark.parametrize(
    ("operation", "end", "source", "left"),
    [
        ("open", "sub/b.md", "d/sub/b.md", ["a.md", "sub/deep/c.md", "z.md"]),
        ("stat", "sub/b.md", "d/sub/b.md", ["a.md", "sub/deep/c.md", "z.md"]),
        ("stat", "d/sub", "d/sub", ["a.md", "z.md"]),
        ("scandir", "d/sub", "d/sub", ["a.md", "z.md"]),
        ("scandir", "sub/deep", "d/sub/deep", ["a.md", "sub/b.md", "z.md"]),
    ],
)
def test_it_is_refused_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, operation: str, end: str, source: str, left: list[str], number: int
) -> None:
    failing(monkeypatch, operation, end, number)
    with pytest.raises(DocumentError) as raised:
        read_documents([folder], stdin=None)
    assert str(raised.value) == f"{source}: {reason_of(number)} (--skip-unreadable leaves it out)"
    found = read_documents([folder], stdin=None, skip_unreadable=True)
    assert [document.source for document in found.documents] == [f"d/{name}" for name in left]
    assert [(entry.source, entry.reason) for entry in found.skipped] == [(source, reason_of(number))]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_not_a_file_to_leave_out(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    failing(monkeypatch, "open", "sub/b.md", number)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as raised:
        read_documents([folder], stdin=None, skip_unreadable=True)
    assert (raised.value.errno, raised.value.filename) == (number, "d/sub/b.md")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_is_named_is_refused_whatever_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, "scandir", "/d", number)
    with pytest.raises(DocumentError, match=f"/d: the folder cannot be read: {os.strerror(number)}$"):
        read_documents([folder], stdin=None, skip_unreadable=True)


def test_listing_that_breaks_off_is_no_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.scandir

    class Broken:
        def __init__(self, path: str) -> None:
            self.path, self.entries = path, original(path)

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            self.entries.close()

        def __iter__(self) -> Broken:
            return self

        def __next__(self) -> os.DirEntry[str]:
            if self.path.endswith("sub"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", Broken)
    with pytest.raises(DocumentError, match=r"^d/sub: cannot be read: Input/output error \(--skip-unreadable"):
        read_documents([folder], stdin=None)


def test_the_first_three_are_named_and_the_rest_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        (folder / f"m{number}.md").write_text("m")
    failing(monkeypatch, "open", ".md", errno.EACCES)
    with pytest.raises(DocumentError) as raised:
        read_documents([folder, folder / "sub"], stdin=None)
    why = "cannot be read: Permission denied"
    assert str(raised.value) == (
        f"d/a.md: {why}; d/m0.md: {why}; d/m1.md: {why}; and 8 more (--skip-unreadable leaves them out)"
    )


@pytest.mark.parametrize("missing", [1, 5, 12])
def test_a_read_that_ends_early_is_no_shorter_text(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    original = os.fstat

    def larger(descriptor: int) -> os.stat_result:
        status = original(descriptor)
        is_text = os.readlink(f"/proc/self/fd/{descriptor}").endswith("z.md")
        return os.stat_result((*status[:6], status.st_size + missing * is_text, *status[7:]))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the file of a descriptor is told by /proc")
    monkeypatch.setattr(os, "fstat", larger)
    message = r"^d/z\.md: cannot be read: only \d+ of its \d+ bytes could be read \(--skip-unreadable leaves it out\)$"
    with pytest.raises(DocumentError, match=message):
        read_documents([folder], stdin=None)
    with pytest.raises(DocumentError, match=r"z\.md: cannot be read: "):
        read_documents([folder / "z.md"], stdin=None)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_links_are_left_out_or_refused_by_where_they_lead(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (folder.parent / "outside").write_text("outside")
    for name, target in {"in": "z.md", "out": "../outside", "nowhere": "gone", "below a file": "z.md/x"}.items():
        (folder / name).symlink_to(target)
    failing(monkeypatch, "stat", "/out", number)
    found = read_documents([folder], stdin=None)
    assert {entry.source: entry.reason for entry in found.skipped} == {
        "d/below a file": "a symbolic link that leads nowhere",
        "d/nowhere": "a symbolic link that leads nowhere",
        "d/out": "a symbolic link that leaves the folder",
        "d/z.md": "the same as d/in",
    }
    failing(monkeypatch, "stat", "/in", number)
    with pytest.raises(DocumentError, match=r"^d/in: cannot be read"):
        read_documents([folder], stdin=None)


def test_what_is_left_out_anyway_may_be_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".gitignore").write_text("sub\n*.log\n")
    for name in (".hidden", "x.log"):
        (folder / name).write_text("x")
    for operation, end in (("open", "x.log"), ("stat", "x.log"), ("open", ".hidden"), ("scandir", "sub")):
        failing(monkeypatch, operation, end, errno.EACCES)
    assert [document.source for document in read_documents([folder], stdin=None).documents] == ["d/a.md", "d/z.md"]


@pytest.mark.slow
def test_every_command_ends_and_a_kept_context_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, docs, model = str(tmp_path / "context"), str(folder), ("--model", str(TINY))
    assert run_here("prefill", docs, "-o", context, *model).code == 0
    before = {path: path.read_bytes() for path in Path(context).rglob("*") if path.is_file() and path.suffix != ".lock"}
    failing(monkeypatch, "open", "sub/b.md", errno.EIO)
    for arguments in (("plan", docs), ("prefill", docs, "-o", context), ("ask", "What?", docs, "--context", context)):
        ended = run_here(*arguments, *model)
        assert (ended.code, ended.stdout) == (2, "")
        assert ended.stderr == (
            "l4ctx: d/sub/b.md: cannot be read: Input/output error (--skip-unreadable leaves it out)\n"
        )
        assert {path: path.read_bytes() for path in before} == before
    told = run_here("plan", docs, *model, "--skip-unreadable", "--json")
    assert told.code == 0 and "d/sub/b.md" in told.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("closed", ["a.md", "sub", "sub/deep"])
def test_modes_that_keep_a_user_out(closed: str) -> None:
    place = Path("/tmp") / f"l4ctx-{os.getpid()}"
    try:
        (place / "sub" / "deep").mkdir(parents=True)
        for name in ("a.md", "sub/b.md", "sub/deep/c.md"):
            (place / name).write_text("text")
        (place / closed).chmod(0)
        code = (
            "import os\nfrom l4ctx.documents import reader\nos.setgid(65534)\nos.setuid(65534)\ntry:\n"
            f"    reader.read_documents([{str(place)!r}], stdin=None)\n"
            "except reader.DocumentError as error:\n    print(error)"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True, check=True).stdout
    finally:
        shutil.rmtree(place)
    assert said == f"{place.name}/{closed}: cannot be read: Permission denied (--skip-unreadable leaves it out)\n"


def test_a_deep_folder_costs_no_more_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks at paths: with the depth, not with its square."""
    looks = []
    for name in ("stat", "lstat", "readlink", "scandir", "open"):
        original = getattr(os, name)

        def counted(*given: Any, original: Any = original, **named: Any) -> Any:
            looks[-1] += 1
            return original(*given, **named)

        monkeypatch.setattr(os, name, counted)
    for depth in (20, 40, 80):
        folder = tmp_path / str(depth)
        (folder / "/".join("d" * depth)).mkdir(parents=True)
        looks.append(0)
        read_documents([folder], stdin=None)
    assert looks[2] - looks[1] == 2 * (looks[1] - looks[0])
    assert reader  # the module whose calls are counted
