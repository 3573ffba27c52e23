"""Files of a commit and differences between two: what `git show` and `git diff` print, and nothing that is run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from l4ctx.documents import repository
from l4ctx.documents.document import DocumentError, DocumentSet
from l4ctx.documents.lines import LinesError
from l4ctx.documents.reader import read_documents
from l4ctx.documents.selection import Selection

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git, which reads commits, is missing")

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"
FIRST: dict[str, str | bytes] = {
    "a.md": "one\ntwo\nthree\n",
    "ends:2-3": "of its own\n",
    "docs/b.txt": "not ended",
    "docs/crlf.txt": "a\r\nb\r\n",
    "docs/old/c.py": "x = 1\n",
    "docs/umlauts äöü.txt": "äöü " * 30 + "\n",
    'docs/quo"te\\.txt': "quoted\n",
    "docs/copy.py": "x = 1\n",
    "docs/.hidden/d.txt": "hidden\n",
    "docs/binary.bin": b"\0\1\2" * 100,
    "docs/empty.txt": "",
    "docs/large.lfs": POINTER,
    "tracked.log": "tracked, and ignored\n",
    ".gitignore": "*.log\n",
}
SECOND: dict[str, str | bytes | None] = {
    "a.md": "one\n2\nthree\nfour\n",
    "docs/b.txt": None,
    "docs/new.txt": "new\n",
    "docs/umlauts äöü.txt": "äöü " * 30 + "\nmore\n",
    'docs/quo"te\\.txt': "quoted, changed\n",
    "docs/binary.bin": b"\0\1\3" * 100,
    "docs/empty.txt": "diff --git a/x b/x\n--- a/x\n+++ b/x\n",
    "docs/moved.py": "x = 1\n",
    "docs/old/c.py": None,
}


def git(folder: Path, *arguments: str) -> bytes:
    identity = [
        "-c",
        "user.name=A",
        "-c",
        "user.email=a@b.c",
        "-c",
        "commit.gpgSign=false",
        "-c",
        "core.autocrlf=false",
    ]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        file = folder / name
        if content is None:
            file.unlink()
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two commits, `one` and the newest, with other files in its work tree."""
    folder = tmp_path_factory.mktemp("history") / "repo"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    write(folder, FIRST)
    (folder / "docs" / "link.txt").symlink_to("b.txt")
    (folder / "docs" / "out.txt").symlink_to("/etc/passwd")
    git(folder, "add", "-f", ".")
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{'12' * 20},docs/sub")
    git(folder, "commit", "-qm", "one")
    git(folder, "tag", "one")
    write(folder, SECOND)
    git(folder, "add", "-f", ".")
    git(folder, "commit", "-qm", "two")
    write(folder, {"a.md": "of the work tree\n", "docs/untracked.txt": "of the work tree\n"})
    return folder


@pytest.fixture
def repo(history: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(history)
    return history


def read(*paths: str, skip_unreadable: bool = False, **selection: Any) -> DocumentSet:
    chosen = {"git_ref": "one", **selection} if "diff" not in selection else selection
    return read_documents(paths, stdin=None, skip_unreadable=skip_unreadable, selection=Selection(**chosen))


def names(found: DocumentSet) -> list[str]:
    return [document.source for document in found.documents]


def test_a_commit_is_read_as_git_shows_it(repo: Path) -> None:
    found = read(".")
    listed = git(repo, "ls-tree", "-r", "-z", "--name-only", "one").decode().split("\0")[:-1]
    skipped = {entry.source: entry.reason for entry in found.skipped}
    assert [name for name in listed if name in names(found)] == names(found)
    left_out = {*listed} - {*names(found)}
    assert left_out == {*skipped} - {"docs/.hidden"} | {"docs/.hidden/d.txt"}
    for document in found.documents:
        assert document.text.encode() == git(repo, "show", f"one:{document.source}")
    assert skipped == {
        ".gitignore": "hidden",
        "docs/.hidden": "hidden",
        "docs/binary.bin": "binary",
        "docs/empty.txt": "empty",
        "docs/large.lfs": "a Git LFS pointer, not the file itself (git lfs pull fetches it)",
        "docs/link.txt": "a symbolic link to b.txt",
        "docs/old/c.py": "the same content as docs/copy.py",
        "docs/out.txt": "a symbolic link to /etc/passwd",
        "docs/sub": "a submodule, which has a repository of its own (commit 121212121212)",
    }
    assert found.notes == [f"one is commit {git(repo, 'rev-parse', 'one').decode()[:12]}"]


def test_it_is_the_same_as_a_work_tree_of_it(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "--detach", str(tmp_path / "docs_of_one"), "one")
    of_tree = read_documents([tmp_path / "docs_of_one" / "docs"], stdin=None)
    of_commit = read("docs")
    assert [(d.source, d.sha256) for d in of_commit.documents if "link" not in d.source] == [
        (d.source, d.sha256) for d in of_tree.documents if "link" not in d.source
    ]
    git(repo, "worktree", "remove", "--force", str(tmp_path / "docs_of_one"))


@pytest.mark.parametrize("folder", [".", "docs", ".."])
def test_paths_are_relative_to_the_current_folder(repo: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.chdir(repo / folder)
    path = os.path.relpath(repo / "docs" / "b.txt")
    for named in (path, str(repo / "docs" / "b.txt")):
        (document,) = read(named).documents
        assert document.text == "not ended" and document.source.endswith("b.txt")
    assert len(read(os.path.relpath(repo / "docs")).documents) == 5


def test_lines_and_numbers_of_a_commit(repo: Path) -> None:
    found = read("a.md:2-3", "a.md:2", "ends:2-3", "ends:2-3:1", line_numbers=True)
    assert [document.text for document in found.documents] == [
        "2:two\n3:three\n",
        "2:two\n",
        "1:of its own\n",
        "1:of its own\n",
    ]
    with pytest.raises(LinesError, match=r"a\.md:2-4 has 3 lines"):
        read("a.md:2-4")


def test_patterns_and_sizes_of_a_commit(repo: Path) -> None:
    assert names(read(".", include=["*.txt"], exclude=["docs/cr*", "*quo*"])) == ["docs/b.txt", "docs/umlauts äöü.txt"]
    found = read("docs", exclude=["docs/old/"], max_file_size=64, keep_duplicates=True)
    assert {entry.source: entry.reason for entry in found.skipped}["docs/umlauts äöü.txt"] == (
        "211 B, more than --max-file-size 64 B"
    )
    assert "docs/copy.py" in names(found)
    with pytest.raises(DocumentError, match=r"umlauts äöü\.txt: 211 B, more than"):
        read("docs/umlauts äöü.txt", max_file_size=64)


@pytest.mark.parametrize(
    ("paths", "options", "reason"),
    [
        (["."], {"git_ref": "nothing"}, "--git-ref nothing: no such commit in "),
        (["."], {"git_ref": "HEAD:a.md"}, "--git-ref HEAD:a.md: no such commit in "),
        (["b.md"], {}, "b.md: is not in one"),
        (["b.md:1-2"], {}, "b.md:1-2: is not in one"),
        (["docs:1-2"], {}, "docs:1-2: is not in one"),
        (["docs/link.txt"], {}, "docs/link.txt: a symbolic link to b.txt"),
        (["docs/sub"], {}, "docs/sub: a submodule"),
        (["/"], {}, "/: is in no git work tree"),
        ([""], {}, "a path is empty"),
        (["."], {"diff": "one"}, "--diff one: name two commits, as in main..HEAD"),
        (["."], {"diff": "one..nothing"}, "--diff nothing: no such commit"),
        (["a.md"], {"diff": "one..one"}, "a.md: nothing in it differs in one..one"),
        (["docs/nothing"], {"diff": "one.."}, "docs/nothing: nothing in it differs"),
    ],
)
def test_what_is_refused(repo: Path, paths: list[str], options: dict[str, str], reason: str) -> None:
    with pytest.raises(DocumentError) as error:
        read(*paths, **options)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_no_git_no_commits(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DocumentError, match="git is not installed"):
        read(".")


@pytest.mark.parametrize("path", [".", "docs", "a.md"])
@pytest.mark.parametrize("between", ["one..main", "one..", "one...HEAD"])
def test_differences_are_those_of_git(repo: Path, path: str, between: str) -> None:
    found = read(path, diff=between)
    texts = "".join(document.text for document in found.documents)
    plain = git(repo, "-c", "core.quotePath=false", "diff", "-M", between, "--", path)
    assert texts.encode() == plain
    changed = git(repo, "diff", "-M", "-z", "--name-only", between, "--", path).decode().split("\0")[:-1]
    assert names(found) == [f"{name} (diff {between})" for name in changed]


def test_patterns_choose_among_what_differs(repo: Path) -> None:
    found = read(".", diff="one..main", include=["*.txt"], exclude=["*new*"])
    assert sorted(names(found)) == sorted(
        f"docs/{name} (diff one..main)" for name in ("b.txt", "empty.txt", 'quo"te\\.txt', "umlauts äöü.txt")
    )


def test_a_repository_runs_nothing(repo: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(repo, "clone", "-q", str(repo), str(clone))
    mark = tmp_path / "mark"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    for name in (
        "diff.external",
        "diff.x.command",
        "diff.x.textconv",
        "filter.x.smudge",
        "filter.x.clean",
        "filter.x.process",
        "core.fsmonitor",
        "core.pager",
        "pager.diff",
        "core.sshCommand",
        "core.alternateRefsCommand",
    ):
        git(clone, "config", name, str(program))
    (clone / ".gitattributes").write_text("* diff=x filter=x\n")
    (clone / ".git" / "info" / "attributes").write_text("* diff=x filter=x\n")
    plain = read(str(clone), diff="one..main")
    assert len(plain.documents) == len(read(str(repo), diff="one..main").documents)
    assert len(read(str(clone)).documents) == len(read(str(repo)).documents)
    assert not mark.exists()


def test_content_that_is_not_there(repo: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(repo, "clone", "-q", "--no-hardlinks", str(repo), str(clone))
    blob = git(repo, "rev-parse", "one:docs/b.txt").decode().strip()
    objects = tmp_path / "objects"
    shutil.copytree(clone / ".git" / "objects", objects)
    for pack in (clone / ".git" / "objects" / "pack").glob("*"):
        pack.unlink()
    for pack in (objects / "pack").glob("*.pack"):
        subprocess.run(["git", "-C", str(clone), "unpack-objects", "-q"], stdin=pack.open("rb"), check=True)
    (clone / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(DocumentError, match=r"docs/b\.txt: git does not have its content.*--skip-unreadable"):
        read(str(clone / "docs"))
    with pytest.raises(DocumentError, match=r"b\.txt: git does not have its content"):
        read(str(clone / "docs" / "b.txt"))
    found = read(str(clone / "docs"), skip_unreadable=True)
    assert "docs/b.txt" in [entry.source for entry in found.skipped] and len(found.documents) == 4


def test_git_that_ends_or_never_answers(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("git")
    program = tmp_path / "git"
    program.write_text(f'#!/bin/sh\ncase "$*" in *cat-file*) $HOW ;; *) exec {real} "$@" ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(repository, "git_program", lambda: str(program))
    monkeypatch.setattr(repository, "SECONDS", 1.0)
    for how in ("exit 3", "sleep 60", "echo one two", "echo x blob 99"):
        monkeypatch.setenv("HOW", how)
        with pytest.raises(DocumentError, match=r"a\.md: git cannot read it"):
            read("a.md")
