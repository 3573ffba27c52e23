"""What a person does, and what comes of it: exit code, stdout and stderr of the `l4ctx` command, as a table.

What depends on a process (real pipes, signals, a terminal, what is imported) runs as one; the variants run here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from l4ctx import errors
from l4ctx.cli import activity, exits
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.workload import Workload
from l4ctx.run.memory_report import MemoryReport
from model.config import TextConfig
from support.cli_runner import (
    ANSWER,
    CONTROLS,
    DOCUMENT,
    QUESTION,
    TINY,
    Result,
    changed_checkpoint,
    check_refused,
    closed_pipe,
    run_here,
    run_on_terminal,
    run_process,
    text_file,
    text_only_checkpoint,
    write_what_is_read,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases read; nothing writes here after this."""
    return write_what_is_read(tmp_path_factory.mktemp("person"))


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in `folder`, with a model in the environment."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return folder


# Before torch

REFUSED: list[tuple[list[str | bytes], bytes | None, int, list[str]]] = [
    (["ask"], None, 2, ["no question", "l4ctx ask QUESTION [PATH]...", "--question-file"]),
    (["ask", ""], None, 2, ["the question is empty"]),
    (["ask", "q", ""], None, 2, ["a path is empty"]),
    (["ask", "q", "docs/nothing.md"], None, 2, ["docs/nothing.md: no such file or folder"]),
    (["ask", "q", b"\xff\x1b[31m\n\xe2\x80\xae"], None, 2, [r"\udcff\x1b[31m\n\u202e: no such file or folder"]),
    (["ask", "q", "empty", "empty.txt"], None, 2, ["found nothing to read", "empty.txt: empty"]),
    (["ask", "q", "docs/data.bin"], None, 2, ["found nothing to read", "docs/data.bin: binary"]),
    (["ask", "q", "/dev/null"], None, 2, ["/dev/null: is a device"]),
    (["ask", "q", "/proc/self/mem"], None, 2, ["/proc/self/mem: cannot be read: Input/output error"]),
    (
        ["ask", "q"],
        b"",
        2,
        [
            "no documents: standard input has nothing to read: empty",
            "name a file",
            "--no-documents asks the model alone",
        ],
    ),
    (["ask", "q"], b"\0\1\2", 2, ["standard input has nothing to read: binary"]),
    (["ask", "q", "-"], None, 2, ["standard input has nothing to read: empty"]),
    (["ask", "q", "-", "docs", "-"], b"text", 2, ["- (standard input) is given twice"]),
    (["ask", "-"], b"", 2, ["standard input: the question is empty"]),
    (["ask", "-", "-"], b"text", 2, ["cannot be both the question and a document"]),
    (["ask", "-", "docs"], b"W\xf6", 2, ["standard input: the question is not UTF-8 text"]),
    (["ask", "--question-file", "-", "docs"], b"\0", 2, ["standard input: the question is not UTF-8 text"]),
    (["ask", "--question-file", "latin.txt"], None, 2, ["latin.txt: the question is not UTF-8 text"]),
    (["ask", "--question-file", "empty.txt", "docs"], None, 2, ["empty.txt: the question is empty"]),
    (["ask", "--question-file", "nothing.txt"], None, 2, ["nothing.txt: the question cannot be read: No such file"]),
    (["ask", "--question-file", "docs"], None, 2, ["docs: the question cannot be read: Is a directory"]),
    (
        ["ask", "--question-file", "/dev/zero"],
        None,
        2,
        ["/dev/zero: the question cannot be read: neither a file nor a"],
    ),
    (["ask", "--questions", "/dev/zero", "docs"], None, 2, ["/dev/zero: the questions cannot be read: neither a file"]),
    (["ask", "q", "docs", "--dtype", "int4"], None, 2, ["--dtype: 'int4' is not one of auto, float32, bfloat16"]),
    (
        ["ask", "q", "docs", "--attention", "f"],
        None,
        2,
        ["--attention: 'f' is not one of sdpa, cudnn, matmul, flex, eager"],
    ),
    (
        ["ask", "q", "docs", "--seed", str(2**64)],
        None,
        2,
        ["--seed: it should be less than or equal to 9223372036854775807"],
    ),
    (["ask", "q", "docs", "--model", "docs"], None, 3, ["docs: no config.json", "checkpoint folder"]),
    (["ask", "q", "docs", "--model", "docs/a.md"], None, 3, ["docs/a.md"]),
    (["ask", "q", "docs", "--model", b"\xff\x1b[31m"], None, 3, [r"\udcff", "no such folder"]),
]


@pytest.mark.parametrize(("arguments", "stdin", "code", "parts"), REFUSED, ids=lambda value: repr(value)[:60])
def test_refused_before_torch(
    inside: Path, arguments: list[str | bytes], stdin: bytes | None, code: int, parts: list[str]
) -> None:
    check_refused(run_here(*map(os.fsdecode, arguments), stdin=stdin), code, *parts)


def test_no_model(folder: Path) -> None:
    for given in ({}, {"L4CTX_MODEL": ""}):
        result = run_process("ask", "q", "docs", folder=folder, **given)
        check_refused(result, 2, "no model", "--model DIR", "L4CTX_MODEL")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["frobnicate"], "frobnicate"),
        (["ask", "q", "--frob"], "--frob"),
        (["ask", "q", "--top-p", "2"], "--top-p"),
        (["ask", "q", "--top-k", "-1"], "--top-k"),
        (["ask", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "q", "--temperature", "-1"], "--temperature"),
        (["ask", "q", "--prefill-chunk-size", "x"], "--prefill-chunk-size"),
        (["ask", "q", "--model"], "--model"),
    ],
)
def test_arguments_that_the_parser_refuses(folder: Path, arguments: list[str], part: str) -> None:
    check_refused(run_process(*arguments, folder=folder), 2, part)


def test_help_and_version() -> None:
    top, version, nothing = (run_process(*line.split()) for line in ("--help", "--version", ""))
    assert [(each.code, each.stderr) for each in (top, version)] == [(0, ""), (0, "")] and nothing.code == 2
    assert " ".join(exits.EXIT_CODES.split()) in " ".join(top.stdout.split())
    assert re.fullmatch(r"l4ctx \d+\.\d+\S*\n", version.stdout)
    assert "Usage: l4ctx" in nothing.stdout + nothing.stderr
    for command, usage, option in (
        ("ask", "[QUESTION] [PATH]...", "--save-context"),
        ("plan", "[PATH]...", "--tokens"),
        ("prefill", "[PATH]...", "--verify"),
        ("inspect", "[MODEL|CONTEXT]", "--json"),
    ):
        shown = run_process(command, "-h")
        assert (shown.code, shown.stderr) == (0, "") and f"\n  {command} " in top.stdout
        assert f"Usage: l4ctx {command} [OPTIONS] {usage}" in shown.stdout and option in shown.stdout
        assert " ".join(exits.EXIT_CODES.split()) in " ".join(shown.stdout.split())


def test_every_exit_code_is_told() -> None:
    codes = [
        errors.OUTPUT,
        errors.INPUT,
        errors.CHECKPOINT,
        errors.TOO_LONG,
        errors.MEMORY,
        errors.MODEL,
        errors.CONTEXT,
        errors.INTERRUPTED,
        errors.CLOSED,
    ]
    assert [int(number) for number in re.findall(r"\d+", exits.EXIT_CODES)] == [0, *codes]
    assert {*errors.CODES_OF_ERRORS, errors.INTERRUPTED, errors.CLOSED} == set(codes)


def test_help_and_refusals_import_nothing_heavy(folder: Path) -> None:
    lines = [
        ["--help"],
        ["ask", "--help"],
        ["--version"],
        ["ask"],
        ["ask", "q", "--frob"],
        ["ask", "q", "nothing.md"],
        ["ask", "q", "docs", "--dtype", "x"],
        ["ask", "q", "docs", "--model", "docs"],
        ["inspect", "docs"],
        ["prefill", "docs"],
        ["prefill", "docs", "-o", "c", "--model", "docs"],
        ["plan", "docs", "--tokens", "5"],
        ["plan", "--tokens", "5", "--model", "docs"],
        ["plan", "--tokens", "5", "--model", str(TINY)],
    ]
    code = (
        "import contextlib, sys\nfrom l4ctx.cli.app import main\n"
        f"for line in {lines!r}:\n    sys.argv = ['l4ctx', *line]\n    with contextlib.suppress(SystemExit):\n"
        "        main()\nassert not {'torch', 'tokenizers', 'jinja2', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_streams_that_are_closed_or_full_before_torch(folder: Path) -> None:
    run = functools.partial(run_process, folder=folder, L4CTX_MODEL=str(TINY))
    assert run("ask", "q", "nothing.md", shell="2>&-") == Result(2, "", "")
    assert run("ask", "q", "nothing.md", shell="2>/dev/full") == Result(2, "", "")
    check_refused(run("ask", "q", "docs", shell=">&-"), 2, "standard output is closed")
    check_refused(run("ask", "q", "-", shell="<&-"), 2, "- stands for standard input, but there is none")
    check_refused(run("ask", "-", "docs", shell="<&-"), 2, "- stands for standard input, but that is closed")
    assert run("--version", shell=">&-").code == 0


# Processes that load a model


def test_a_pipe(folder: Path) -> None:
    result = run_process("ask", QUESTION, "--model", TINY.as_posix(), stdin=DOCUMENT.encode(), folder=folder)
    assert (result.code, result.stdout) == (0, ANSWER)
    assert re.fullmatch(
        r"l4ctx: 1 document, \d+ tokens\nl4ctx: read \d+ tokens in [\d.]+ s \([\d,.]+ tokens/s\)\n", result.stderr
    )


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    with closed_pipe() as pipe:
        result = run_process("ask", QUESTION, "docs/a.md", "--quiet", "--model", str(TINY), stdout=pipe, folder=folder)
    assert result == Result(141, "", "")


def test_an_ascii_locale_and_a_full_stderr(folder: Path) -> None:
    result = run_process(
        "ask",
        f"Ä {QUESTION}",
        "docs",
        "--memory-report",
        "--model",
        str(TINY),
        shell="2>/dev/full",
        folder=folder,
        LC_ALL="C",
        PYTHONIOENCODING="ascii",
    )
    assert result == Result(0, ANSWER, "")


def test_a_terminal_shows_progress_and_is_left_clean(folder: Path) -> None:
    code, shown = run_on_terminal("ask", QUESTION, str(folder / "docs"), "--model", str(TINY))
    answer = ANSWER.replace("\n", "\r\n").encode()
    drawn, erased, rest = shown.rpartition(b"\x1b[2K")
    assert code == 0 and b"reading" in drawn and erased
    assert rest.removeprefix(b"\x1b[?25h") == answer or rest == answer
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")  # the cursor is there again
    assert re.search(rb"l4ctx: 2 documents, \d+ tokens\r\n", shown)


def test_control_c_while_reading(tmp_path: Path) -> None:
    text = text_file(tmp_path / "long.txt", "An unhurried sentence of several words, 12345.\n" * 30_000)
    code, shown = run_on_terminal("ask", QUESTION, str(text), "--model", str(TINY), interrupt_at=b" tokens/s")
    assert code == 130
    assert shown.endswith(b"l4ctx: interrupted; nothing is kept\r\n") and b"Traceback" not in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")


# The rest, in this process

ANSWERED: list[tuple[list[str], str | None, list[str]]] = [
    (["docs"], None, [r"skipped docs/.hidden.md: hidden", r"skipped docs/data.bin: binary", "2 documents, N tokens"]),
    (["docs/b.txt", "docs/a.md"], None, ["2 documents, N tokens"]),
    (["docs/a.md", "docs/data.bin"], None, ["skipped docs/data.bin: binary", "1 document, N tokens"]),
    (["docs/a.md", "empty"], None, ["1 document, N tokens"]),
    ([".named.md"], None, ["1 document, N tokens"]),
    (["docs/b.txt", "-"], DOCUMENT, ["2 documents, N tokens"]),
    (
        ["docs/a.md"],
        "x",
        ["1 document, N tokens", "standard input holds data that is not read; add - to the paths to read it"],
    ),
    (["docs/a.md"], "", ["1 document, N tokens"]),
    (["docs/a.md", "--quiet"], "x", []),
    (["docs/a.md", "--prefill-chunk-size", "1", "--attention", "eager"], None, ["1 document, N tokens"]),
    (["docs/a.md", "--dtype", "bfloat16", "--device", "cpu"], None, ["1 document, N tokens"]),
    (
        ["docs/a.md", "--seed", "3"],
        None,
        [
            "--top-p, --top-k and --seed change nothing at temperature 0; add --temperature or --sample",
            "1 document, N tokens",
        ],
    ),
]


@pytest.mark.parametrize(("arguments", "stdin", "notes"), ANSWERED, ids=lambda value: repr(value)[:50])
def test_answered(inside: Path, arguments: list[str], stdin: str | None, notes: list[str]) -> None:
    result = run_here("ask", QUESTION, *arguments, stdin=None if stdin is None else stdin.encode())
    assert (result.code, result.stdout) == (0, ANSWER)
    lines = [line.removeprefix("l4ctx: ") for line in result.stderr.splitlines()]
    summary = r"read [\d,]+ tokens in [\d.]+ s \([\d,.]+ tokens/s\)"
    at = next((number for number, line in enumerate(lines) if re.fullmatch(summary, line)), None)
    assert (at is None) == (not notes) and (at is None or lines.pop(at))
    assert [re.sub(r"[\d,]+ tokens", "N tokens", line) for line in lines] == notes


def test_where_the_question_comes_from(inside: Path) -> None:
    assert run_here("ask", "-", "docs/a.md", stdin=QUESTION.encode()).stdout == ANSWER
    assert run_here("ask", "--question-file", "question.txt", "docs/a.md").stdout == ANSWER
    assert run_here("ask", "--question-file", "question.txt", stdin=DOCUMENT.encode()).stdout == ANSWER
    assert run_here("ask", "--question-file", "-", "docs/a.md", stdin=QUESTION.encode()).stdout == ANSWER
    reading, writing = os.pipe()  # as of the shell's <(command)
    os.write(writing, QUESTION.encode())
    os.close(writing)
    assert run_here("ask", "--question-file", f"/dev/fd/{reading}", "docs/a.md").stdout == ANSWER
    os.close(reading)
    with (inside / "docs" / "a.md").open(encoding="utf-8") as file:
        assert run_here("ask", QUESTION, stdin=file).stdout == ANSWER
    assert run_here("ask", f"\udcff {QUESTION}", "docs/a.md").stdout == ANSWER
    assert run_here("ask", QUESTION, "--no-documents", "--max-new-tokens", "1").code == 0


def test_control_tokens_in_a_document_are_text(inside: Path) -> None:
    told = json.loads(run_here("ask", QUESTION, "eot.txt", "--json").stdout)
    assert told["answer"] == ANSWER.strip() and told["prompt_tokens"] > 60 * 4 * 3  # as control tokens, 60 * 4


def test_json_is_one_whole_object(inside: Path) -> None:
    result = run_here("ask", QUESTION, "docs", "--json", "--quiet")
    told = json.loads(result.stdout)
    assert (result.code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert list(told) == [
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
    assert (told["answer"], told["stop_reason"]) == (ANSWER.strip(), "stop")
    assert (told["reused_tokens"], told["context"]) == (0, None)
    assert [document["path"] for document in told["documents"]] == ["docs/a.md", "docs/b.txt"]
    assert 0 < sum(document["tokens"] for document in told["documents"]) < told["prompt_tokens"]
    assert told["skipped"] == [
        {"path": "docs/.hidden.md", "reason": "hidden"},
        {"path": "docs/data.bin", "reason": "binary"},
    ]
    assert list(told["timings"]) == ["load", "tokenize", "prefill", "decode"]
    assert all(list(timing) == ["seconds", "tokens_per_second"] for timing in told["timings"].values())
    assert list(told["memory"]) == list(MemoryReport.__dataclass_fields__)
    workload = Workload(
        TextConfig.from_folder(TINY),
        prompt_tokens=told["prompt_tokens"],
        max_new_tokens=1024,
        weights=told["memory"]["weights"],
        weights_are_mapped=False,
        dtype="float32",
        has_drafts=True,
    )
    by_owner = told["memory"]["weights_by_owner"]
    assert told["memory"]["predicted"].pop("weights_by_owner") == by_owner
    assert sum(entry["memory"] for entry in by_owner) == told["memory"]["weights"]
    assert [entry["owner"] for entry in by_owner][::4] == ["attention", "embeddings"]
    assert {tuple(entry["stored"]) for entry in by_owner} == {("bfloat16",)}
    assert told["memory"]["predicted"] | {"weights_by_owner": []} == plan_memory(workload).as_dict()
    for owner in ("rope_windows", "nope_device", "nope_host", "nope_disk", "buffers", "token_ids"):
        assert told["memory"][owner] == told["memory"]["predicted"][owner], owner


def test_the_memory_report(inside: Path) -> None:
    result = run_here("ask", QUESTION, "docs/a.md", "--quiet", "--memory-report")
    lines = result.stderr.splitlines()
    title, head, *rows = lines[: lines.index("")]
    assert (result.stdout, title.strip()) == (ANSWER, "memory")
    assert head.split() == ["predicted", "at", "most", "held", "peak"]
    ends = [head.index("predicted"), *(each.end() for each in re.finditer("predicted|at most|held|peak", head))]
    filled = {
        "weights": "p h ",
        "RoPE windows": "pmh ",
        "NoPE keys and values, host memory": "pmh ",
        "token ids": "p h ",
        "index for drafts": " mh ",
        "activations": " m  ",
        "process, anonymous": "  hk",
        "process, file-backed": "  hk",
        "keys and values in memory": "p h ",
        "an unbounded cache would take": "p   ",
    }
    cells = {row[: ends[0]].strip(): [row[start:stop].strip() for start, stop in pairwise(ends)] for row in rows}
    assert {
        name: "".join(letter if cell else " " for letter, cell in zip("pmhk", values, strict=True))
        for name, values in cells.items()
    } == filled
    assert all(re.fullmatch(r"[\d.]+ ([KMG]i)?B", cell) for values in cells.values() for cell in values if cell)
    for owner in (
        "weights",
        "RoPE windows",
        "NoPE keys and values, host memory",
        "token ids",
        "keys and values in memory",
    ):
        assert cells[owner][0] == cells[owner][2], owner


@pytest.mark.parametrize(
    ("device", "part"),
    [
        ("abacus", "no such device; use auto, cpu, cuda or cuda:N"),
        ("meta", "cannot be used here ("),
        ("cuda:99", "cannot be used here ("),
    ],
)
def test_devices_that_are_not_there(inside: Path, device: str, part: str) -> None:
    check_refused(run_here("ask", QUESTION, "docs/a.md", "--device", device), 2, f"--device {device}: ", part)


def test_broken_checkpoints(inside: Path, tmp_path: Path) -> None:
    folder = text_only_checkpoint(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()

    def refused(*parts: str) -> None:
        check_refused(run_here("ask", QUESTION, "docs/a.md", "--model", str(folder)), 3, str(folder), *parts)

    (folder / "model.safetensors").write_bytes(weights[:-1])
    refused("model.safetensors: truncated", f"{len(weights) - 1} bytes instead of {len(weights)}", "download it again")
    (folder / "model.safetensors").unlink()
    refused("neither model.safetensors nor model.safetensors.index.json")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused("model-00001-of-00002.safetensors: missing shard", "download it again")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    refused("tokenizer.json: no such file")


def test_a_base_model_gets_plain_text(inside: Path, tmp_path: Path) -> None:
    folder = changed_checkpoint(tmp_path, without="chat_template.jinja")
    result = run_here("ask", QUESTION, "docs/a.md", "--max-new-tokens", "1", "--model", str(folder))
    assert result.code == 0 and "no chat template" in result.stderr.splitlines()[0]


def test_a_prompt_that_is_too_long(inside: Path, tmp_path: Path) -> None:
    short = str(changed_checkpoint(tmp_path, max_position_embeddings=256))
    result = run_here("ask", QUESTION, "docs", "long.txt", "longer.txt", "--model", short, "--quiet")
    check_refused(result, 4, "the model's 256 positions", "leave out some of the largest documents: longer.txt (")
    names = re.findall(r"[\w/.]+(?= \([\d,]+ tokens\))", result.stderr)
    assert names == ["longer.txt", "long.txt", "docs/a.md", "docs/b.txt"]
    check_refused(run_here("ask", "word " * 300, "--no-documents", "--model", short), 4, "shorten the question")
    result = run_here("ask", QUESTION, "docs/a.md", "--model", short, "--max-new-tokens", "256")
    check_refused(result, 2, "--max-new-tokens 256: the prompt's", "tokens leave", "of the model's 256 positions")


def test_one_unbroken_line_of_a_million(inside: Path, tmp_path: Path) -> None:
    line = text_file(tmp_path / "line.txt", "xyzzyplugh" * 100_000)
    short = changed_checkpoint(tmp_path, max_position_embeddings=16_384)
    result = run_here("ask", QUESTION, str(line), "--model", str(short))
    assert (result.code, result.stdout) == (4, "")
    cut, refusal = result.stderr.splitlines()
    assert "line.txt: an unbroken run of over 131,072 characters was cut 7 times" in cut and "line.txt (" in refusal


def test_weights_that_are_not_numbers(inside: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = text_only_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_refused(run_here("ask", QUESTION, "docs/a.md", "-q", "-m", str(folder)), 6, "not finite", "--dtype float32")


def test_the_answer_is_cut_only_with_a_word(inside: Path) -> None:
    result = run_here("ask", QUESTION, "docs/a.md", "--max-new-tokens", "3")
    assert result.code == 0 and ANSWER.startswith(result.stdout.rstrip("\n")) and len(result.stdout) < len(ANSWER)
    assert result.stderr.endswith("l4ctx: the answer was cut at 3 tokens; --max-new-tokens allows more\n")


def test_draws_are_repeatable(inside: Path, tmp_path: Path) -> None:
    folder = changed_checkpoint(tmp_path)
    config = {"eos_token_id": [], "do_sample": True, "temperature": 50.0}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")

    def draw(*options: str) -> str:
        result = run_here("ask", QUESTION, "docs/a.md", "--max-new-tokens", "8", "-q", "-m", str(folder), *options)
        assert result.code == 0 and result.stderr == ""
        return result.stdout

    assert draw("--sample", "--seed", "7") == draw("--sample", "--seed", "7") != draw("--sample", "--seed", "8")
    assert draw("--temperature", "50", "--seed", "7") == draw("--sample", "--seed", "7") != draw()
    assert draw("--sample", "--temperature", "0") == draw("--sample", "--top-k", "1") == draw()


def test_nothing_steers_the_terminal(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\u202e\r"
    text_file(tmp_path / "evil" / f"\x1b[31m\n{evil}.md", f"{evil}\n{DOCUMENT}")
    (tmp_path / "evil" / "\x1b[2J.bin").write_bytes(b"\0\0")
    monkeypatch.setattr("l4ctx.checkpoint.tokenizer.StreamDecoder.push", lambda self, token_id: f"é{evil}")
    arguments = ("ask", f"{evil} {QUESTION}", str(tmp_path / "evil"), "--max-new-tokens", "1")
    result = run_here(*arguments, encoding="ascii")
    assert (result.code, result.stdout) == (0, r"\xe9\ufffd]0;owned\ufffd\ufffd31m\ufffd" + "\n")
    assert r"skipped evil/\x1b[2J.bin: binary" in result.stderr and not CONTROLS.search(result.stderr)
    result = run_here(*arguments, "--json", encoding="ascii")
    assert not CONTROLS.search(result.stdout) and json.loads(result.stdout)["answer"] == f"é{evil}"


def test_control_c_while_tokenizing(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("l4ctx.checkpoint.tokenizer.Tokenizer._encode_batch", interrupted)
    check_refused(run_here("ask", QUESTION, "docs/a.md"), 130, "interrupted; nothing is kept")


def test_a_full_disk_is_named(inside: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = run_here("ask", QUESTION, "docs/a.md", "--quiet", stdout=full)
    check_refused(result, 1, "the answer cannot be written: No space left on device")


def test_a_bug_keeps_its_traceback(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here("ask", QUESTION, "docs/a.md")


def test_progress_without_a_terminal(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "PLAIN_LINE_SECONDS", -1.0)
    result = run_here("ask", QUESTION, "docs/a.md", "--prefill-chunk-size", "32")
    line = (
        r"^l4ctx: read 32 of \d+ tokens, [\d.]+ s left, [\d,]+ tokens/s \(average [\d,]+\), in docs/a\.md; "
        r"KV: memory [\d.]+ [KM]iB; process: [\d.]+ [MG]iB$"
    )
    assert re.search(line, result.stderr, re.MULTILINE) and not CONTROLS.search(result.stderr)
    assert run_here("ask", QUESTION, "docs/a.md", "--prefill-chunk-size", "32", "--quiet").stderr == ""
