"""Saved contexts as a person uses them: `l4ctx prefill`, then `ask` with --context or --save-context.

The sample model has attention chunks of 512 tokens here, and a context's rows are two of them, so that three documents
of 930 tokens make several of both.
"""

from __future__ import annotations

import datetime
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import l4ctx.engine.prefill
from model.weights.shards import read_header
from support.cli_runner import (
    CONTROLS,
    Result,
    answer,
    ask,
    change_config,
    changed_checkpoint,
    check_answers,
    check_refused,
    fact_document,
    flip,
    prefill,
    question,
    run_here,
    spans,
    summaries,
    text_file,
    told,
)
from support.context_toys import block_digests, files

pytestmark = pytest.mark.usefixtures("small_rows")
CHUNK, ROW = 512, 1024


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a folder with documents and a context of them; to be copied."""
    top = tmp_path_factory.mktemp("made")
    checkpoint = changed_checkpoint(top, attention_chunk_size=CHUNK)
    with pytest.MonkeyPatch.context() as patch:
        (top / "place").mkdir()
        patch.chdir(top / "place")
        patch.setenv("L4CTX_MODEL", str(checkpoint))
        write_documents("abc")
        result = prefill()
        assert (result.code, result.stdout) == (0, "")
        Path("notes").write_text(result.stderr, encoding="utf-8")
    return top


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder with `docs` and the context `c` of them, and with a model in the environment."""
    shutil.copytree(made / "place", tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("L4CTX_MODEL", str(made / "checkpoint"))
    return tmp_path / "place"


def write_documents(names: str, first: str = "") -> None:
    for name in names:
        text_file(Path("docs", f"{name}.md"), first + fact_document(name))


# What is kept is asked


def test_what_is_kept_is_asked_without_documents(place: Path) -> None:
    total = spans()[-1]
    written = Path("notes").read_text(encoding="utf-8")
    (summary,) = summaries(written)
    assert written == (
        f"l4ctx: 3 documents, {total:,} tokens\n{summary}"
        f"l4ctx: {total:,} tokens are kept in c; ask with: l4ctx ask QUESTION --context c\n"
    )
    assert 2 * ROW + CHUNK < total < 3 * ROW - 100  # two rows, a chunk, and a part of one
    shutil.rmtree("docs")
    before = files(place)
    check_answers()
    assert files(place) == before


def test_ask_keeps_what_it_reads(place: Path) -> None:
    for name in "bc":
        result = ask(name, "docs", "--save-context", "new/deep")
        assert (result.code, result.stdout) == (0, answer(name))
    assert result.stderr.splitlines()[1] == f"l4ctx: {spans()[-1]:,} of {spans()[-1]:,} tokens are in new/deep already"
    shutil.rmtree("docs")
    check_answers(context="new/deep")


CHANGES: dict[str, tuple[Callable[[], object], int | None, str]] = {  # first document that differs; what is asked
    "none": (lambda: None, None, "c"),
    "one more": (lambda: write_documents("d"), None, "ad"),
    "last changed": (lambda: write_documents("c", "A new line.\n"), 2, "bc"),
    "last left out": (lambda: Path("docs/c.md").unlink(), 2, "b"),
    "middle changed": (lambda: write_documents("b", "A new line.\n"), 1, "ac"),
    "middle left out": (lambda: Path("docs/b.md").unlink(), 1, "c"),
    "first changed": (lambda: write_documents("a", "A new line.\n"), 0, "ac"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_documents_beside_a_context_and_into_it(place: Path, change: str) -> None:
    """Asked beside the context, they are read from the first change on, and the context stays as it is; prefill reads
    them into it."""
    act, differing, names = CHANGES[change]
    kept = spans()
    act()
    taken = kept[-1] if differing is None else kept[differing] // CHUNK * CHUNK
    before, paths = files(place), sorted(map(str, Path("docs").iterdir()))
    if differing == 0:
        check_refused(
            ask(names[0], "docs", "--context", "c", "--quiet"), 2, "start differently from those in c, so nothing"
        )
        report = json.loads(ask("a", "docs", "--json", "--quiet").stdout)
    else:
        report = told("docs")
    assert report["reused_tokens"] == taken and [entry["path"] for entry in report["documents"]] == paths
    if differing != 0:
        result = ask(names[0], "docs", "--context", "c")
        assert (result.code, result.stdout) == (0, answer(names[0]))
        assert result.stderr == (
            f"l4ctx: {len(paths)} documents, {report['prompt_tokens']:,} tokens\n"
            f"l4ctx: {taken:,} of {report['prompt_tokens']:,} tokens are taken from c\n"
            + "".join(summaries(result.stderr))
        )
        assert len(summaries(result.stderr)) <= 1
    assert files(place) == before

    written = prefill().stderr
    notes = [line for line in written.splitlines()[1:-1] if f"{line}\n" not in summaries(written)]
    total, reused = spans()[-1], taken if change == "none" else taken // CHUNK * CHUNK
    assert notes == [
        f"l4ctx: {reused:,} of {total:,} tokens are in c already"
        if reused
        else f"l4ctx: none of the {kept[-1]:,} tokens in c can be used: these documents start differently "
        "(docs/a.md has changed)"
    ]
    shutil.rmtree("docs")
    check_answers(names=names)
    assert told()["reused_tokens"] == total


def test_json_and_quiet(place: Path) -> None:
    result = prefill("--json", "--quiet")
    report, kept = json.loads(result.stdout), spans()
    assert (result.code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert list(report) == [
        "prompt_tokens",
        "reused_tokens",
        "context",
        "documents",
        "images",
        "skipped",
        "timings",
        "memory",
    ]
    assert (report["prompt_tokens"], report["reused_tokens"], report["context"]) == (kept[-1], kept[-1], "c")
    listed = [
        {"path": f"docs/{name}.md", "tokens": stop - start}
        for name, (start, stop) in zip("abc", itertools.pairwise(kept), strict=True)
    ]
    assert report["documents"] == listed and report["skipped"] == []
    assert report["timings"]["prefill"] == {"seconds": 0.0, "tokens_per_second": None}
    assert report["memory"]["nope_disk"] == 2 * ROW * 1024
    written = prefill("--json", context="new").stderr
    assert written == f"l4ctx: 3 documents, {kept[-1]:,} tokens\n{''.join(summaries(written))}"
    assert re.search(r"; [\d.]+ [KM]iB on disk$", written)
    assert prefill("--quiet", context="newer") == Result(0, "", "")

    report = told()
    assert list(report) == [
        "answer",
        "stop_reason",
        "generated_tokens",
        "drafts",
        "prompt_tokens",
        "reused_tokens",
        "context",
        "documents",
        "images",
        "skipped",
        "timings",
        "memory",
    ]
    assert report["answer"] + "\n" == answer("a")
    assert report["prompt_tokens"] - report["reused_tokens"] == report["memory"]["token_ids"] // 4
    assert (report["reused_tokens"], report["context"], report["documents"]) == (kept[-1], "c", listed)


def test_a_system_prompt_is_kept(place: Path) -> None:
    check_refused(prefill("--system", "Be brief.", "--quiet"), 7, "another system prompt (--system)", "--replace")
    assert prefill("--system", "Be brief.", "--replace").code == 0
    total = spans()[-1]
    assert "a system prompt" in run_here("inspect", "c").stdout
    check_answers(names="b")
    again = prefill("--system", "Be brief. ")  # as the prompt has it
    assert again.stderr.splitlines()[1] == f"l4ctx: {total:,} of {total:,} tokens are in c already"
    assert told("docs", "--system", "Be brief.")["reused_tokens"] == total
    check_refused(ask("a", "docs", "--context", "c", "--quiet"), 2, "start differently from those in c")


def test_a_context_among_the_documents_is_not_read(place: Path) -> None:
    assert prefill(context="docs/kept").code == 0
    total = spans("docs/kept")[-1]
    assert f"l4ctx: {total:,} of {total:,} tokens are in docs/kept already\n" in prefill(context="docs/kept").stderr
    assert told("docs", context="docs/kept")["reused_tokens"] == total == spans()[-1]


def test_one_writer_at_a_time_beside_any_readers(place: Path) -> None:
    with open("c/writer.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(
            prefill("--quiet"), 7, "c: another process is writing to it; wait for it to finish, or name another"
        )
        check_answers(names="a")


# Refused, and nothing is touched

PREFILL, ASK = ["prefill", "docs", "-o", "c"], ["ask", "q", "--context", "c"]
REFUSED: list[tuple[list[str], int, list[str]]] = [
    (PREFILL[:2], 2, ["no context: name a folder to keep what is read in, with -o CONTEXT"]),
    (["prefill", "-o", "new"], 2, ["no documents: l4ctx prefill PATH... -o CONTEXT"]),
    (["prefill", "docs/x.md", "-o", "new"], 2, ["docs/x.md: no such file or folder"]),
    ([*PREFILL[:3], "docs"], 7, ["docs: holds other files (a.md, b.md, c.md) and no saved context"]),
    ([*PREFILL[:3], "docs/a.md"], 7, ["docs/a.md: a file, not a folder; name a folder"]),
    ([*PREFILL[:3], "docs/a.md/x"], 5, ["docs/a.md/x: cannot be written: Not a directory"]),
    ([*PREFILL, "--kv-dtype", "int8"], 7, ["c: made with --kv-dtype float32, not int8; use that, or another folder"]),
    ([*PREFILL, "--dtype", "float16"], 7, ["c: made with --dtype float32, not float16"]),
    ([*PREFILL, "--attention", "eager"], 7, ["c: made with --attention sdpa, not eager"]),
    ([*PREFILL, "--prefill-chunk-size", "64"], 7, ["c: made with --prefill-chunk-size 512, not 64"]),
    ([*PREFILL, "--kv-device-memory", "1G"], 2, ["--kv-device-memory: ", "--kv-host-memory limits"]),
    ([*ASK[:3], "new"], 7, ["new: no such folder", "l4ctx prefill PATH... -o new"]),
    ([*ASK[:3], "docs"], 7, ["docs: not a saved context: it has no manifest.json"]),
    ([*ASK[:3], "docs/a.md"], 7, ["docs/a.md", "Not a directory"]),
    ([*ASK, "docs", "--save-context", "d"], 2, ["--context", "--save-context", "one of them"]),
    ([*ASK, "--system", "x"], 2, ["--system: ", "give it to l4ctx prefill"]),
    ([*ASK, "--pdf", "both"], 2, ["--pdf: ", "give it to l4ctx prefill"]),
    ([*ASK, "--no-images"], 2, ["--no-images: ", "give it to l4ctx prefill"]),
    ([*ASK, "--kv-dtype", "int8"], 7, ["c: made with --kv-dtype float32, not int8"]),
    ([*ASK, "docs", "--kv-dtype", "fp8"], 7, ["c: made with --kv-dtype float32, not fp8"]),
    ([*ASK, "docs/x.md"], 2, ["docs/x.md: no such file or folder"]),
    ([*ASK, "--max-new-tokens", "10485760"], 2, ["--max-new-tokens 10485760: the prompt's ", " tokens leave "]),
    (["ask", "q", "docs", "--save-context", "docs"], 7, ["docs: holds other files (a.md, b.md, c.md)"]),
    (["ask", "q", "docs", "--save-context", "c", "--dtype", "bfloat16"], 7, ["c: made with --dtype float32, not bfl"]),
]


def test_what_does_not_go_together_is_refused(place: Path) -> None:
    before = files(place)
    for arguments, code, parts in REFUSED:
        check_refused(run_here(*arguments, "--quiet"), code, *parts)
        assert files(place) == before, arguments


def test_refusals_import_no_torch(place: Path) -> None:
    """As l4ctx.run.inputs says: arguments, contexts and documents are looked at before that."""
    lines = [
        [*ASK[:3], "new"],
        [*ASK[:3], "docs"],
        [*PREFILL[:3], "docs"],
        ["prefill", "docs/x.md", "-o", "new"],
        [*PREFILL, "--dtype", "float16"],
    ]
    code = (
        "import contextlib, sys\nfrom l4ctx.cli.app import main\n"
        f"for line in {lines!r}:\n    sys.argv = ['l4ctx', *line]\n    with contextlib.suppress(SystemExit):\n"
        "        main()\n    assert 'torch' not in sys.modules, line"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def _add(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text(encoding="utf-8") + text, "utf-8")


SHARD, NORM = "model-00001-of-00002.safetensors", "language_model.model.norm.weight"
OTHERS: dict[str, Callable[[Path], object]] = {
    "configuration": lambda folder: change_config(folder, attn_scale=0.2),
    "weights": lambda folder: flip(folder / SHARD, read_header(folder / SHARD)[NORM].offset + 1),
    "tokenizer": _add("tokenizer.json", "\n"),
    "chat template": _add("chat_template.jinja", "{# #}"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_checkpoint_is_refused(place: Path, made: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    copy = changed_checkpoint(place, attention_chunk_size=CHUNK, torch_dtype="float16")
    monkeypatch.setenv("L4CTX_MODEL", str(copy))
    check_answers(names="a")  # what the weights are stored in, their own headers say
    OTHERS[what](copy)
    before = files(place)
    for arguments in (
        ASK,
        [*ASK, "docs"],
        ["ask", "q", "docs", "--save-context", "c"],
        PREFILL,
        [*PREFILL, "--verify"],
    ):
        check_refused(
            run_here(*arguments, "--quiet"),
            7,
            f"c: made with another {what} than this checkpoint's (",
            f"use the checkpoint that it was made with ({made / 'checkpoint'}), or another folder",
        )
    assert files(place) == before


# Reading that does not come to its end


def interrupted(monkeypatch: pytest.MonkeyPatch, steps: int, *arguments: str) -> Result:
    """`prefill`, with Ctrl-C after so many steps."""

    def some(*given: Any, **options: Any) -> Iterator[Any]:
        yield from itertools.islice(read(*given, **options), steps)
        raise KeyboardInterrupt

    read = l4ctx.engine.prefill.prefill
    with monkeypatch.context() as patch:
        patch.setattr(l4ctx.engine.prefill, "prefill", some)
        return prefill("--quiet", *arguments)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_an_interrupted_reading_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str) -> None:
    total, options = spans()[-1], ("--kv-dtype", kv_dtype)
    prefill(*options, context="whole")
    shutil.rmtree("c")
    check_refused(
        interrupted(monkeypatch, 1, *options),
        130,
        f"interrupted; 0 of {total:,} tokens are kept in c; the same command resumes there",
    )
    check_refused(interrupted(monkeypatch, 3, *options), 130, f"interrupted; {ROW:,} of {total:,} tokens are kept in c")
    check_refused(
        ask("a", "--context", "c"),
        7,
        f"c: reading was interrupted after {ROW:,} of {total:,} tokens; ",
        "the command that made it (l4ctx prefill PATH... -o) resumes from there",
    )
    assert f"interrupted after {ROW:,} of {total:,} tokens: the same" in run_here("inspect", "c").stdout
    check_refused(interrupted(monkeypatch, 2, *options), 130, f"interrupted; 2,048 of {total:,} tokens are kept in c")
    assert prefill(*options).stderr.splitlines()[1] == f"l4ctx: 2,048 of {total:,} tokens are in c already"
    assert block_digests(Path("c")) == block_digests(Path("whole"))
    shutil.rmtree("docs")
    check_answers()


def test_interrupted_amid_a_change_the_old_documents_are_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = spans(), write_documents("b", "A new line.\n")
    check_refused(interrupted(monkeypatch, 2), 130, f"interrupted; {ROW:,} of ", " tokens are kept in c;")
    assert told()["reused_tokens"] == old[-1]
    assert prefill().stderr.splitlines()[1].startswith(f"l4ctx: {ROW:,} of ")
    check_answers(names="bc")
    assert told()["reused_tokens"] > old[-1]


def test_interrupted_at_the_answer_all_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("l4ctx.engine.generate.generate", lambda *given, **options: signal.raise_signal(signal.SIGINT))
        check_refused(
            ask("a", "docs", "--save-context", "new", "-q"),
            130,
            f"interrupted; all {spans()[-1]:,} tokens of the documents are kept in new",
        )
    check_answers(context="new", names="b")


# Damage

DAMAGE: dict[str, tuple[str, Callable[[Path], object], bool]] = {  # and whether headers and lengths tell of it
    "a byte of a row": ("blocks/000000-*", lambda file: flip(file, -9), False),
    "a byte of a later row": ("blocks/000001-*", lambda file: flip(file, -9), False),
    "a row cut short": ("blocks/000001-*", lambda file: os.truncate(file, 99_999), True),
    "a row missing": ("blocks/000000-*", lambda file: file.unlink(), True),
    "a byte of the tail": ("tail-*", lambda file: flip(file, -9), False),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_mended(place: Path, what: str) -> None:
    pattern, act, is_told = DAMAGE[what]
    digests, damaged = block_digests(Path("c")), next(Path("c").glob(pattern))
    act(damaged)
    before = files(place)
    for arguments in (["--context", "c"], ["docs", "--context", "c"]):
        check_refused(
            ask("a", *arguments, "-q"),
            7,
            f"{damaged}: ",
            "l4ctx inspect c --verify lists the damage, and "
            "l4ctx prefill with the same documents, the same -o and --verify keeps what is before it",
        )
    listed = run_here("inspect", "c", "--verify")
    assert listed.code == 7 and f"{damaged}: " in listed.stdout
    assert files(place) == before
    mended = prefill(*[] if is_told else ["--verify"])
    assert mended.code == 0 and f"l4ctx: {damaged}: " in mended.stderr
    assert "; it is read again from there on\n" in mended.stderr
    assert block_digests(Path("c")) == digests and run_here("inspect", "c", "--verify").code == 0
    check_answers(names="ac")


@pytest.mark.parametrize(
    ("name", "byte", "arguments", "part"),
    [
        ("journal", 30, [], "journal: "),
        ("manifest.json", 30, [], "create the context again"),
        ("head.json", 30, [], "create the context again"),
        ("tokens-*", -30, ["--json"], "l4ctx prefill with the same docum"),
        ("tokens-*", 5000, ["docs"], "l4ctx prefill with the same documents"),
    ],
)
def test_damage_of_what_describes_a_context(place: Path, name: str, byte: int, arguments: list[str], part: str) -> None:
    """The list of documents is read by --json, their tokens where documents are given."""
    flip(next(Path("c").glob(name)), byte)
    before = files(place)
    check_refused(ask("a", *arguments, "--context", "c", "-q"), 7, "c/", part, as_json="--json" in arguments)
    assert files(place) == before


# Dates, standard input, terminals


def test_a_template_that_tells_the_date(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed context keeps the date of its first run."""
    folder = changed_checkpoint(place, attention_chunk_size=CHUNK)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    dated = template.replace("{{- bos_token }}", "{{- bos_token + strftime_now('%A, %d %B %Y') }}")
    (folder / "chat_template.jinja").write_text(dated, encoding="utf-8")
    monkeypatch.setenv("L4CTX_MODEL", str(folder))

    class Yesterday(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Yesterday:
            return cls(2025, 2, 27, 23, 59, 58, tzinfo=tz)

    with monkeypatch.context() as patch:
        patch.setattr("l4ctx.run.context.datetime", SimpleNamespace(datetime=Yesterday))
        assert prefill(context="new").code == 0
    assert "date             2025-02-27T23:59:58\n" in run_here("inspect", "new").stdout
    assert prefill(context="today").code == 0
    yesterday, today = (next(Path(name).glob("tokens-*")).read_bytes() for name in ("new", "today"))
    assert yesterday != today
    total = spans("new")[-1]
    check_answers(context="new", names="b")
    assert f"l4ctx: {total:,} of {total:,} tokens are in new already\n" in prefill(context="new").stderr
    write_documents("d")
    assert told("docs", context="new")["reused_tokens"] == total
    assert f"l4ctx: {total // CHUNK * CHUNK:,} of " in prefill(context="new").stderr
    check_answers(context="new", names="ad")


def test_standard_input(place: Path) -> None:
    text, asked = fact_document("a").encode(), question("a").encode()
    for number, paths in enumerate(((), ("-",))):
        assert run_here("prefill", *paths, "-o", f"new{number}", stdin=text).code == 0
        report = told(context=f"new{number}")
        assert report["answer"] + "\n" == answer("a") and [entry["path"] for entry in report["documents"]] == ["stdin"]
    beside = ask("a", "-", "--context", "new0", stdin=text)
    assert beside.stderr.splitlines()[1].startswith(f"l4ctx: {spans('new0')[-1]:,} of ")
    assert ask("a", "--save-context", "new2", stdin=text).stdout == answer("a")
    check_answers(context="new2", names="a")
    for arguments in (["-"], ["--question-file", "-"]):
        assert run_here("ask", *arguments, "--context", "c", stdin=asked) == Result(0, answer("a"), "")
    forgotten = "standard input holds data that is not read; add - to the paths to read it"
    assert forgotten in run_here("prefill", "docs/a.md", "-o", "new0", stdin=text).stderr
    for content in (b"", b"\0\1"):
        check_refused(run_here("prefill", "-o", "no", stdin=content), 2, "standard input has nothing to read")
    check_refused(run_here("ask", "-", "--context", "c", stdin=b""), 2, "standard input: the question is empty")
    check_refused(run_here("ask", "--context", "c", stdin=asked), 2, "no question: ")
    check_refused(run_here("ask", "-", "-", "--context", "c", stdin=text), 2, "cannot be both the question and")
    assert not Path("no").exists()


def test_a_pipe_beside_a_context_is_not_swallowed(place: Path) -> None:
    with Path("docs/b.md").open(encoding="utf-8") as file:
        assert ask("a", "--context", "c", stdin=file).stdout == answer("a")
        assert file.read() == fact_document("b")


def test_nothing_that_is_kept_steers_the_terminal(place: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\u202e\r"
    context = f"kept\x1b[2J{evil}"
    text_file(place / evil / f"\x1b[31m\n{evil}.md", fact_document("a"))
    results = [
        prefill(paths=(evil,), context=context),
        prefill(paths=(evil,), context=context),
        prefill("--json", paths=(evil,), context=context),
        ask("a", "--context", context),
        ask("a", "--context", context, "--json"),
        ask("a", evil, "--context", context),
        run_here("inspect", context, "--verify"),
        run_here("inspect", context, "--json"),
    ]
    assert [result.code for result in results] == [0] * len(results)
    report = json.loads(results[4].stdout)
    assert report["context"] == context and report["documents"][0]["path"].endswith(".md")
    results += [prefill("--dtype", "float16", paths=(evil,), context=context), ask("a", "--context", f"{context}?")]
    os.truncate(next(Path(context).glob("tail-*")), 5000)
    results += [ask("a", "--context", context), run_here("inspect", context)]
    assert [result.code for result in results[-4:]] == [7] * 4
    for result in results:
        assert not CONTROLS.search(result.stdout + result.stderr), result
