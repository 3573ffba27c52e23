"""What a run takes and where its keys and values lie, as a person sees it: `l4ctx plan`, refusals for lack of memory,
budgets and storage types.

The sample model has attention chunks of 512 tokens here, and a row of the store is two of them, so that 6,700 tokens
make six rows.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cache import layout as store_layout
from l4ctx.formatting import human_bytes
from l4ctx.machine import device
from l4ctx.planning.memory_plan import MARGIN_BYTES
from l4ctx.run import sizing
from model.config import TextConfig
from support.cli_runner import (
    CONTROLS,
    TINY,
    Result,
    answer,
    ask,
    changed_checkpoint,
    check_answers,
    check_refused,
    fact_document,
    prefill,
    run_here,
    run_process,
    spans,
    text_file,
    told,
)
from support.context_toys import block_digests, files
from support.counts import small_parameter_count

ROW, TOKEN_BYTES = 1024, 1024  # in float32
MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module", autouse=True)
def _small_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_layout, "MIN_BLOCK_BYTES", 3 * 2**18)
        patch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
        patch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 1)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_checkpoint(tmp_path_factory.mktemp("model"), attention_chunk_size=512)


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works beside two documents of 3,350 tokens each, with a model in the environment."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("L4CTX_MODEL", str(checkpoint))
    for name in "ab":
        text_file(Path("docs", f"{name}.md"), fact_document(name, lines=85))
    return tmp_path / "place"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB of memory, 100 GiB on disk, no GPU."""
    monkeypatch.setattr(sizing, "available_memory", lambda: 24 * GIB)
    monkeypatch.setattr(sizing, "available_disk", lambda folder: 100 * GIB)
    monkeypatch.setattr(device, "available_on_gpu", lambda index: None)


def planned(*arguments: str, code: int = 0) -> dict[str, Any]:
    """What --json prints."""
    result = run_here("plan", *arguments, "--json")
    assert (result.code, result.stdout.count("\n")) == (code, 1), result
    return json.loads(result.stdout)


# Plans


def test_a_number_of_tokens_imports_nothing_heavy(place: Path) -> None:
    shutil.copy(TINY / "config.json", "docs")  # nothing else of a checkpoint
    code = (
        "import contextlib, sys\nfrom l4ctx.cli.app import main\n"
        "for more in (['--json'], ['--rate', '25000'], ['--kv-dir', '.', '--kv-host-memory', '1GiB']):\n"
        "    sys.argv = ['l4ctx', 'plan', '--tokens', '1000000', '--device', 'cpu', '--dtype', 'float32',\n"
        "                '--model', 'docs', *more]\n"
        "    with contextlib.suppress(SystemExit):\n        main()\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    first, *rest = done.stdout.decode().splitlines()
    assert json.loads(first)["plan"]["nope_host"] == 10**6 * TOKEN_BYTES and "memory" in rest


@pytest.mark.usefixtures("machine")
def test_a_plan_for_programs_is_the_one_of_ask(place: Path) -> None:
    report = planned("docs", "--dtype", "float32")
    assert list(report) == [
        "fits",
        "prompt_tokens",
        "max_new_tokens",
        "max_position_embeddings",
        "exceeds_positions",
        "documents",
        "skipped",
        "plan",
        "room",
        "missing",
        "remedies",
        "notes",
        "tokens_in_memory",
        "tokens_with_disk",
        "read_from_disk",
        "weights_read",
        "weights_read_a_token",
        "reading_less",
        "forms",
        "operations_per_second",
        "seconds",
        "assumed_seconds",
        "folders",
        "verdict",
    ]
    run = json.loads(ask("a", "docs", "--json", "--quiet", "--dtype", "float32").stdout)
    assert report["documents"] == run["documents"] and report["fits"] and not report["exceeds_positions"]
    assert list(report["plan"]) == list(run["memory"]["predicted"])
    more = run["prompt_tokens"] - report["prompt_tokens"]  # those of the question
    assert 5 < more < 30 and report["max_new_tokens"] == 1024
    assert run["memory"]["predicted"]["tokens"] == report["plan"]["tokens"] + more
    for name in ("weights", "weights_are_mapped", "prefill_chunk_size", "rope_windows", "dtype", "kv_dtype"):
        assert report["plan"][name] == run["memory"]["predicted"][name], name
    assert report["verdict"].startswith("fits; about ") and report["verdict"].endswith(" of memory")
    assert report["seconds"] is None and report["missing"] == {} and report["remedies"] == []


@pytest.mark.usefixtures("machine")
def test_a_plan_for_people(place: Path) -> None:
    (place / "docs" / "x.bin").write_bytes(b"\0")
    result = run_here("plan", "docs", "--rate", "5000", "--kv-dtype", "int8")
    assert result.code == 0 and not CONTROLS.search(result.stdout + result.stderr)
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"fits; about 1\.3 s; [\d.]+ MiB of memory", lines[0])
    assert [line for line in lines if line and " " not in line] == ["documents", "memory", "weights", "run"]
    assert lines[lines.index("left out: 1") + 1].split(maxsplit=1)[0] == "docs/x.bin"
    assert all(len(line) <= 160 and line == line.rstrip() for line in lines)
    rows = [re.split(r" {2,}", line) for line in lines]
    assert ["docs/a.md", "3,345", "50%"] in rows and ["fits here", "yes"] in rows
    assert ["prefill takes", "about 1.3 s"] in rows and ["KV cache", "7,168 tokens in host memory, in int8"] in rows
    assert any(row[0] == "host memory, total with margin" for row in rows)
    quiet = run_here("plan", "docs", "--quiet")
    assert (quiet.code, quiet.stderr) == (0, "") and "fits here" in quiet.stdout


@pytest.mark.usefixtures("machine")
def test_documents_by_tokens_with_subtotals_by_folder(place: Path) -> None:
    for number in range(25):
        text_file(place / "docs" / "many" / f"{number}.txt", "word " * (number + 1))
        (place / "docs" / f"{number}.bin").write_bytes(b"\0\1")
    report = planned("docs")
    by_tokens = sorted((document["tokens"] for document in report["documents"]), reverse=True)
    lines = run_here("plan", "docs").stdout.splitlines()
    start, folders, left_out = (lines.index(title) for title in ("documents", "folders", "left out: 25"))
    assert [int(line.split()[-2].replace(",", "")) for line in lines[start + 2 : start + 22]] == by_tokens[:20]
    assert lines[start + 22].startswith("7 smaller ones (--all)")
    shown = [re.split(r" {2,}", line) for line in lines[folders + 2 : folders + 4]]
    assert [row[0] for row in shown] == ["docs/ (2 documents)", "docs/many/ (25 documents)"]
    assert [int(row[1].replace(",", "")) for row in shown] == [folder["tokens"] for folder in report["folders"]]
    assert sum(by_tokens) == sum(folder["tokens"] for folder in report["folders"])
    assert lines[left_out + 21].split() == ["5", "more", "--all", "lists", "them"]
    whole = run_here("plan", "docs", "--all").stdout
    assert "smaller" not in whole and all(f"docs/{number}.bin" in whole for number in range(25))
    assert len([line for line in whole.splitlines() if line.startswith("docs/many/")]) == 25 + 1


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--tokens", "10000000"], 0, ["fits here      yes", "10,485,760 tokens in memory alone"]),
        (
            ["--tokens", "10485761"],
            4,
            [
                "does not fit: 10,485,761 tokens, and the model has 10,485,760 positions\n",
                "fits here      no",
                "more tokens than the model has positions: 10,485,761",
            ],
        ),
        (
            ["--tokens", "10485760", "--max-new-tokens", "1"],
            4,
            ["10,485,760 and 1 for the answer", "positions: 10,485,761"],
        ),
        (
            ["--tokens", "10000000", "--kv-host-memory", "1GiB"],
            5,
            [
                "--kv-host-memory: 9.5 GiB needed, 1.0 GiB available",
                "what helps     --kv-host-memory 9766MiB makes it fit",
                "--kv-dir DIR makes it fit (8.6 GiB on disk)",
                "--kv-dtype int8 saves 7.0 GiB",
                ", not enough alone",
                "fewer tokens: 1,048,576 of these 10,000,000 fit",
                "does not fit: --kv-host-memory: 9.5 GiB needed, 1.0 GiB available; --kv-host-memory 9766MiB makes it",
            ],
        ),
        (
            ["--tokens", "10000000", "--kv-host-memory", "1GiB", "--kv-dir", "."],
            0,
            ["NoPE keys and values, disk", "tokens in host memory, 8,9", " tokens on disk", "disk, total "],
        ),
    ],
)
def test_what_a_number_of_tokens_takes(place: Path, arguments: list[str], code: int, parts: list[str]) -> None:
    result = run_here("plan", *arguments, "--dtype", "float32")
    assert (result.code, result.stderr) == (code, "")
    for part in parts:
        assert part in result.stdout, result.stdout
    assert planned(*arguments, "--dtype", "float32", code=code)["fits"] == (code == 0)


def test_what_does_not_fit_into_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 2**20)
    report = planned("docs", "--dtype", "float32", code=5)
    assert report["missing"]["memory"]["there"] == 2**20 and not report["fits"]
    assert any(remedy.startswith("--dtype bfloat16 saves ") for remedy in report["remedies"])
    shown = run_here("plan", "docs", "--dtype", "float32")
    assert shown.code == 5 and re.search(
        r"^fits here +no\n +memory: 3\d\d MiB needed, 1\.0 MiB available\n"
        r"what helps +--dtype bfloat16 saves ",
        shown.stdout,
        re.MULTILINE,
    )


@pytest.mark.usefixtures("machine")
def test_the_time_grows_with_the_square(place: Path) -> None:
    """Where a layer that sees everything is not the last: of that one reading needs keys and values only."""
    amid = changed_checkpoint(place, no_rope_layers=[1, 0, 1, 1])

    def seconds(tokens: int, model: Path) -> float:
        return planned("--tokens", str(tokens), "--rate", "20000", "--model", str(model))["seconds"]

    assert seconds(2 * 10**6, TINY) == pytest.approx(2 * seconds(10**6, TINY), rel=0.01)
    assert 2.5 * seconds(10**6, amid) < seconds(2 * 10**6, amid) < 4 * seconds(10**6, amid)
    assert seconds(100, amid) == pytest.approx(100 / 20000, rel=0.2)
    fast = json.loads(run_here("plan", "--tokens", "100000", "--measure", "--json").stdout)
    assert fast["seconds"] > 0 and list(fast["operations_per_second"]) == ["linear", "attention"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "l4ctx plan PATH..., or l4ctx plan --tokens N: give one of them"),
        (["docs", "--tokens", "5"], 2, "l4ctx plan PATH..., or l4ctx plan --tokens N: give one of them"),
        (["--tokens", "5", "--rate", "5", "--measure"], 2, "--rate gives the speed, --measure finds it out"),
        (["--tokens", "5", "--rate", "inf"], 2, "--rate: inf is not a positive number"),
        (["docs/x.md"], 2, "docs/x.md: no such file or folder"),
        ([""], 2, "a path is empty"),
        (["docs/../docs/x"], 2, "no such file"),
        (["/dev/null"], 2, "/dev/null: is a device"),
        (["--tokens", "5", "--model", "x"], 3, "x: no such folder"),
        (["docs", "--model", "docs"], 3, "docs: no config.json there"),
        (["--tokens", "5", "--device", "abacus"], 2, "--device abacus: no such device"),
        (
            ["--tokens", "5", "--kv-device-memory", "1G", "--device", "cpu"],
            2,
            "--kv-device-memory: the model computes on",
        ),
        (["--tokens", "5", "--kv-host-memory", "1 apple"], 2, "--kv-host-memory: '1 apple' is not a size such as 8GiB"),
        (["--tokens", "5", "--dtype", "int8"], 2, "--dtype: 'int8' is not one of auto, float32, bfloat16, float16"),
        (["--tokens", "5", "--kv-dtype", "int4"], 2, "--kv-dtype: 'int4' is not one of auto, float32, bfloat16"),
        (["--tokens", "5", "--kv-dir", "docs/x"], 2, "--kv-dir docs/x: no such folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned(place: Path, arguments: list[str], code: int, part: str) -> None:
    check_refused(run_here("plan", *arguments), code, part)


def test_what_is_piped_in_is_planned(place: Path) -> None:
    text = fact_document("a").encode()
    piped, named = (planned_of(text, *arguments) for arguments in ((), ("-",)))
    assert piped == named == [{"path": "stdin", "tokens": piped[0]["tokens"]}] and piped[0]["tokens"] > 800
    assert run_here("plan", "--tokens", "5", stdin=text).code == 0
    for content in (b"", b"\0"):
        check_refused(run_here("plan", stdin=content), 2, "found nothing to read in -")


def planned_of(text: bytes, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(run_here("plan", *arguments, "--json", stdin=text).stdout)["documents"]


def test_without_a_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L4CTX_MODEL")
    for command in (["plan", "--tokens", "5"], ["plan", "docs"], ["prefill", "docs", "-o", "c"]):
        check_refused(run_here(*command), 2, "no model: give a checkpoint folder with --model DIR or the variable")


@pytest.mark.parametrize("arguments", [["--tokens", "5"], ["--tokens", "5", "--json"]], ids=["table", "json"])
def test_output_that_is_closed_or_full(place: Path, arguments: list[str]) -> None:
    run = functools.partial(run_process, "plan", *arguments, L4CTX_MODEL=str(TINY))
    check_refused(run(shell=">&-"), 2, "standard output is closed")
    check_refused(run(shell=">/dev/full"), 1, "cannot be written: No space left on device")
    assert run(shell="2>&-").code == 0


@pytest.mark.slow
def test_output_of_prefill_that_is_closed_or_full(place: Path) -> None:
    run = functools.partial(run_process, "prefill", "docs/a.md", "-o", "c", "-q", L4CTX_MODEL=str(TINY))
    check_refused(run("--json", shell=">&-"), 2, "standard output is closed")
    check_refused(run("--json", shell=">/dev/full"), 1, "cannot be written: No space left on device")
    assert run(shell=">&-") == Result(0, "", "")


# Runs that do not fit, and what is said to help


def needed(*arguments: str) -> tuple[int, int]:
    """Bytes that a question takes by its plan, and tokens of its prompt."""
    report = json.loads(ask("a", *arguments, "--quiet", "--json").stdout)
    return report["memory"]["predicted"]["needed"] + MARGIN_BYTES, report["prompt_tokens"]


IN_FLOAT32 = ("--dtype", "float32", "--prefill-chunk-size", "256", "--quiet")


def needed_beside_weights() -> int:
    """Bytes that `docs` takes in float32 where memory is short: only small weights are converted, others are mapped."""
    weights = json.loads(ask("a", "docs", *IN_FLOAT32, "--json").stdout)["memory"]["predicted"]["weights"]
    return needed("docs", *IN_FLOAT32)[0] - weights + 4 * small_parameter_count(TextConfig.from_folder(TINY))


@pytest.mark.slow
def test_too_little_memory_for_keys_and_values(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, free = IN_FLOAT32, needed_beside_weights()
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: free)
    assert ask("b", "docs", *options).stdout == answer("b")
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: free - 2 * MIB)
    check_refused(
        ask("b", "docs", *options),
        5,
        f"this run needs {human_bytes(free)} of memory, but {human_bytes(free - 2 * MIB)} is free (keys and values ",
        "--kv-dir DIR makes it fit (",
        "--kv-dtype bfloat16 makes it fit",
        "--dtype bfloat16 makes it fit",
        "--kv-dtype int8 makes it fit",
        "leave out docs/a.md, 50 % of the tokens",
        "fewer tokens: ",
    )
    for remedy in (["--kv-dir", "."], ["--kv-dtype", "int8"]):
        assert ask("b", "docs", *options, *remedy) == Result(0, answer("b"), ""), remedy
    assert ask("b", "docs/b.md", *options).stdout == answer("b")


@pytest.mark.matrix
def test_too_little_memory_for_keys_and_values_in_32_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = needed_beside_weights() - 2 * MIB
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: free)
    for remedy in (["--kv-dtype", "bfloat16"], ["--dtype", "bfloat16"]):
        assert ask("b", "docs", *IN_FLOAT32, *remedy) == Result(0, answer("b"), ""), remedy


def test_too_little_memory_for_activations(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--dtype", "float32", "--prefill-chunk-size", "8192", "--quiet")
    text_file(Path("longer.txt"), fact_document("c", lines=110))
    free, tokens = needed("docs", *options)
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: free)
    check_refused(
        ask("a", "docs", "longer.txt", *options),
        5,
        f"but {human_bytes(free)} is free (",
        "--dtype bfloat16 makes it fit",
        "leave out longer.txt, 39 % of the tokens;",
        "fewer tokens: ",
        found := "--prefill-chunk-size 4096 makes it fit",
    )
    smaller = found.split()[:2]
    assert ask("c", "docs", "longer.txt", *options, *smaller) == Result(0, answer("c"), "")
    by_itself = ask("c", "docs", "longer.txt", *options[:2])
    assert by_itself.stdout == answer("c")
    assert "the prefill chunk is 4096 tokens, so that the activations fit\n" in by_itself.stderr
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: MIB)
    tried = ask("a", "docs", *options)
    check_refused(tried, 5, "1.0 MiB is free", "--dtype bfloat16 saves ", ", not enough alone")
    assert "makes it fit" not in tried.stderr and "leave out" not in tried.stderr and tokens > 6000


def test_prefill_that_does_not_fit_makes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(place)
    with monkeypatch.context() as patch:
        patch.setattr("l4ctx.run.sizing.available_memory", lambda: MIB)
        check_refused(prefill("-q", "--dtype", "float32"), 5, "1.0 MiB is free", "nothing but a larger machine")
        assert "--kv-dir" not in prefill("-q").stderr  # a context is on disk anyway
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=MIB))
        check_refused(
            prefill("-q"),
            5,
            "of disk space in c, but 1.0 MiB is free (",
            "--kv-dtype int8",
            "or a folder on a larger disk, makes it fit",
        )
        assert files(place) == before
    assert prefill("-q") == Result(0, "", "")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=MIB))
    assert prefill("-q") == Result(0, "", "")  # it is there already


def test_documents_beside_a_context_need_a_place(place: Path) -> None:
    assert prefill("-q", paths=("docs/a.md",)).code == 0
    beside = ("docs", "--context", "c", "--kv-host-memory", "1B", "-q")
    check_refused(
        ask("b", *beside),
        5,
        "what these documents have beyond the context does not fit into memory; add "
        "--kv-dir, or read them into the context with l4ctx prefill",
    )
    assert ask("b", *beside, "--kv-dir", ".").stdout == answer("b")
    assert ask("a", *beside[1:], "--max-new-tokens", "100").stdout == answer("a")


# Budgets and storage types


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_blocks_go_to_disk(place: Path, kv_dtype: str) -> None:
    """The same answer, within the budget, and nothing is left behind."""
    Path("disk").mkdir()
    options = ("--kv-dtype", kv_dtype, "--prefill-chunk-size", "512", "--dtype", "float32")
    assert prefill(*options[:2]).code == 0
    for source, more in ((("docs",), ("--kv-dir", "disk", *options)), (("--context", "c"), ())):
        budget = 4 * MIB if kv_dtype == "float32" else 3 * MIB
        limited = (*source, *more, "--kv-host-memory", f"{budget}B", "--quiet")
        report = json.loads(ask("a", *limited, "--json").stdout)
        assert report["answer"] + "\n" == answer("a") and report["memory"]["nope_disk"] > 0
        assert report["memory"]["nope_host"] + report["memory"]["buffers"] <= budget
        result = ask("b", *limited, "--memory-report")
        assert (result.code, result.stdout) == (0, answer("b"))
        assert re.search(r"^NoPE keys and values, disk +\S+ [KM]iB", result.stderr, re.MULTILINE)
        assert re.search(r"^read buffers +\S+ [KM]iB", result.stderr, re.MULTILINE)
        assert os.listdir("disk") == []


def test_a_limit_on_host_memory_without_a_disk(place: Path) -> None:
    limited = ("docs", "--kv-host-memory", "1MiB", "--quiet", "--dtype", "float32")
    refused = ask("a", *limited)
    check_refused(refused, 5, "--kv-host-memory, but 1.0 MiB is allowed", "--kv-dir DIR makes it fit")
    remedy = re.search(r"--kv-host-memory \d+MiB(?= makes it fit)", refused.stderr)
    assert remedy is not None
    assert ask("a", *limited, *remedy.group().split()).stdout == answer("a")
    exceeded = ask("a", *limited[:3], "--kv-dir", ".")
    assert exceeded.stdout == answer("a") and "--kv-host-memory 1.0 MiB is exceeded: " in exceeded.stderr


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "fp8", "int8"])
def test_storage_types(place: Path, kv_dtype: str) -> None:
    options = ("docs", "--kv-dtype", kv_dtype, "--quiet", "--dtype", "float32")
    assert ask("b", *options).stdout == answer("b")
    report = json.loads(ask("a", *options, "--json").stdout)
    sealed = report["memory"]["nope_host"] / (6 * ROW * TOKEN_BYTES)
    expected = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5, "fp8": 0.27, "int8": 0.27}[kv_dtype]
    assert report["answer"] + "\n" == answer("a") and report["memory"]["predicted"]["kv_dtype"] == kv_dtype
    assert expected <= sealed < expected + 0.2


def test_a_context_of_int8_is_asked(place: Path) -> None:
    assert prefill("--kv-dtype", "int8").code == 0
    shutil.rmtree("docs")
    check_answers(names="ab")
    check_answers("--kv-dtype", "int8", "--dtype", "bfloat16", names="a")
    assert "blocks in int8" in run_here("inspect", "c").stdout
    assert told()["memory"]["nope_disk"] < 0.3 * 6 * ROW * TOKEN_BYTES


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (
            ["--kv-device-memory", "1GiB"],
            2,
            "--kv-device-memory: the model computes on the CPU, whose memory is the host",
        ),
        (
            ["--kv-device-memory", "1x"],
            2,
            "--kv-device-memory: '1x' is not a size such as 8GiB, 500MB or 8388608 (bytes)",
        ),
        (["--kv-host-memory", ""], 2, "--kv-host-memory: '' is not a size"),
        (["--kv-host-memory", "-1"], 2, "--kv-host-memory: '-1' is not a size"),
        (["--kv-dtype", "int4"], 2, "--kv-dtype: 'int4' is not one of auto, float32, bfloat16, float16, fp8, int8"),
        (["--kv-dir", "docs/x"], 2, "--kv-dir docs/x: no such folder; make it, or name another one"),
        (["--kv-dir", "docs/a.md"], 2, "--kv-dir docs/a.md: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_budgets_that_cannot_be_kept(place: Path, options: list[str], code: int, part: str) -> None:
    check_refused(ask("a", "docs", *options, "--device", "cpu", "-q"), code, part)


def test_a_full_disk_of_a_scratch_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    check_refused(
        ask("a", "docs", "--kv-dir", ".", "--kv-host-memory", "1MiB", "-q"),
        5,
        "keys and values cannot be "
        "written: No space left on device; free some space there, or name another folder with --kv-dir",
    )
    assert os.listdir() == ["docs"]


WRITE = "l4ctx.contexts.files.write_units"
FULL: list[tuple[str, int, int]] = [  # what fails, after how many calls; tokens that are kept then
    (WRITE, 0, 0),
    (WRITE, 1, 0),
    (WRITE, 2, ROW),
    (WRITE, 3, 2 * ROW),
    ("os.pwrite", 1 + 3 + 5 + 2, ROW),  # the first is of the list of contexts
    ("os.fsync", 11, ROW),
]


@pytest.mark.parametrize(("name", "calls", "kept"), FULL)
def test_a_full_disk_of_a_context_loses_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, kept: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    module, _, function = name.rpartition(".")
    target = getattr(sys.modules[module], function)
    count = itertools.count()

    def full(*given: Any) -> Any:
        if next(count) >= calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return target(*given)

    paths = ("docs/a.md",)
    assert prefill(paths=paths, context="whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        check_refused(
            prefill("-q", paths=paths),
            5,
            "c: cannot be written: No space left on device; ",
            f"{kept:,} tokens are kept: free some space and run the same command again",
        )
    *notes, end = prefill(paths=paths).stderr.splitlines()[1:-1]
    assert notes == [f"l4ctx: {kept:,} of {spans()[-1]:,} tokens are in c already"] * bool(kept)
    assert end.startswith("l4ctx: read ")
    assert block_digests(Path("c")) == block_digests(Path("whole"))
    check_answers(names="a")
