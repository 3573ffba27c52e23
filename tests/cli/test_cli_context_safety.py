"""What becomes of a context is what was meant: nothing that it holds is lost unasked, it is added to, and it knows its
model.

The sample model has attention chunks of 512 tokens here, and a context's rows are two of them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4ctx.contexts.folder import digest
from l4ctx.contexts.manifest import read_manifest, saved_checkpoint
from support.cli_runner import (
    FACTS,
    answer,
    ask,
    change_config,
    changed_checkpoint,
    check_answers,
    check_refused,
    fact_document,
    prefill,
    run_here,
    text_file,
    told,
)
from support.context_toys import files
from support.image_files import encoded, pattern

pytestmark = pytest.mark.usefixtures("small_rows")
CHUNK = 512


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a folder with documents and the context `c` of them; to be copied."""
    top = tmp_path_factory.mktemp("made")
    checkpoint = changed_checkpoint(top, attention_chunk_size=CHUNK)
    with pytest.MonkeyPatch.context() as patch:
        (top / "place").mkdir()
        patch.chdir(top / "place")
        patch.setenv("L4CTX_MODEL", str(checkpoint))
        for name in "abc":
            text_file(Path("docs", f"{name}.md"), fact_document(name))
        text_file(Path("other", "d.md"), fact_document("d"))
        assert prefill().code == 0
    return top


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "place", tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("L4CTX_MODEL", str(made / "checkpoint"))
    return tmp_path / "place"


# Nothing is lost unasked

LOST = "it holds other documents, which would be lost: "
LOSSES: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "another folder": (lambda: None, ["other"], f"{LOST}docs/a.md ("),
    "another file": (lambda: None, ["other/d.md"], f"{LOST}docs/a.md ("),
    "fewer files": (lambda: None, ["docs/a.md", "docs/b.md"], f"{LOST}docs/c.md ("),
    "one file, and others": (lambda: None, ["docs/b.md", "other"], f"{LOST}docs/a.md ("),
    "a folder of the same name": (
        lambda: (shutil.rmtree("docs"), shutil.copytree("other", "docs")),
        ["docs"],
        f"{LOST}docs/a.md (",
    ),
    "another system prompt": (
        lambda: None,
        ["docs", "--system", "Be brief."],
        "it holds these documents, read with another system prompt (--system): all ",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("command", ["prefill", "ask"])
def test_what_a_context_holds_is_not_lost_unasked(place: Path, case: str, command: str) -> None:
    act, arguments, said = LOSSES[case]
    act()
    line = {"prefill": ["prefill", *arguments, "-o", "c"], "ask": ["ask", "q", *arguments, "--save-context", "c"]}[
        command
    ]
    before = files(place)
    check_refused(
        run_here(*line, "--quiet"),
        7,
        f"c: {said}",
        " tokens",
        "nothing was changed: name another folder, or add --replace",
    )
    assert files(place) == before
    assert run_here(*line, "--replace", "--quiet", *["--max-new-tokens", "1"] * (command == "ask")).code == 0
    assert run_here(*line, "--quiet", *["--max-new-tokens", "1"] * (command == "ask")).code == 0  # it resumes


def unreadable(path: str, patch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(file: Any, *arguments: Any, **others: Any) -> int:
        if str(file).endswith(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(file, *arguments, **others)

    patch.setattr(os, "open", refused)


def emptied(folder: str) -> None:
    for file in Path(folder).rglob("*.md"):
        file.unlink()


LEFT_OUT = "it holds documents that are left out now, which would be lost: docs/b.md ("
EMPTIED = "it holds documents of folders in which there is nothing to read now, which would be lost: "
BY_ACCIDENT: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], list[str], str, str]] = {
    "unreadable": (
        lambda patch: unreadable("docs/b.md", patch),
        ["docs", "--skip-unreadable"],
        LEFT_OUT,
        "tokens; cannot be read: Permission denied), in all ",
    ),
    "empty": (lambda _: Path("docs/b.md").write_text(""), ["docs"], LEFT_OUT, "tokens; empty), in all "),
    "empty, and named": (
        lambda _: Path("docs/b.md").write_text(""),
        ["docs/a.md", "docs/b.md", "docs/c.md"],
        LEFT_OUT,
        "tokens; empty), in all ",
    ),
    "ignored": (
        lambda _: Path("docs/.gitignore").write_text("b.md\n"),
        ["docs"],
        LEFT_OUT,
        "tokens; ignored by .gitignore), in all ",
    ),
    "a folder without its disk": (lambda _: emptied("docs"), ["docs", "other"], f"{EMPTIED}docs/a.md (", ""),
    "most deleted": (
        lambda _: [Path(f"docs/{name}.md").unlink() for name in "ab"],
        ["docs"],
        "most of what it holds is no longer there, which would be lost: docs/a.md (",
        "",
    ),
}


@pytest.mark.parametrize("case", BY_ACCIDENT)
def test_a_reading_makes_no_context_poorer_by_accident(place: Path, case: str) -> None:
    act, arguments, said, reason = BY_ACCIDENT[case]
    if case == "a folder without its disk":
        assert run_here("prefill", "docs", "other", "-o", "c", "-q").code == 0
    with pytest.MonkeyPatch.context() as patch:
        act(patch)
        before = files(place)
        for line in (["prefill", *arguments, "-o", "c"], ["ask", "q", *arguments, "--save-context", "c"]):
            check_refused(run_here(*line, "-q"), 7, f"c: {said}", reason, "nothing was changed: ", "or add --replace")
        assert files(place) == before
        assert run_here("prefill", *arguments, "-o", "c", "-q", "--replace").code == 0


def test_a_subfolder_that_is_empty_now_and_one_that_is_gone(place: Path) -> None:
    text_file(Path("docs/deep/sub/e.md"), "Some words.")
    assert prefill().code == 0
    emptied("docs/deep")
    check_refused(prefill("-q"), 7, f"{EMPTIED}docs/deep/sub/e.md (")
    shutil.rmtree("docs/deep/sub")
    check_refused(prefill("-q"), 7, f"{EMPTIED}docs/deep/sub/e.md (")
    shutil.rmtree("docs/deep")
    assert prefill().code == 0


GROWTH: dict[str, tuple[Callable[[], object], list[str]]] = {
    "one more": (lambda: shutil.copy("other/d.md", "docs/d.md"), ["docs"]),
    "another folder too": (lambda: None, ["docs", "other"]),
    "another one before": (lambda: None, ["other", "docs"]),
    "one changed at its start": (lambda: text_file(Path("docs/a.md"), "x\n" + fact_document("a")), ["docs"]),
    "one deleted in its folder": (lambda: Path("docs/a.md").unlink(), ["docs"]),
    "one renamed": (lambda: Path("docs/b.md").rename("docs/z.md"), ["docs/a.md", "docs/c.md", "docs/z.md"]),
    "the folder renamed": (lambda: Path("docs").rename("texts"), ["texts"]),
    "named one by one": (lambda: None, ["docs/c.md", "docs/b.md", "docs/a.md"]),
}


@pytest.mark.parametrize("case", GROWTH)
def test_what_grows_or_changes_goes_on(place: Path, case: str) -> None:
    act, paths = GROWTH[case]
    act()
    result = prefill(paths=tuple(paths))
    assert result.code == 0, result


def test_a_lone_document_may_change_and_a_pipe_may_grow(place: Path) -> None:
    text = fact_document("a")
    text_file(Path("log.txt"), text)
    assert prefill(paths=("log.txt",), context="l").code == 0
    text_file(Path("log.txt"), "A line before.\n" + text)
    assert prefill(paths=("log.txt",), context="l").code == 0
    assert run_here("prefill", "-o", "p", stdin=text.encode()).code == 0
    assert run_here("prefill", "-o", "p", stdin=(text + "One more line.\n").encode()).code == 0
    check_refused(run_here("prefill", "-o", "p", "-q", stdin=fact_document("b").encode()), 7, f"{LOST}stdin (")
    check_refused(run_here("prefill", "-o", "l", "-q", stdin=b"Some words."), 7, f"{LOST}log.txt (")


def test_replace_is_for_what_is_kept(place: Path) -> None:
    check_refused(ask("a", "docs", "--replace"), 2, "--replace is for --save-context")
    assert prefill("--replace", context="new").code == 0  # nothing is there yet
    check_answers(context="new", names="b")


# Documents that are added to a context for a question


def ids_of(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], dict[str, object]]:
    """All ids that an answer follows from, those in the context included, and the report."""
    from l4ctx.run import session
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.sizing import Sized

    seen: list[int] = []
    load = session.load

    def spy(sized: Sized, monitor: Monitor) -> session.Session:
        inputs = sized.inputs
        if inputs.context is not None and inputs.request.answers_from_all:
            reader = inputs.context.reader
            seen.extend(reader.context.ids(reader.state))
        seen.extend(inputs.prompt.ids)
        return load(sized, monitor)

    with monkeypatch.context() as patch:
        patch.setattr(session, "load", spy)
        result = run_here("ask", f"What is the access code for the {FACTS['d'][0]}?", *arguments, "--json", "--quiet")
    assert result.code == 0, result
    return seen, json.loads(result.stdout)


@pytest.mark.parametrize("added", [("other",), ("other/d.md", "e.md"), ("docs/a.md", "other", "same/a.md")])
def test_what_is_added_is_as_one_prompt_of_all(
    place: Path, monkeypatch: pytest.MonkeyPatch, added: tuple[str, ...]
) -> None:
    text_file(Path("e.md"), "Another text.\n")
    text_file(Path("same", "docs", "a.md"), "Not the same.\n")
    text_file(Path("same", "a.md"), "Not the same, either.\n")
    before = files(place)
    options = [part for path in added for part in ("--add", path)]
    ids, report = ids_of("--context", "c", *options, monkeypatch=monkeypatch)
    whole, expected = ids_of("docs", *added, monkeypatch=monkeypatch)
    assert ids == whole and report["answer"] == expected["answer"] == answer("d").strip()
    assert report["documents"] == expected["documents"]
    assert report["prompt_tokens"] == expected["prompt_tokens"] == len(whole)
    assert report["reused_tokens"] == told()["reused_tokens"]
    is_held = {"path": "docs/a.md", "reason": "the context holds it already"} in report["skipped"]
    assert is_held == ("docs/a.md" in added)
    assert files(place) == before


def test_another_document_of_a_name_in_the_context(place: Path) -> None:
    text_file(place / "sub" / "docs" / "a.md", fact_document("d"))
    os.chdir(place / "sub")
    report = told("--add", "docs", context="../c")
    assert [entry["path"] for entry in report["documents"]] == ["docs/a.md", "docs/b.md", "docs/c.md", "docs/a.md (2)"]
    assert ask("d", "--add", "docs", "--context", "../c", "-q").stdout == answer("d")


def test_standard_input_and_images_are_added(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ask("d", "--add", "-", "--context", "c", stdin=fact_document("d").encode())
    assert result.stdout == answer("d") and "tokens are taken from c" in result.stderr
    Path("picture.png").write_bytes(encoded(pattern(150, 100), "PNG"))
    ids, report = ids_of("--context", "c", "--add", "picture.png", "--add", "other", monkeypatch=monkeypatch)
    whole, expected = ids_of("docs", "picture.png", "other", monkeypatch=monkeypatch)
    assert ids == whole and report["images"] == expected["images"] != []
    assert report["answer"] == expected["answer"] == answer("d").strip()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["docs", "--add", "other", "--context", "c"], 2, "--add PATH reads PATH behind what --context CONTEXT holds"),
        (["--add", "other"], 2, "--add PATH reads PATH behind"),
        (["docs", "--add", "other", "--save-context", "n"], 2, "--add PATH reads PATH behind"),
        (["--add", "othr", "--context", "c"], 2, "othr: no such file or folder; did you mean other?"),
        (["--add", "other", "--context", "c", "--system", "x"], 2, "--system: "),
        (
            ["other", "--context", "c"],
            2,
            "these documents start differently from those in c, so nothing of it could be reused: "
            "--add other adds them to what it holds",
        ),
        (["docs/b.md", "docs", "--context", "c"], 2, "--add docs/b.md --add docs adds them"),
        (["-", "--context", "c"], 2, "--add - adds them"),
    ],
)
def test_what_does_not_begin_like_the_context_is_refused(
    place: Path, arguments: list[str], code: int, part: str
) -> None:
    before = files(place)
    check_refused(ask("a", *arguments, "--quiet", stdin=b"Some words.\n"), code, part)
    assert files(place) == before


# A context knows its model


def test_a_context_needs_no_model(place: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L4CTX_MODEL")
    check_answers(names="ab")
    assert ask("d", "--add", "other", "--context", "c", "-q").stdout == answer("d")
    assert prefill(paths=("docs", "other")).code == 0
    assert ask("d", "docs", "other", "--save-context", "c", "-q").stdout == answer("d")
    assert f"checkpoint       {made / 'checkpoint'}\n" in run_here("inspect", "c").stdout
    assert json.loads(run_here("inspect", "c", "--json").stdout)["checkpoint"] == str(made / "checkpoint")
    check_refused(prefill(context="new"), 2, "no model: ")
    check_refused(ask("a", "--context", "new"), 7, "new: no such folder")
    check_refused(ask("a", "docs"), 2, "no model: ")


def test_a_model_that_moved_or_changed(place: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L4CTX_MODEL")
    shutil.copytree(made / "checkpoint", "model\x1b[31m")
    moved = str(place / "model\x1b[31m")
    assert prefill("--model", moved, context="new").code == 0
    change_config(Path(moved), attn_scale=0.2)
    (Path(moved) / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    check_refused(
        ask("a", "--context", "new"),
        7,
        "made with another configuration and chat template than this checkp",
        "31m, which has changed since)",
    )
    check_answers("--model", str(made / "checkpoint"), names="a", context="new")  # it is named, and the same
    Path(moved).rename("elsewhere")
    check_refused(
        ask("a", "--context", "new"), 2, "no model: new was made with ", "no such folder is there now", "--model"
    )
    check_refused(ask("a", "--context", "new", "--model", "elsewhere"), 7, "31m, not there now)")
    check_refused(ask("a", "--context", "c", "--model", "elsewhere"), 7, f"({made / 'checkpoint'})")


def rewrite_manifest(change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(Path("c/manifest.json").read_text(encoding="utf-8"))
    del content["sha256"]
    change(content)
    Path("c/manifest.json").write_text(json.dumps({**content, "sha256": digest(content)}), encoding="utf-8")


def test_a_context_that_does_not_tell_its_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like contexts made before: it opens, answers and resumes."""
    rewrite_manifest(lambda content: content.pop("checkpoint"))
    assert saved_checkpoint(Path("c")) is None and read_manifest(Path("c")).prefill_chunk_size == 512
    check_answers(names="a")
    assert prefill(paths=("docs", "other")).code == 0
    assert json.loads(run_here("inspect", "c", "--json").stdout)["checkpoint"] is None
    monkeypatch.delenv("L4CTX_MODEL")
    check_refused(ask("a", "--context", "c"), 2, "no model: ")


@pytest.mark.parametrize("said", [5, "relative/path", "", "/a\0b", ["/a"], True])
def test_a_hint_that_is_no_path_is_damage(place: Path, said: object) -> None:
    rewrite_manifest(lambda content: content.update(checkpoint=said))
    check_refused(ask("a", "--context", "c"), 7, "c/manifest.json: damaged")


@pytest.mark.parametrize("said", ["/nowhere", "/dev/null", "/proc", "/etc"])
def test_a_hint_is_no_more_than_a_place_to_look(place: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    rewrite_manifest(lambda content: content.update(checkpoint=said))
    check_answers(names="a")
    monkeypatch.delenv("L4CTX_MODEL")
    result = ask("a", "--context", "c")
    assert result.code in (2, 3) and result.stdout == "" and said in result.stderr
