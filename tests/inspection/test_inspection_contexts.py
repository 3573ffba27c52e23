"""What l4ctx inspect says of saved contexts, whole, interrupted, damaged in each of their parts, and hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from l4ctx.cli.tables.inspection import listing
from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.contexts.folder import HEAD, JOURNAL, READERS_LOCK
from l4ctx.contexts.locks import deletion_lock
from l4ctx.contexts.reader import Context
from l4ctx.contexts.writer import ContextWriter
from l4ctx.inspection import context as context_report
from l4ctx.inspection.folder import exit_code, inspect_folder
from l4ctx.spans import ImageSpan, Span
from support.context_toys import BLOCK, CHUNK, Kind, changed, keep, reading, spans, tokens
from support.inspection_checks import Break, cut, edit_json, flip, inspected, pipe, randomly_damaged, whats

IDS = tokens(6 * BLOCK + CHUNK + 7)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """complete; interrupted: never complete; changing: another state over a complete one; empty: nothing read."""
    top = tmp_path_factory.mktemp("contexts")
    keep(top / "complete", IDS)
    keep(top / "interrupted", IDS, stop=3 * BLOCK + 1)
    keep(top / "changing", IDS)
    keep(top / "changing", changed(IDS, 4 * BLOCK), stop=5 * BLOCK + 1)
    with closing(ContextWriter(top / "empty", Kind().recipe)):
        pass
    return top


@pytest.fixture
def context(contexts: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(contexts / name, tmp_path / name)


def test_a_complete_context(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    (folder / "tail-0123456789ab.safetensors").write_bytes(b"x" * 77)  # as a crash leaves it
    report, text = inspected(folder, verify=True)
    assert exit_code(report) == 0 and report["made_with"]["weights"] == "1a" * 32 and report["version"] == 1
    [state] = report["states"]
    assert (state["is_newest"], state["is_complete"], state["sealed_blocks"], state["damaged"]) == (True, True, 6, [])
    assert state["tokens"] == state["kept_tokens"] == state["can_keep_tokens"] == len(IDS)
    assert state["documents"] == [
        {"path": "notes/a.txt", "tokens": 17, "sha256": "00" * 32},
        {"path": "b ü.txt", "tokens": len(IDS) - 22, "sha256": "ff" * 32},
    ]
    sizes = report["bytes"]
    on_disk = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes["unused"] == 77 and sum(sizes.values()) == sum(on_disk.values())
    assert sizes["blocks"] == sum(size for name, size in on_disk.items() if name.startswith("blocks/"))
    for part in (
        f"{len(IDS)} tokens, complete (6 sealed blocks)",
        "17 tokens  000000000000  notes/a.txt",
        "unused 77 B",
        "blocks of 32 tokens in segments of 16",
        "weights 1a1a1a1a1a1a,",
        "none, every byte was read",
    ):
        assert part in text


def test_a_size_that_cannot_be_told(context: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without some of the files, a sum would be too small."""
    folder, scandir = context("complete"), os.scandir

    def failing(path: Any) -> Any:
        if Path(path).name == "blocks":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        report = inspect_folder(str(folder), verify=False)
    assert exit_code(report) == 0 and report["bytes"] is None
    assert "on disk          unknown: " in listing(report)


def test_contexts_that_are_not_read_to_the_end(context: Callable[[str], Path]) -> None:
    report, text = inspected(context("interrupted"))
    assert exit_code(report) == 0 and [state["kept_tokens"] for state in report["states"]] == [3 * BLOCK]
    assert f"interrupted after {3 * BLOCK} of {len(IDS)} tokens: the same l4ctx prefill command resumes it" in text
    report, text = inspected(context("changing"))
    assert [(state["is_newest"], state["is_complete"]) for state in report["states"]] == [(True, False), (False, True)]
    assert f"interrupted after {5 * BLOCK} of" in text and "before that      " in text
    report, text = inspected(context("empty"))
    assert exit_code(report) == 0 and report["states"] == [] and "none yet: the l4ctx prefill command" in text


def keep_images(folder: Path, *images: ImageSpan) -> None:
    """A context with these among its tokens, interrupted before the first step."""
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        writer.begin(memoryview(IDS), spans(IDS), Kind().layout(len(IDS)), system=False, images=images)


IMAGES = (ImageSpan(20, 47, "aa" * 32), ImageSpan(BLOCK, BLOCK + 2 * CHUNK, "bb" * 32))


def test_images_among_the_documents(context: Callable[[str], Path], tmp_path: Path) -> None:
    report, text = inspected(context("changing"))
    assert [state["images"] for state in report["states"]] == [[], []] and "\nimages " not in text
    keep_images(tmp_path / "c", *IMAGES)
    report, text = inspected(tmp_path / "c", verify=True)
    assert exit_code(report) == 0 and report["states"][0]["images"] == [
        {"start": 20, "tokens": 27, "sha256": "aa" * 32},
        {"start": 32, "tokens": 32, "sha256": "bb" * 32},
    ]
    assert "\nimages           2, 59 tokens\n" in text


@pytest.mark.parametrize(
    "image",
    [
        ImageSpan(-1, 7, ""),
        ImageSpan(9, 8, ""),
        ImageSpan(9, len(IDS) + 1, ""),
        ImageSpan(10**400, 10**400, ""),
        ImageSpan("x", 4, ""),
    ],  # type: ignore[arg-type]
    ids=lambda image: str(image)[:40],
)
def test_images_that_cannot_be_among_the_tokens(tmp_path: Path, image: ImageSpan) -> None:
    keep_images(tmp_path / "c", image)
    report, text = inspected(tmp_path / "c")
    [state], [damage] = report["states"], whats(report)
    assert exit_code(report) == 7 and "tokens-" in damage and "image" in damage
    assert state["images"] is None and state["damaged"] and state["can_keep_tokens"] == 0
    assert "notes/a.txt" in text and "images           which these are cannot be read\n" in text


def test_a_damaged_list_of_images(tmp_path: Path) -> None:
    keep_images(tmp_path / "c", *IMAGES)
    file = next((tmp_path / "c").glob("tokens-*"))
    flip(file, file.read_bytes().index(b"bb" * 32))
    report, _ = inspected(tmp_path / "c")
    assert exit_code(report) == 7 and "checksum of images" in "".join(whats(report))


def test_many_documents_and_damages_are_cut_for_people(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    report = inspect_folder(str(folder), verify=False)
    report["states"][0]["documents"] *= 12
    report["damage"] = [{"file": "x", "what": f"x {n}"} for n in range(23)]
    text = listing(report)
    assert "and 4 more (--json lists them all)" in text and text.count("notes/a.txt") == 10
    assert "and 3 more (--json lists them all)" in text and "x 19" in text and "x 20" not in text


def state_of(folder: Path, *, newest: bool = True) -> Any:
    made = Context.read(folder)
    return made.states[-1] if newest else made.complete


DAMAGES: dict[str, tuple[str, Break, bool, list[int], str]] = {  # context, damage, is seen unread, kept by state, told
    "a block's bytes": ("complete", lambda f: flip(f / state_of(f).blocks[3].name, -9), False, [3 * BLOCK], "checksum"),
    "a block's header": ("complete", lambda f: flip(f / state_of(f).blocks[3].name, 20), True, [3 * BLOCK], "header"),
    "a block cut short": ("complete", lambda f: cut(f / state_of(f).blocks[2].name), True, [2 * BLOCK], "cut short"),
    "a block missing": ("complete", lambda f: (f / state_of(f).blocks[0].name).unlink(), True, [0], "missing"),
    "a pipe for a block": ("complete", lambda f: pipe(f / state_of(f).blocks[5].name), True, [5 * BLOCK], "read"),
    "the tail": ("complete", lambda f: flip(f / state_of(f).tail.name, -9), False, [6 * BLOCK], "checksum"),
    "token ids": ("complete", lambda f: flip(f / state_of(f).ids.name, -400), False, [0], "checksum"),
    "documents": ("complete", lambda f: flip(f / state_of(f).ids.name, -1), True, [0], "checksum of documents"),
    "token ids missing": ("interrupted", lambda f: (f / state_of(f).ids.name).unlink(), True, [0], "missing"),
    "of an interrupted one": ("interrupted", lambda f: cut(f / state_of(f).blocks[1].name), True, [BLOCK], "cut short"),
    "a shared block": (
        "changing",
        lambda f: flip(f / state_of(f).blocks[1].name, -9),
        False,
        [BLOCK, BLOCK],
        "checksum",
    ),
    "an older block": (
        "changing",
        lambda f: flip(f / state_of(f, newest=False).blocks[4].name, -9),
        False,
        [5 * BLOCK, 4 * BLOCK],
        "checksum",
    ),
    "all blocks": ("complete", lambda f: shutil.rmtree(f / "blocks"), True, [0], "missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_and_what_can_be_kept(case: str, context: Callable[[str], Path]) -> None:
    name, breaking, is_seen_unread, kept, told = DAMAGES[case]
    folder = context(name)
    breaking(folder)
    report, text = inspected(folder)
    assert exit_code(report) == (7 if is_seen_unread else 0)
    report, text = inspected(folder, verify=True)
    assert exit_code(report) == 7 and [state["can_keep_tokens"] for state in report["states"]] == kept
    found = whats(report)
    assert len(found) == len(set(found)) == (6 if case == "all blocks" else 1) and told in found[0]
    for state in report["states"]:
        count = f"first {state['can_keep_tokens']:,}" if state["can_keep_tokens"] else "no"
        if state["damaged"]:
            assert f"{count} tokens can be kept: l4ctx prefill --verify" in text.replace("the first", "first")


@pytest.mark.parametrize("case", [case for case, (name, *_) in DAMAGES.items() if name == "complete"])
def test_as_much_is_kept_as_was_said(case: str, context: Callable[[str], Path]) -> None:
    _, breaking, _, [kept], _ = DAMAGES[case]
    folder = context("complete")
    breaking(folder)
    if case == "all blocks":
        (folder / "blocks").mkdir()
    assert keep(folder, IDS, verify=True) == kept
    assert exit_code(inspected(folder, verify=True)[0]) == 0


BEYOND_USE: dict[str, Break] = {
    "manifest changed": lambda f: edit_json(f / MANIFEST, made_with={}),
    "manifest cut": lambda f: cut(f / MANIFEST, 99),
    "manifest emptied": lambda f: cut(f / MANIFEST, 0),
    "manifest deep": lambda f: (f / MANIFEST).write_text("[" * 10**5),
    "journal changed": lambda f: flip(f / JOURNAL, 100),
    "journal cut": lambda f: cut(f / JOURNAL, (f / JOURNAL).read_bytes().rindex(b"\n", 0, -1) + 1),
    "journal emptied": lambda f: cut(f / JOURNAL, 0),
    "journal missing": lambda f: (f / JOURNAL).unlink(),
    "head changed": lambda f: edit_json(f / HEAD, end="0" * 64),
    "head cut": lambda f: cut(f / HEAD, 5),
}


@pytest.mark.parametrize("case", BEYOND_USE)
def test_nothing_can_be_kept(case: str, context: Callable[[str], Path]) -> None:
    folder = context("complete")
    BEYOND_USE[case](folder)
    report, text = inspected(folder)
    assert exit_code(report) == 7 and len(report["damage"]) == 1 and report["states"] == []
    assert (report["made_with"] is None) == case.startswith("manifest")
    assert text.endswith("\nto keep          nothing can be kept\n")


def test_a_newer_format_is_not_given_up(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    edit_json(folder / MANIFEST, version=2)
    report, text = inspected(folder)
    assert exit_code(report) == 7 and "use the l4ctx that made it" in text and "nothing can be kept" not in text


def forge(folder: Path, **provenance: Any) -> None:
    """A manifest that says something else, with the right checksum."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del content["sha256"]
    content["made_with"] |= provenance
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": digest}), encoding="utf-8")


@pytest.mark.parametrize(
    "provenance",
    [
        {"dtype": "\x1b[2J\nfloat32\t\u202e"},
        {"weights": "\x1b[2J\ud800"},
        {"date": "2026-11-21\n"},
        {"block_tokens": 0},
        {"block_tokens": -32},
        {"block_tokens": 10**4000},
        {"prefill_chunk_size": -1},
    ],
    ids=lambda made: str(made)[:40],
)
def test_a_forged_manifest_does_no_harm(context: Callable[[str], Path], provenance: dict[str, Any]) -> None:
    folder = context("interrupted")
    forge(folder, **provenance)
    inspected(folder, verify=True)


@pytest.mark.parametrize("name", [MANIFEST, HEAD, JOURNAL, READERS_LOCK])
def test_a_pipe_in_a_context_is_not_waited_for(context: Callable[[str], Path], name: str) -> None:
    folder = context("complete")
    pipe(folder / name)
    report, _ = inspected(folder)
    assert exit_code(report) == (0 if name == READERS_LOCK else 7)


def test_paths_of_documents_are_shown_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import context_toys

    source = "a\n\x1b[2J\u202e\tb"
    monkeypatch.setattr(context_toys, "spans", lambda ids: [Span(source, 0, len(ids))])
    keep(tmp_path / "context", IDS[:50])
    report, text = inspected(tmp_path / "context")
    assert report["states"][0]["documents"][0]["path"] == source
    assert "a \ufffd[2J\ufffd b\n" in text


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_at_random_end_in_no_traceback(context: Callable[[str], Path], seed: int) -> None:
    folder = context("changing")
    for _ in randomly_damaged(folder, random.Random(seed)):
        inspected(folder, verify=True)


def test_beside_a_writer(context: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is shown at every moment, and the writer deletes nothing meanwhile."""
    folder = context("complete")
    ids = changed(IDS, 2 * BLOCK)
    locks = []
    work = context_report._bytes_on_disk
    monkeypatch.setattr(
        context_report, "_bytes_on_disk", lambda made: [locks.append(deletion_lock(folder)), work(made)][1]
    )
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        for done in reading(writer, ids):
            report = inspect_folder(str(folder), verify=True)
            assert exit_code(report) == 0, whats(report)
            assert report["states"][0]["kept_tokens"] in range(done // BLOCK * BLOCK - BLOCK, done + 1)
            assert report["states"][-1]["is_complete"]
    assert locks and set(locks) == {None}
    assert [state["tokens"] for state in inspected(folder, verify=True)[0]["states"]] == [len(ids)]


def test_without_permission_to_write(context: Callable[[str], Path]) -> None:
    folder = context("complete")
    (folder / READERS_LOCK).unlink()  # as in a copy for reading
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert exit_code(inspected(folder, verify=True)[0]) == 0
    finally:
        folder.chmod(0o755)
        (folder / "blocks").chmod(0o755)
