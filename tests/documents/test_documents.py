"""Documents: what is read, in which order, under which name, and that nothing is left out in silence."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from l4ctx.documents.document import DocumentError, DocumentSet
from l4ctx.documents.reader import read_documents
from l4ctx.documents.selection import Selection
from support.places import ROOT

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle for ignore rules, is missing")


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(*paths: str | os.PathLike[str], skip_unreadable: bool = False) -> DocumentSet:
    return read_documents(paths, stdin=None, skip_unreadable=skip_unreadable, selection=Selection(keep_duplicates=True))


def sources(found: DocumentSet) -> list[str]:
    return [document.source for document in found.documents]


def skipped(found: DocumentSet) -> dict[str, str]:
    return {entry.source: entry.reason for entry in found.skipped}


def test_a_folder_is_walked_in_the_order_of_path_bytes(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.md", "a.txt", "a-1.txt", "a/b/c.md", "Z.txt", "é.txt", "a0.txt"]
    folder = write(tmp_path / "docs", {name: f"text of {name}" for name in names})
    found = read(folder)
    assert sources(found) == sorted((f"docs/{name}" for name in names), key=str.encode)
    assert [document.text for document in found.documents] == [f"text of {name[5:]}" for name in sources(found)]
    assert found.skipped == [] and found.notes == []


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("notes/plan.md", "notes/plan.md"),
        ("./notes//plan.md", "notes/plan.md"),
        ("notes/../notes/plan.md", "notes/plan.md"),
        ("../work/notes/plan.md", "work/notes/plan.md"),
        ("notes", "notes/plan.md"),
        ("notes/", "notes/plan.md"),
        ("notes/.", "notes/plan.md"),
        (".", "notes/plan.md"),
        ("..", "{parent}/work/notes/plan.md"),
    ],
)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, expected: str) -> None:
    monkeypatch.chdir(write(tmp_path / "work", {"notes/plan.md": "plan"}))
    assert sources(read(argument)) == [expected.format(parent=tmp_path.name)]


def test_an_absolute_file_is_named_without_the_leading_slash(tmp_path: Path) -> None:
    file = write(tmp_path, {"plan.md": "plan"}) / "plan.md"
    assert sources(read(file)) == [file.as_posix().lstrip("/")]


def test_equal_names_are_made_distinct_whatever_comes_later(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/docs/plan.md": f"plan {name}" for name in ("one", "two", "three")})
    paths = [tmp_path / name / "docs" for name in ("one", "two", "three")]
    assert sources(read(*paths)) == ["docs/plan.md", "docs/plan.md (2)", "docs/plan.md (3)"]
    assert sources(read(*paths[:2])) == ["docs/plan.md", "docs/plan.md (2)"]


def test_what_is_reached_twice_is_read_once_and_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", {"a.md": "a", "sub/b.md": "b"})
    found = read(folder / "sub", folder, folder, folder / "a.md")
    assert sources(found) == ["sub/b.md", "docs/a.md"]
    assert [entry.reason for entry in found.skipped] == [
        "the same as sub",
        "the same as docs",
        "the same as docs/a.md",
    ]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("\ufeffnaïve 日本".encode("utf-16-le"), "naïve 日本"),
        ("\ufeffnaïve 👍".encode("utf-16-be"), "naïve 👍"),
        (b"a\r\nb\rc\n\x85", "a\r\nb\rc\n\ufffd"),
        ("zero width \u200b joiner \u200d".encode(), "zero width \u200b joiner \u200d"),
        (b"x" * 8191 + "é".encode() + b"\0", "x" * 8191 + "é\0"),
    ],
)
def test_text_is_decoded_and_otherwise_left_alone(tmp_path: Path, raw: bytes, text: str) -> None:
    document = read(write(tmp_path, {"a.txt": raw}) / "a.txt").documents[0]
    assert document.text == text
    assert document.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("raw", "text", "note"),
    [
        (
            b"caf\xe9 cr\xe8me \xef\xbf\xbd",
            "caf\ufffd cr\ufffdme \ufffd",
            "not valid UTF-8 in 2 places, first at byte 3",
        ),
        (b"\xef\xbb\xbfcaf\xe9!", "caf\ufffd!", "not valid UTF-8 in 1 place, first at byte 6"),
        (
            b"\xff\xfea\0\x00\xd8b\0\xfd\xff",
            "a\ufffdb\ufffd",
            "not valid UTF-16-LE in 1 place, first at byte 4",
        ),
    ],
)
def test_undecodable_bytes_are_replaced_and_noted(tmp_path: Path, raw: bytes, text: str, note: str) -> None:
    found = read(write(tmp_path / "d", {"a.txt": raw}))
    assert found.documents[0].text == text
    assert found.notes == [f"d/a.txt: {note}: replaced by U+FFFD"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\r\n", "nothing but white space"),
        (b"\xef\xbb\xbf", "nothing but white space"),
        (b"abc\0def", "binary"),
        (b"%PDF-1.7\nall of it printable", "a broken PDF: pdfium finds no document in it"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "damaged: the PNG file is cut short"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "damaged: the JPEG file is cut short"),
        (b"PK\x03\x04\x14\0", "a ZIP archive; unpack it and name the folder: unzip -d unpacked {path}"),
        ("\ufeffa\0".encode("utf-16-le"), "binary"),
        (b"\x01\x02\x03\x04\x05\x06abc", "binary"),
        (
            "Съешь ещё этих мягких булок".encode("cp1251"),
            "not UTF-8; text in an encoding that is not recognised; convert it: iconv -f NAME -t UTF-8, or say it: "
            "--encoding NAME",
        ),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
def test_what_is_no_text_is_skipped_with_the_reason(tmp_path: Path, raw: bytes, reason: str, named: bool) -> None:
    folder = write(tmp_path / "d", {"file": raw})
    found = read(folder / "file" if named else folder)
    assert found.documents == []
    shown = [
        entry.reason.removesuffix('; pip install "l4ctx[encodings]" adds what detects more') for entry in found.skipped
    ]
    assert shown == [reason.format(path=folder / "file")]
    with pytest.raises(DocumentError, match=r"found nothing to read in docs: left out .*file: "):
        found.require_any(["docs"])


def test_hidden_and_ignored_are_one_entry_each_but_read_when_named(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        ".gitignore": "build/\n*.log\n",
        ".env": "secret",
        ".cache/a": "a",
        ".cache/b": "b",
        "build/x": "x",
        "build/y.log": "y",
        "run.log": "log",
        "plan.md": "plan",
    }
    folder = write(tmp_path / "d", files)
    found = read(folder)
    assert sources(found) == ["d/plan.md"]
    assert skipped(found) == {
        "d/.cache": "hidden",
        "d/.env": "hidden",
        "d/.gitignore": "hidden",
        "d/build": "ignored by .gitignore",
        "d/run.log": "ignored by .gitignore",
    }
    named = read(folder / ".env", folder / "run.log", folder / ".cache", folder / "build")
    assert [document.text for document in named.documents] == ["secret", "log", "a", "b", "x", "y"]


def test_rules_of_the_enclosing_repository_hold_below_it(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        ".gitignore": "*.txt\n",
        "repo/.git/HEAD": "ref: refs/heads/main\n",
        "repo/.gitignore": "*.log\n/docs/drafts\nold/\n",
        "repo/docs/.gitignore": "!keep.log\n",
        "repo/docs/drafts/a.md": "a",
        "repo/docs/b.log": "b",
        "repo/docs/keep.log": "keep",
        "repo/docs/c.txt": "outside the repository, *.txt is not asked",
        "repo/old/d.md": "d",
        "repo/old/e.log": "named although ignored",
    }
    repo = write(tmp_path, files) / "repo"
    assert sources(read(repo / "docs")) == ["docs/c.txt", "docs/keep.log"]
    assert sources(read(repo / "old")) == ["old/d.md", "old/e.log"]


@needs_git
def test_ignore_rules_are_those_of_git(tmp_path: Path) -> None:
    rules = "*|!*/|*.txt|!a|a|/a|a/|!a/|/a/*|a/**|!a/b|!/a/b.txt|**/b|b/|!b.txt|a/**/c|c?|[ab]|!c|# x|foo |!**/c.txt"
    for seed in range(12):
        draw = random.Random(seed)
        repo = tmp_path / str(seed)
        folders = [repo]
        for _ in range(6):
            folders.append(draw.choice(folders) / draw.choice("abcx"))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            for _ in range(3):
                file = folder / (draw.choice("abcx") + draw.choice([".txt", ".py", ""]))
                if not file.is_dir():
                    file.write_text(f"text of {file}")
            if folder == repo or draw.random() < 0.5:
                (folder / ".gitignore").write_text("\n".join(draw.choices(rules.split("|"), k=draw.randint(1, 5))))
        assert sorted(sources(read(repo))) == listed_by_git(repo), f"seed {seed}"


@needs_git
@pytest.mark.parametrize(
    "rules",
    [
        "*.txt\n!/a/b",
        "*\n!*/\n!*.txt",
        "/a/*\n!/a/b",
        "a/**\n!a/b.txt",
        "**/b\n!a/b/",
        "!a\n\\#x\nb/ \nb.txt\\ ",
        "a\n!a/b",
        "[ab].txt\r\n",
    ],
)
def test_ignore_rules_that_are_easily_got_wrong(tmp_path: Path, rules: str) -> None:
    names = ["a/b/c.txt", "a/b/c", "a/b.txt", "a/x.txt", "b/a/c.txt", "a.txt", "b.txt", "#x", "b.txt ", "x"]
    repo = write(tmp_path / "r", {**dict.fromkeys(names, "text"), ".gitignore": rules})
    assert sorted(sources(read(repo))) == listed_by_git(repo)


def listed_by_git(repo: Path) -> list[str]:
    """The files that git does not ignore, by the rules of `.gitignore` files alone."""
    subprocess.run(["git", "init", "-q", repo], check=True)
    command: list[str | Path] = ["git", "-C", repo, "ls-files", "-z", "--others"]
    command.append("--exclude-per-directory=.gitignore")
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted(f"{repo.name}/{name}" for name in listed if name and not name.endswith(".gitignore"))


def test_a_broken_rule_is_noted_and_the_others_hold(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {".gitignore": b"\xef\xbb\xbf*.log\r\n!\r\n\xff.md\n", "a.log": "a", "b.md": "b"})
    found = read(folder)
    assert sources(found) == ["d/b.md"]
    assert all(note.startswith("d/.gitignore: line 2") for note in found.notes)


def test_links_are_followed_only_inside_and_never_in_circles(tmp_path: Path) -> None:
    write(tmp_path, {"outside/o.md": "o", "d/sub/b.md": "b", "d/.hidden": "h", "d/z.md": "z"})
    folder = tmp_path / "d"
    links: dict[str, str | Path] = {
        "aa": folder / "sub",
        "dangling": "nowhere",
        "hidden": folder / ".hidden",
        "itself": "itself",
        "leaves": tmp_path / "outside",
        "leaves.md": tmp_path / "outside" / "o.md",
        "sub/up": folder,
        "y.md": folder / "z.md",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found = read(folder)
    assert [(document.source, document.text) for document in found.documents] == [
        ("d/aa/b.md", "b"),
        ("d/y.md", "z"),
    ]
    assert skipped(found) == {
        "d/.hidden": "hidden",
        "d/aa/up": "a symbolic link to a folder that it lies in (a loop)",
        "d/dangling": "a symbolic link that leads nowhere",
        "d/hidden": "a symbolic link to something hidden",
        "d/itself": "a symbolic link that leads nowhere",
        "d/leaves": "a symbolic link that leaves the folder",
        "d/leaves.md": "a symbolic link that leaves the folder",
        "d/sub": "the same as d/aa",
        "d/z.md": "the same as d/y.md",
    }
    assert sources(read(folder / "leaves.md")) == [(folder / "leaves.md").as_posix().lstrip("/")]


def test_pipes_and_sockets_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "d", {"a.md": "a"})
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # a socket's address must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
        found = read(".")
    assert sources(found) == ["a.md"]
    assert skipped(found) == {"pipe": "a named pipe, not a file", "sock": "a socket, not a file"}


def test_a_pipe_that_is_named_is_read(tmp_path: Path) -> None:
    """The shell's <(command) is such a path."""
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # both ends, so that neither open waits
    os.write(writer, b"written by a command")
    reader = threading.Timer(0.2, os.close, [writer])
    reader.start()
    found = read(tmp_path / "pipe")
    reader.join()
    assert [document.text for document in found.documents] == ["written by a command"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
        (FileNotFoundError(2, "No such file"), "vanished while the folder was read"),
    ],
)
def test_a_file_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    folder = write(tmp_path / "d", {"a.md": "a", "b.md": "b"})
    real_open = os.open

    def failing_open(path: str, flags: int, *rest: Any, **named: Any) -> int:
        if os.fspath(path).endswith("a.md"):
            raise error
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", failing_open)
    found = read(folder, skip_unreadable=True)
    assert sources(found) == ["d/b.md"] and skipped(found) == {"d/a.md": reason}
    with pytest.raises(DocumentError, match=rf"^d/a\.md: {reason} \(--skip-unreadable leaves it out\)$"):
        read(folder)
    with pytest.raises(DocumentError, match=r"a\.md: cannot be read"):
        read(folder / "a.md")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "d", {"a.md": "a"})
    real_open = os.open

    def open_and_grow(path: str, flags: int, *rest: Any, **named: Any) -> int:
        descriptor = real_open(path, flags, *rest, **named)
        real_fstat = os.fstat

        def fstat_then_grow(number: int) -> os.stat_result:
            status = real_fstat(number)
            with (folder / "a.md").open("a") as file:
                file.write("more")
            return status

        monkeypatch.setattr(os, "fstat", fstat_then_grow)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_grow)
    assert skipped(read(folder, skip_unreadable=True)) == {"d/a.md": "changed while it was read"}
    with pytest.raises(DocumentError, match=r"d/a\.md: changed while it was read"):
        read(folder)
    assert read(folder / "a.md").notes[0].endswith("a.md: changed while it was read")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing.md"], r"missing\.md: no such file or folder \(check the spelling\)"),
        (["a.md/below"], r"a\.md/below: cannot be read: Not a directory"),
        ([""], "a path is empty"),
        (["nul\0"], r"nul\\x00: cannot be read: embedded null"),
        (["-"], "there is none to read"),
    ],
)
def test_errors_name_the_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.md": "a"}))
    with pytest.raises(DocumentError, match=message) as raised:
        read(*paths)
    assert "\n" not in str(raised.value)


def test_standard_input_is_a_document_once(tmp_path: Path) -> None:
    file = write(tmp_path, {"stdin": "file"}) / "stdin"
    found = read_documents([file, "-"], stdin=io.BytesIO(b"piped\n"))
    assert [(document.source, document.text) for document in found.documents][1] == ("stdin", "piped\n")
    assert skipped(read_documents(["-"], stdin=io.BytesIO(b""))) == {"stdin": "empty"}
    with pytest.raises(DocumentError, match="given twice"):
        read_documents(["-", "-"], stdin=io.BytesIO(b"piped"))


def test_names_that_are_no_text_are_shown_safely(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in (b"bad\xff.md", b"line\nend.md", b"esc\x1b[31m.md"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("text")
    names = sources(read(folder))
    assert names == ["d/bad\\udcff.md", "d/esc\\x1b[31m.md", "d/line\\nend.md"]
    assert all(name.isprintable() for name in names)


def test_an_empty_folder_gives_nothing_and_says_so(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found == DocumentSet()
    with pytest.raises(DocumentError, match=r"found nothing to read in docs: nothing is there$"):
        found.require_any(["docs"])


def test_taking_documents_lets_go_of_them(tmp_path: Path) -> None:
    found = read(write(tmp_path / "d", {f"{n}.md": f"{n}" for n in range(3)}))
    taken = found.take()
    assert next(taken).source == "d/0.md" and len(found.documents) == 2
    assert [document.source for document in taken] == ["d/1.md", "d/2.md"] and found.documents == []


def test_importing_documents_imports_nothing_heavy() -> None:
    code = (
        "import l4ctx.documents.reader, sys; print([m for m in ('torch', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
