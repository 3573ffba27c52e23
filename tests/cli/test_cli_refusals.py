"""How the command refuses what it cannot do: one line in one style, and for programs an object on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from l4ctx.cli.usage import refuse_arguments
from support.cli_runner import (
    TINY,
    check_refused,
    closed_pipe,
    run_here,
    run_on_terminal,
    run_process,
    write_what_is_read,
)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder of documents, with a model in the environment."""
    monkeypatch.chdir(write_what_is_read(tmp_path))
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


# One style


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("frobnicate", "no such command 'frobnicate' (l4ctx --help"),
        ("pln docs", "no such command 'pln'. Did you mean 'p"),
        ("ask q --memory-repor", "no such option: --memory-repor; did you mean --memory-report? (l4ctx ask --help"),
        ("prefill docs -Z", "no such option: -Z (l4ctx prefill --help"),
        ("ask q --top-p 2", "--top-p: "),
        ("ask q --top-k -1", "--top-k: "),
        ("ask q --seed x", "--seed: it should be"),
        ("ask q --model", "option '--model' requires an argument"),
        ("plan --tokens 10x", "--tokens: '10x' is not a number of tokens such as 4096, 128k (128,000)"),
        ("plan --tokens 0", "--tokens: 0 is less than 1"),
        ("ask q --max-new-tokens 0", "--max-new-tokens: 0 is less than"),
        ("plan docs --max-new-tokens -1", "--max-new-tokens: '-1' is not a number of tokens"),
        ("prefill docs --prefill-chunk-size 5.5", "--prefill-chunk-size: '5.5' is not a number of tokens"),
        ("inspect a b", "got unexpected extra argument"),
        ("bench --tokens 4k,x", "--tokens: '4k,x' is not a list of numb"),
        ("ask q docs --kv-host-memory 8", "--kv-host-memory: 8 would be bytes; with a unit it is clear: 8GiB"),
        ("plan docs --kv-device-memory 24", "--kv-device-memory: 24 would be bytes; with a unit it is clear: 24GiB"),
    ],
)
def test_what_is_wrong_with_arguments_is_one_line(inside: Path, arguments: str, said: str) -> None:
    result = run_here(*arguments.split())
    check_refused(result, 2, said)
    assert result.stderr.startswith(f"l4ctx: {said}")
    if not arguments.startswith(("frob", "pln")):
        check_refused(run_here(*arguments.split()[:1], "--json", *arguments.split()[1:]), 2, said, as_json=True)


@pytest.mark.parametrize(
    ("hint", "said"),
    [("'--model' / '-m' (env var: 'L4CTX_MODEL')", "--model: "), ("'MODEL'", "MODEL: "), ("'-o'", "-o: ")],
)
def test_an_option_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str], hint: str, said: str) -> None:
    with pytest.raises(SystemExit):
        refuse_arguments(typer.BadParameter("Path 'a' is not readable.", param_hint=hint))
    assert capsys.readouterr().err == f"l4ctx: {said}Path 'a' is not readable (l4ctx --help lists what there is)\n"


def test_numbers_with_a_unit_are_taken_wherever_tokens_are_counted(inside: Path) -> None:
    options = ("--prefill-chunk-size", "1k", "--max-new-tokens", "0.5k", "--json")
    for text, tokens in (("10M", 10_000_000), ("128k", 128_000), ("128Ki", 131_072)):
        result = run_here("plan", "--tokens", text, *options)
        assert result.code == 0 and f'"prompt_tokens": {tokens},' in result.stdout
        assert '"max_new_tokens": 512' not in result.stdout and '"max_new_tokens": 500' in result.stdout
        assert '"prefill_chunk_size": 1000' in result.stdout


# For programs


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ask", "q", "nothing.md"], 2),
        (["ask"], 2),
        (["prefill", "docs"], 2),
        (["plan"], 2),
        (["inspect", "docs"], 2),
        (["ask", "q", "docs", "--model", "docs"], 3),
        (["plan", "docs", "-m", "docs"], 3),
        (["bench", "--compare", "x"], 2),
        (["prefill", "docs", "-o", "docs"], 7),
        (["ask", "q", "--context", "no"], 7),
        (["ask", "q", "\x1b[31m\n.md"], 2),
    ],
)
def test_an_error_is_an_object_for_programs(inside: Path, arguments: list[str], code: int) -> None:
    check_refused(run_here(*arguments), code)
    check_refused(run_here(*arguments, "--json"), code, as_json=True)


def test_an_object_that_cannot_be_written_changes_no_exit_code(inside: Path) -> None:
    for shell in (">&-", ">/dev/full"):
        assert run_process("plan", "--json", folder=inside, shell=shell).code == 2
    with closed_pipe() as pipe:
        assert run_process("ask", "--json", "--frob", stdout=pipe, folder=inside).code == 2


def test_a_dash_dash_json_among_the_words_is_a_word(inside: Path) -> None:
    check_refused(run_here("inspect", "--frob", "--", "--json"), 2, "--frob")


# Only what was meant is answered


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["q"], None, "no documents: name files or folders, pipe a text in"),
        (["q"], b"", "no documents: standard input"),
        (["q"], b" \n", "no documents: standard input"),
        (["q", "-"], b"", "no documents: standard input"),
        (["q", "--save-context", "new"], None, "no documents: "),
        (["q", "--save-context", "new"], b"", "no documents: "),
        (["--question-file", "question.txt"], None, "no documents: "),
        (["-"], b"What?", "no documents: "),
        (["docs/a.md"], None, "docs/a.md: the name of a file, and no question about it: l4ctx ask QUESTION docs/a.md"),
        (["docs"], b"text", "docs: the name of a folder, and no question"),
        (["."], None, ".: the name of a folder"),
        (["docs/a.md", "--context", "c"], None, "docs/a.md: the name of a file, and no question"),
        (["docs/a.md", "docs/b.txt"], None, "docs/a.md: the name of a file, where the question is expected"),
        (
            ["docs", "What is it?"],
            None,
            "What is it?: no such file or folder, but docs is a folder: are they swapped? The "
            "question comes first: l4ctx ask 'What is it?' docs",
        ),
        (["docs/a.md", "Why", "not"], None, "Why: no such file or folder, but docs/a.md is a file: are they swapped?"),
        (["q", "docs", "--no-documents"], None, "--no-documents asks the model alone"),
        (["q", "--no-documents", "--context", "c"], None, "--no-documents asks the model alone"),
        (["q", "--no-documents"], b"text", "--no-documents asks the model alone"),
    ],
)
def test_no_answer_to_what_was_not_meant(inside: Path, arguments: list[str], stdin: bytes | None, said: str) -> None:
    result = run_here("ask", *arguments, stdin=stdin)
    check_refused(result, 2)
    assert result.stderr.startswith(f"l4ctx: {said}")
    assert not Path("new").exists()


def test_the_model_alone_is_asked_with_a_word(inside: Path) -> None:
    for stdin in (None, b""):
        result = run_here("ask", "Who?", "--no-documents", "--max-new-tokens", "1", "--quiet", stdin=stdin)
        assert (result.code, result.stderr) == (0, "")
    assert run_here("ask", "-", "--no-documents", "--max-new-tokens", "1", stdin=b"Who?").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["What", "is", "the", "code", "docs/"],
            "is: no such file or folder (nor 2 other paths); if it belongs to the "
            "question, put that in quotes: l4ctx ask 'What is the code' docs/",
        ),
        (
            ["Why", "not?", "docs", "empty.txt"],
            "not?: no such file or folder; if it belongs to the question, put that in "
            "quotes: l4ctx ask 'Why not?' docs empty.txt",
        ),
        (["Who", "wrote", "this"], "wrote: no such file or folder (nor 1 other path); if it belongs"),
        (["Summarise", "dosc"], "dosc: no such file or folder; did you mean docs?"),
        (["What is", "it", "docs"], "it: no such file or folder (check the spelling)"),
        (["q", "docs/A.MD"], "docs/A.MD: no such file or folder; did you mean docs/a.md?"),
        (["q", "dcos/b.text"], "dcos/b.text: no such file or folder; did you mean docs/b.txt?"),
        (["q", "doc/"], "doc/: no such file or folder; did you mean docs/?"),
        (["q", "quetsion.txt"], "quetsion.txt: no such file or folder; did you mean question.txt?"),
        (["q", "docs/hidden.md"], "docs/hidden.md: no such file or folder (check the spelling)"),
        (["q", "nowhere/at/all.md"], "nowhere/at/all.md: no such file or folder: there is no nowhere"),
        (["q", "docs/sub/x.md"], "docs/sub/x.md: no such file or folder: there is no docs/sub"),
        (["q", "docs/*.pdf"], "docs/*.pdf: no such file or folder, and nothing matches it as a pattern"),
        (["q", "docs/a.md/"], "docs/a.md/: cannot be read: Not a directory"),
    ],
)
def test_what_may_have_been_meant_is_said(inside: Path, arguments: list[str], said: str) -> None:
    result = run_here("ask", *arguments)
    check_refused(result, 2)
    assert result.stderr.startswith(f"l4ctx: {said}")


def test_other_names_that_are_not_there(inside: Path) -> None:
    check_refused(run_here("inspect", "dosc"), 2, "dosc: no such folder; did you mean docs?")
    check_refused(run_here("ask", "q", "--context", "dcos"), 7, "dcos: no such folder; did you mean docs? (l4ctx")
    check_refused(run_here("ask", "--question-file", "queston.txt", "docs"), 2, "did you mean question.txt?")
    check_refused(run_here("inspect", "xyz"), 2, "xyz: no such folder")


def test_a_slip_among_many_names_and_odd_ones(inside: Path) -> None:
    (inside / "many").mkdir()
    for number in range(3000):
        (inside / "many" / f"part-{number:05d}-\x1b[31m.txt").touch()
    for command in (["plan"], ["prefill", "-o", "c"], ["ask", "q"]):
        check_refused(run_here(*command, "many/part-0001"), 2, "many/part-0001: no such file or folder")
        check_refused(run_here(*command, "many/\x1b[2J*\n"), 2, r"many/\x1b[2J*\n: no such file or folder")


def test_patterns_that_no_shell_expanded(inside: Path) -> None:
    (inside / "deep" / "er").mkdir(parents=True)
    for name in ("b.md", "a.md", "er/c.md", "er/[x].md"):
        (inside / "deep" / name).write_text(f"This is {name}.\n", encoding="utf-8")

    def read(*paths: str) -> list[str]:
        report = json.loads(run_here("plan", *paths, "--json", "--quiet").stdout)
        return [document["path"].removeprefix("deep/") for document in report["documents"]]

    assert read("deep/*.md") == ["a.md", "b.md"]
    assert read("deep/**/*.md") == ["a.md", "b.md", "er/[x].md", "er/c.md"] == read("deep/**")
    assert read("deep/e?/[!x].md", "deep/b.md") == ["er/c.md", "b.md"]
    assert read("deep/er/[x].md") == ["er/[x].md"]  # a file that is called so
    told = run_here("plan", "deep/*.md").stderr
    assert told == "l4ctx: deep/*.md: taken as a pattern, 2 paths\n"


def test_a_terminal_is_told_how_to_end(inside: Path) -> None:
    for line, what in ((("plan", "-"), "documents"), (("ask", "-", "docs"), "the question")):
        code, shown = run_on_terminal(*line, "--model", str(TINY), interrupt_at=b"end with Ctrl-D")
        assert code == 130 and f"l4ctx: reading {what} from the terminal; end with Ctrl-D".encode() in shown
