"""How the command refuses what it cannot do: one line in one style, and for programs an object on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import TINY, check_refused, closed_pipe, run_here, run_process, write_what_is_read


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a folder of documents, with a model in the environment."""
    monkeypatch.chdir(write_what_is_read(tmp_path))
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


# One style

@pytest.mark.parametrize(("arguments", "said"), [
    ("frobnicate", "no such command 'frobnicate' (l4ctx --help"),
    ("pln docs", "no such command 'pln'. Did you mean 'p"),
    ("ask q --quite", "no such option: --quite; did you mean --quiet? (l4ctx ask --help"),
    ("prefill docs -Z", "no such option: -Z (l4ctx prefill --help"),
    ("ask q --top-p 2", "--top-p: "), ("ask q --top-k -1", "--top-k: "), ("ask q --seed x", "--seed: it should be"),
    ("ask q --model", "option '--model' requires an argument"),
    ("plan --tokens 10x", "--tokens: '10x' is not a number of tokens such as 4096, 128k (128,000)"),
    ("plan --tokens 0", "--tokens: 0 is less than 1"), ("ask q --max-new-tokens 0", "--max-new-tokens: 0 is less than"),
    ("plan docs --max-new-tokens -1", "--max-new-tokens: '-1' is not a number of tokens"),
    ("prefill docs --prefill-chunk-size 5.5", "--prefill-chunk-size: '5.5' is not a number of tokens"),
    ("inspect a b", "got unexpected extra argument"), ("bench --tokens 4k,x", "--tokens: '4k,x' is not a list of numb"),
    ("ask q docs --kv-host-memory 8", "--kv-host-memory: 8 would be bytes; with a unit it is clear: 8GiB"),
    ("plan docs --kv-device-memory 24", "--kv-device-memory: 24 would be bytes; with a unit it is clear: 24GiB"),
])
def test_what_is_wrong_with_arguments_is_one_line(inside: Path, arguments: str, said: str) -> None:
    result = run_here(*arguments.split())
    check_refused(result, 2, said)
    assert result.stderr.startswith(f"l4ctx: {said}")
    if not arguments.startswith(("frob", "pln")):
        check_refused(run_here(*arguments.split()[:1], "--json", *arguments.split()[1:]), 2, said, as_json=True)


def test_numbers_with_a_unit_are_taken_wherever_tokens_are_counted(inside: Path) -> None:
    options = ("--prefill-chunk-size", "1k", "--max-new-tokens", "0.5k", "--json")
    for text, tokens in (("10M", 10_000_000), ("128k", 128_000), ("128Ki", 131_072)):
        result = run_here("plan", "--tokens", text, *options)
        assert result.code == 0 and f'"prompt_tokens": {tokens},' in result.stdout
        assert '"max_new_tokens": 512' not in result.stdout and '"max_new_tokens": 500' in result.stdout
        assert '"prefill_chunk_size": 1000' in result.stdout


# For programs

@pytest.mark.parametrize(("arguments", "code"), [
    (["ask", "q", "nothing.md"], 2), (["ask"], 2), (["prefill", "docs"], 2), (["plan"], 2), (["inspect", "docs"], 2),
    (["ask", "q", "docs", "--model", "docs"], 3), (["plan", "docs", "-m", "docs"], 3), (["bench", "--compare", "x"], 2),
    (["prefill", "docs", "-o", "docs"], 7), (["ask", "q", "--context", "no"], 7), (["ask", "q", "\x1b[31m\n.md"], 2),
])
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
