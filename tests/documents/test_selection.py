"""Which files are read: patterns, sizes, and copies."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from l4ctx.documents.document import DocumentError, DocumentSet
from l4ctx.documents.reader import read_documents
from l4ctx.documents.selection import Selection

NAMES = ["a.py", "b.md", "src/a.py", "src/b.md", "src/deep/c.py", "src/deep/d.txt", "tests/a.py", "#x#", "src/old/e.py"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        file = tmp_path / "p" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "p"


def read(*paths: str | Path, stdin: bytes | None = None, **selection: Any) -> DocumentSet:
    piped = None if stdin is None else io.BytesIO(stdin)
    return read_documents(paths, stdin=piped, selection=Selection(**selection))


def names(found: DocumentSet) -> list[str]:
    return [document.source for document in found.documents]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.py"], [], ["a.py", "src/a.py", "src/deep/c.py", "src/old/e.py", "tests/a.py"]),
        (["*.py"], ["tests/"], ["a.py", "src/a.py", "src/deep/c.py", "src/old/e.py"]),
        (["src/"], [], ["src/a.py", "src/b.md", "src/deep/c.py", "src/deep/d.txt", "src/old/e.py"]),
        (["src/**/*.py"], [], ["src/a.py", "src/deep/c.py", "src/old/e.py"]),
        (["p/src/*.py"], [], ["src/a.py"]),
        (["/*.md"], [], ["b.md"]),
        (["*.md", "*.txt"], ["deep"], ["b.md", "src/b.md"]),
        ([], ["*.py", "!/a.py"], ["#x#", "a.py", "b.md", "src/b.md", "src/deep/d.txt"]),
        ([], ["p/src/", "#x#"], ["a.py", "b.md", "tests/a.py"]),
        (["#*"], [], ["#x#"]),
        (["[ab].*"], ["src"], ["a.py", "b.md", "tests/a.py"]),
    ],
)
def test_patterns_choose_among_the_files_of_a_folder(
    folder: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    found = read("p", include=include, exclude=exclude)
    assert names(found) == [f"p/{name}" for name in expected]
    left_out = {entry.source for entry in found.skipped}
    assert all(
        any(f"p/{name}" == source or f"p/{name}".startswith(f"{source}/") for source in left_out)
        for name in set(NAMES) - set(expected)
    )
    assert all(entry.is_asked for entry in found.skipped)


@pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle of patterns, is missing")
@pytest.mark.parametrize(
    "pattern", ["*.py", "src", "src/", "/src/*.py", "src/**", "**/deep/*", "[!a]*", "d*/c.*", "!a"]
)
def test_an_excluded_file_is_one_that_git_would_ignore(folder: Path, pattern: str) -> None:
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    listed = subprocess.run(
        ["git", "-c", "core.excludesFile=", "ls-files", "-z", "--others", "--exclude", pattern],
        cwd=folder,
        check=True,
        capture_output=True,
    ).stdout
    kept = [name for name in listed.decode().split("\0") if name]
    assert sorted(names(read("p", exclude=[pattern]))) == sorted(f"p/{name}" for name in kept)


def test_patterns_hold_for_files_that_are_named(folder: Path) -> None:
    found = read("p/a.py", "p/b.md", "./p/src/a.py", "p/src/deep/d.txt:1", include=["*.py"], exclude=["p/src/"])
    assert names(found) == ["p/a.py"]
    assert [(entry.source, entry.reason) for entry in found.skipped] == [
        ("p/b.md", "not among --include"),
        ("p/src/a.py", "left out by --exclude"),
        ("p/src/deep/d.txt:1", "left out by --exclude"),
    ]
    assert names(read("p/b.md", "-", stdin=b"text", include=["*.py"])) == ["stdin"]


def test_what_is_left_out_is_not_even_looked_at(folder: Path) -> None:
    (folder / "src" / "loop.py").symlink_to("loop.py")
    (folder / "src" / "deep").chmod(0)
    try:
        assert names(read("p", exclude=["loop.py", "deep/"])) == [
            f"p/{name}" for name in ("#x#", "a.py", "b.md", "src/a.py", "src/b.md", "src/old/e.py", "tests/a.py")
        ]
    finally:
        (folder / "src" / "deep").chmod(0o755)


def test_hidden_and_ignored_files_are_not_included(folder: Path) -> None:
    (folder / ".hidden.py").write_text("hidden")
    (folder / ".gitignore").write_text("/a.py\n")
    assert names(read("p", include=["*.py"])) == [
        f"p/{name}" for name in ("src/a.py", "src/deep/c.py", "src/old/e.py", "tests/a.py")
    ]


def test_too_large_files_are_named(folder: Path) -> None:
    (folder / "b.md").write_text("x" * 2000)
    found = read("p", max_file_size=1024)
    assert "p/b.md" not in names(found) and len(names(found)) == len(NAMES) - 1
    assert [(entry.source, entry.reason, entry.is_asked) for entry in found.skipped] == [
        ("p/b.md", "2.0 KiB, more than --max-file-size 1.0 KiB", False)
    ]
    for path in ("p/b.md", "p/b.md:1"):
        with pytest.raises(DocumentError, match=r"^p/b\.md: 2\.0 KiB, more than --max-file-size 1\.0 KiB"):
            read(path, max_file_size=1024)
    with pytest.raises(DocumentError, match=r"^standard input: 2\.0 KiB, more than"):
        read("-", stdin=b"x" * 2000, max_file_size=1024)
    assert names(read("-", stdin=b"x" * 1024, max_file_size=1024)) == ["stdin"]


def test_what_files_of_a_folder_hold_alike_is_read_once(folder: Path) -> None:
    for name in ("src/deep/copy.py", "z.py"):
        (folder / name).write_text("text of a.py")
    (folder / "link.py").symlink_to("z.py")
    found = read("p")
    assert [(entry.source, entry.reason) for entry in found.skipped] == [
        ("p/link.py", "the same content as p/a.py"),
        ("p/src/deep/copy.py", "the same content as p/a.py"),
        ("p/z.py", "the same content as p/a.py"),
    ]
    everything = read("p", keep_duplicates=True)
    assert len(everything.documents) == len(NAMES) + 2  # the link's file once
    assert names(read("p/z.py", "p/a.py")) == ["p/z.py", "p/a.py"]  # named by the user: both
    named_first = read("p/z.py", "p")
    assert ("p/a.py", "the same content as p/z.py") in [(entry.source, entry.reason) for entry in named_first.skipped]
    assert names(read("-", "p/src/deep", stdin=b"text of a.py")) == [
        "stdin",
        "deep/c.py",
        "deep/d.txt",
    ]


def test_a_part_of_a_file_is_no_copy_of_it(folder: Path) -> None:
    (folder / "long.txt").write_text("text of a.py\nmore\n")
    (folder / "a.py").write_text("text of a.py\n")
    assert "p/a.py" in names(read("p/long.txt:1-2", "p"))
