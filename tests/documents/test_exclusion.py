"""What git ignores is left out, whether git is asked or not, and no repository can make it do anything else."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import l4ctx.documents.exclusion.git
import l4ctx.documents.exclusion.rules
from l4ctx.documents.document import DocumentError, DocumentSet
from l4ctx.documents.exclusion.git_config import core_settings
from l4ctx.documents.reader import read_documents
from l4ctx.documents.selection import Selection
from support.ignore_rules import random_name, random_rules

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle for ignore rules, is missing")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any configuration."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return folder


@pytest.fixture(params=["git", "ours"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ours":
        without_git(monkeypatch)
    return request.param


def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l4ctx.documents.exclusion.rules, "git_program", lambda: None)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def repository(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q")
    return write(folder, files)


def git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True).stdout


def read(*paths: Path, skip_unreadable: bool = False) -> DocumentSet:
    return read_documents(paths, stdin=None, skip_unreadable=skip_unreadable, selection=Selection(keep_duplicates=True))


def sources(found: DocumentSet) -> list[str]:
    return [document.source for document in found.documents]


def reasons(found: DocumentSet) -> dict[str, str]:
    return {entry.source: entry.reason for entry in found.skipped if "hidden" not in entry.reason}


def test_every_file_of_patterns_holds(tmp_path: Path, home: Path, way: str) -> None:
    write(home, {".gitconfig": "[core]\n\texcludesFile = ~/mine # a comment\n", "mine": "*.sql\n*.md\n"})
    names = ["a.sql", "b.md", "keep.md", "secret.txt", "sub/c.log", "sub/d.txt", "out/e.txt", "sub/keep.sql"]
    repo = repository(
        tmp_path / "r",
        dict.fromkeys(names, "text")
        | {
            ".gitignore": "*.log\nout/\n",
            "sub/.gitignore": "!keep.sql\n",
            ".git/info/exclude": "secret.txt\n!keep.md\n",
        },
    )
    found = read(repo)
    assert sources(found) == ["r/keep.md", "r/sub/d.txt", "r/sub/keep.sql"] and found.notes == []
    by = {
        "a.sql": "core.excludesFile",
        "b.md": "core.excludesFile",
        "secret.txt": ".git/info/exclude",
        "sub/c.log": ".gitignore",
        "out": ".gitignore",
    }
    assert reasons(found) == {
        f"r/{name}": f"ignored by {file if way == 'ours' else 'git'}" for name, file in by.items()
    }


@pytest.mark.parametrize(
    ("files", "variables"),
    [
        ({".config/git/ignore": "*.sql"}, {}),
        ({"xdg/git/ignore": "*.sql"}, {"XDG_CONFIG_HOME": "xdg"}),
        (
            {
                "xdg/git/config": '[core "x"]\nexcludesFile=~/no\n[CORE] ExcludesFile = "~/my file"\n',
                "my file": "*.sql",
            },
            {"XDG_CONFIG_HOME": "xdg"},
        ),
        (
            {
                ".gitconfig": "[core]\n\texcludesfile = ~/no\n[user]\n\tname = x\n[core]\nexcludesFile=~/yes\n",
                "yes": "*.sql",
                "no": "*.md",
            },
            {},
        ),
        (
            {
                "other": "[core]\nexcludesFile = ~/a\\\\b ; comment\n",
                "a\\b": "*.sql",
                ".gitconfig": "[core]\nexcludesFile=x",
            },
            {"GIT_CONFIG_GLOBAL": "other"},
        ),
    ],
)
def test_the_users_own_configuration(
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    files: dict[str, str],
    variables: dict[str, str],
) -> None:
    write(home, files)
    for name, path in variables.items():
        monkeypatch.setenv(name, str(home / path))
    assert sources(read(repository(tmp_path / "r", {"a.sql": "a", "b.md": "b"}))) == ["r/b.md"]


def test_what_is_tracked_is_never_ignored(tmp_path: Path) -> None:
    repo = repository(
        tmp_path / "r",
        {
            ".gitignore": "*.log\nold/\n",
            "a.log": "a",
            "b.log": "b",
            "old/c.md": "c",
            "old/d.md": "d",
            "old/deep/e.md": "e",
        },
    )
    git(repo, "add", "-f", "a.log", "old/c.md")
    found = read(repo)
    assert sources(found) == ["r/a.log", "r/old/c.md"]
    assert set(reasons(found)) == {"r/b.log", "r/old/d.md", "r/old/deep"}


def test_a_repository_inside_has_rules_of_its_own(tmp_path: Path, way: str) -> None:
    repo = repository(tmp_path / "r", {".gitignore": "*.log\nlost/\n", "a.log": "a", "b.md": "b", "sub/c.log": "c"})
    for name in ("sub/inner", "lost/inner"):
        repository(repo / name, {".gitignore": "*.md", "d.log": "d", "e.md": "e", "deep/f.md": "f", "deep/g.txt": "g"})
    assert sources(read(repo)) == ["r/b.md", "r/sub/inner/d.log", "r/sub/inner/deep/g.txt"]
    assert sources(read(repo / "lost" / "inner")) == ["inner/d.log", "inner/deep/g.txt"]


def test_a_linked_work_tree_shares_the_exclude_file(tmp_path: Path, way: str) -> None:
    repo = repository(tmp_path / "r", {"a.md": "a", ".git/info/exclude": "*.log\n"})
    git(repo, "-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x")
    git(repo, "worktree", "add", "-q", "../other")
    write(tmp_path / "other", {"b.log": "b", "c.md": "c"})
    assert sources(read(tmp_path / "other")) == ["other/c.md"]


@pytest.mark.parametrize("named", ["sub", "sub/deep", "old", "old/deep", "mixed"])
def test_a_folder_inside_a_work_tree(tmp_path: Path, way: str, named: str) -> None:
    """The rules above it hold; in a folder that is itself ignored, those inside it do."""
    names = [
        f"{folder}/{name}"
        for folder in ("sub", "sub/deep", "old", "old/deep", "mixed")
        for name in ("a.log", "b.md", "c.txt")
    ]
    names = [name for name in names if not name.startswith("mixed/") or name.endswith(".log")]
    repo = repository(
        tmp_path / "r",
        dict.fromkeys(names, "text") | {".gitignore": "*.log\n/old/\n/sub/deep/b.md\n", "old/.gitignore": "*.txt\n"},
    )
    wanted = {
        "sub": ["b.md", "c.txt", "deep/c.txt"],
        "sub/deep": ["c.txt"],
        "mixed": [],
        "old": ["a.log", "b.md", "deep/a.log", "deep/b.md"],
        "old/deep": ["a.log", "b.md"],
    }[named]
    assert [name.partition("/")[2] for name in sources(read(repo / named))] == wanted


def test_links_do_not_lead_around_the_rules(tmp_path: Path, way: str) -> None:
    repo = repository(
        tmp_path / "r", {".gitignore": "z/*.log\nsecret\n", "z/a.log": "a", "z/b.md": "b", "secret/c": "c"}
    )
    for link, target in {"aa": "z", "bb": "secret/c", "cc": "secret", "dd": "z/a.log"}.items():
        (repo / link).symlink_to(target)
    found = read(repo)
    assert sources(found) == ["r/aa/b.md"]
    assert [reasons(found)[f"r/{link}"] for link in ("bb", "cc", "dd")] == ["a symbolic link to something ignored"] * 3


def test_random_trees_are_read_as_git_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        repo = repository(tmp_path / str(seed), {})
        folders = [os.fsencode(repo)]
        for _ in range(draw.randint(0, 6)):
            folders.append(os.path.join(draw.choice(folders), random_name(draw)))
            os.makedirs(folders[-1], exist_ok=True)
        for folder in folders:
            for path in {os.path.join(folder, random_name(draw)) for _ in range(3)}:
                if not os.path.lexists(path):
                    Path(os.fsdecode(path)).write_text(path.hex())
            if draw.random() < 0.6:
                Path(os.fsdecode(folder), ".gitignore").write_bytes(random_rules(draw))
        (repo / ".git" / "info" / "exclude").write_bytes(random_rules(draw))
        listed = git(repo, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0")
        wanted = {os.path.join(folders[0], path).hex() for path in listed if path and not path.endswith(b".gitignore")}
        for ours in (False, True):
            with monkeypatch.context() as patch:
                if ours:
                    without_git(patch)
                assert {document.text for document in read(repo).documents} == wanted, (seed, ours)


@pytest.mark.parametrize(
    "config",
    [
        "[core]\n\tfsmonitor = {script}\n",
        "[core]\n\thooksPath = {folder}\n\tfsmonitor = true\n",
        "[core]\n\tpager = {script}\n\teditor = {script}\n\tsshCommand = {script}\n\taskPass = {script}\n[pager]\n"
        '\tls-files = {script}\n[alias]\n\tls-files = !{script}\n[diff]\n\texternal = {script}\n[filter "x"]\n'
        "\tclean = {script}\n\tprocess = {script}\n",
        "[core]\n\tworktree = /etc\n",
        "[include]\n\tpath = {folder}/more\n",
        "[status]\n\tshowUntrackedFiles = no\n",
        "[core]\n\tuntrackedCache = true\n\tsplitIndex = true\n[core]\n\texcludesFile = /dev/zero\n",
    ],
)
def test_no_setting_of_a_repository_runs_a_program_or_changes_what_is_asked(tmp_path: Path, config: str) -> None:
    mark, tools = tmp_path / "it ran", tmp_path / "tools"
    write(tools, {"script": f"#!/bin/sh\ntouch '{mark}'\n", "more": f"[core]\n\tfsmonitor = {tools}/script\n"})
    for name in ("post-index-change", "fsmonitor-watchman"):
        shutil.copy(tools / "script", tools / name)
    for file in tools.iterdir():
        file.chmod(0o755)
    repo = repository(
        tmp_path / "r", {".gitignore": "*.log\n", ".gitattributes": "* filter=x diff=x\n", "a.log": "a", "b.md": "b"}
    )
    git(repo, "add", ".gitignore")
    with (repo / ".git" / "config").open("a") as file:
        file.write(config.format(script=tools / "script", folder=tools))
    found = read(repo)
    assert sources(found) == ["r/b.md"] and reasons(found) == {"r/a.log": "ignored by git"} and found.notes == []
    assert not mark.exists()


def test_what_another_git_passes_on_does_not_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = repository(tmp_path / "other", {".git/info/exclude": "*.md\n"})
    for name, value in {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git/index",
        "GIT_TRACE": 1,
        "GIT_GLOB_PATHSPECS": 1,
        "GIT_PREFIX": "x/",
    }.items():
        monkeypatch.setenv(name, str(value))
    repo = tmp_path / "r"
    subprocess.run(["git", "init", "-q", repo], check=True, env={"PATH": os.environ["PATH"]})
    assert sources(read(write(repo, {".gitignore": "*.log", "a.log": "a", "b.md": "b"}))) == ["r/b.md"]


def broken_index(repo: Path) -> None:
    (repo / ".git" / "index").write_bytes(b"DIRC\0\0\0\2 not an index")


def no_repository(repo: Path) -> None:
    shutil.rmtree(repo / ".git" / "objects")


def odd_file(repo: Path) -> None:
    shutil.rmtree(repo / ".git")
    (repo / ".git").write_text("gitdir: nowhere\n")


def of_others(repo: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in [repo, repo / ".git"]:
        os.chown(path, 65534, 65534)


def waiting_configuration(repo: Path) -> None:
    os.mkfifo(repo / "pipe")
    with (repo / ".git" / "config").open("a") as file:
        file.write("[include]\n\tpath = ../pipe\n")


def waiting_excludes(repo: Path) -> None:
    os.mkfifo(repo / "pipe")
    git(repo, "config", "core.excludesFile", str(repo / "pipe"))


@pytest.mark.parametrize(
    "spoil", [broken_index, no_repository, odd_file, of_others, waiting_configuration, waiting_excludes]
)
def test_where_git_does_not_answer_our_rules_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(l4ctx.documents.exclusion.git, "SECONDS", 0.5)
    repository(tmp_path, {".gitignore": "*\n"})  # which git would find further up
    repo = repository(tmp_path / "r", {".gitignore": "*.log\n", "a.log": "a", "b.md": "b", "sub/c.log": "c"})
    spoil(repo)
    found = read(repo)
    assert sources(found) == ["r/b.md"] and reasons(found)["r/a.log"] == "ignored by .gitignore"
    first = found.notes[0]
    assert first.startswith("r/.git: git does not say what is ignored (") and "\n" not in first
    assert first.endswith("); .gitignore files, .git/info/exclude and core.excludesFile hold")


def test_a_slow_git_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l4ctx.documents.exclusion.git, "SECONDS", 0.3)
    asked: list[str] = []
    original = l4ctx.documents.exclusion.git.ask_git
    monkeypatch.setattr(
        l4ctx.documents.exclusion.rules, "ask_git", lambda *given: asked.append(given[2]) or original(*given)
    )
    for name in ("r", "r/one", "r/two"):
        waiting_excludes(repository(tmp_path / name, {".gitignore": "*.log", "a.log": "a", "b.md": "b"}))
    assert sources(read(tmp_path / "r", tmp_path / "r" / "one")) == ["r/b.md", "r/one/b.md", "r/two/b.md"]
    assert asked == [str(tmp_path / "r")]


def test_too_many_names_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l4ctx.documents.exclusion.git, "MOST_OUTPUT", 50)
    names = [f"a long name {n}.log" for n in range(100)]
    found = read(repository(tmp_path / "r", dict.fromkeys(names, "x") | {".gitignore": "*.log\n", "b.md": "b"}))
    assert sources(found) == ["r/b.md"] and "MiB of names" in found.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe" + "*.md\n".encode("utf-16-le"),
        "*.md\n".encode("utf-16-be"),
        b"\xfe\xff" + "*.md\n".encode("utf-16-be"),
        "#\n*.md\n".encode("utf-16-le"),
    ],
)
@pytest.mark.parametrize("is_repository", [True, False])
def test_utf_16_is_said_to_mean_nothing(tmp_path: Path, way: str, content: bytes, is_repository: bool) -> None:
    folder = write(tmp_path / "d", {"sub/b.md": "b"})
    if is_repository:
        repository(folder, {})
    (folder / "sub" / ".gitignore").write_bytes(content)
    found = read(folder)
    assert sources(found) == ["d/sub/b.md"]
    assert found.notes == [
        "d/sub/.gitignore: is UTF-16, which git does not read as text: its rules do not hold (save it as UTF-8)"
    ]


def test_only_a_real_file_of_sane_size_has_patterns(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "d",
        {"rules": "*.md", "one/a.md": "a", "two/b.md": "b", "three/c.md": "c", "four/d.md": "d", "five/e.md": "e"},
    )
    (folder / "one" / ".gitignore").symlink_to("../rules")
    os.mkfifo(folder / "two" / ".gitignore")
    (folder / "three" / ".gitignore").mkdir()
    with (folder / "four" / ".gitignore").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "five" / ".gitignore").symlink_to("/dev/zero")
    found = read(folder)
    assert sources(found) == [
        f"d/{name}" for name in ("five/e.md", "four/d.md", "one/a.md", "rules", "three/c.md", "two/b.md")
    ]
    assert sorted(found.notes) == [
        "d/five/.gitignore: is a symbolic link, which git does not follow: it has no effect",
        "d/four/.gitignore: is larger than 2 MiB: it has no effect",
        "d/one/.gitignore: is a symbolic link, which git does not follow: it has no effect",
        "d/three/.gitignore: is not a file: it has no effect",
        "d/two/.gitignore: is not a file: it has no effect",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[core]\nexcludesFile",
        "[core\nexcludesFile = x",
        "[core]\nexcludesFile =\n",
        "[]\n=",
        "[core]\n" + "x" * 100_000,
        '[core]\nexcludesFile = "' + "\\" * 9_999,
        "\0\xff",
        "[core]\nexcludesFile = a\0b",
    ],
)
def test_odd_configurations_are_read_in_peace(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"config": text})
    assert isinstance(core_settings(str(tmp_path)).excludes_file, str)


def test_a_name_that_no_file_has_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_git(monkeypatch)
    repo = repository(tmp_path / "r", {"a.txt": "a", ".git/config": "[core]\nexcludesFile = a\0b"})
    found = read(repo)
    assert sources(found) == ["r/a.txt"]
    assert found.notes == [r"r/a\x00b: is no name of a file: it has no effect"]


def test_rules_that_cannot_be_read_refuse(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = repository(tmp_path / "r", {"a.md": "a", "sub/.gitignore": "*.log", "sub/b.log": "b"})
    original = os.open

    def failing(path: str, *rest: int, **named: int) -> int:
        if os.fspath(path).endswith("sub/.gitignore"):
            raise PermissionError(13, "Permission denied")
        return original(path, *rest, **named)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(DocumentError, match=r"^r/sub/\.gitignore: cannot be read: Permission denied \(--skip-unread"):
        read(repo)
    assert "r/a.md" in sources(read(repo, skip_unreadable=True))


def test_a_read_that_ends_early_loses_no_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_git(monkeypatch)
    repo = repository(tmp_path / "r", {"a.md": "a", ".gitignore": "*.log", "b.log": "b"})
    original = os.fstat

    def larger(descriptor: int) -> os.stat_result:
        status = original(descriptor)
        is_rules = status.st_size == len("*.log")
        return os.stat_result((*status[:6], status.st_size + is_rules, *status[7:]))

    monkeypatch.setattr(os, "fstat", larger)
    with pytest.raises(DocumentError, match=r"gitignore: cannot be read: only 5 of its 6 bytes could be read"):
        read(repo)


@pytest.fixture(autouse=True)
def _no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every git that was started has been waited for."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield
    assert all(process.returncode is not None for process in started)
