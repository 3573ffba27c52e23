"""Usual options from the command line, the environment and a file; what is kept in a log; completion; manual pages."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from l4ctx.cli.settings import KINDS
from samples.documentation.man_pages import pages
from support.cli_runner import ANSWER, COMMAND, QUESTION, TINY, check_refused, run_here, run_process, text_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of settings, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("L4CTX_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config" / "l4ctx" / "config.toml"


def planned(*arguments: str) -> dict[str, object]:
    result = run_here("plan", "--tokens", "5000", "--json", *arguments)
    assert result.code == 0, result
    return json.loads(result.stdout)["plan"]


def test_the_command_line_comes_before_the_environment_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", str(TINY))
    assert planned(*model)["kv_dtype"] == "float32"
    text_file(file, f'kv-dtype = "int8"\nmodel = "{TINY}"\nmax-new-tokens = 7\n')
    assert planned()["kv_dtype"] == "int8"
    monkeypatch.setenv("L4CTX_KV_DTYPE", "fp8")
    assert planned()["kv_dtype"] == "fp8"
    assert planned("--kv-dtype", "float16")["kv_dtype"] == "float16"
    shown = json.loads(run_here("config", "show", "--json").stdout)
    assert shown["file"] == str(file) and list(shown["options"]) == list(KINDS)
    assert shown["options"]["kv-dtype"] == {"value": "fp8", "source": "environment"}
    assert shown["options"]["max-new-tokens"] == {"value": 7, "source": "file"}
    assert shown["options"]["loop-guard"] == {"value": True, "source": "default"}
    lines = run_here("config").stdout.splitlines()
    assert lines[0] == f"# {file}" and [line.split() for line in lines if line.startswith("kv-dtype")] == [
        ["kv-dtype", "environment", "fp8"]
    ]


def test_where_the_file_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here("config", "path").stdout == f"{file}\n" and not file.exists()
    assert run_here("config").stdout.startswith(f"# {file} (not there)\n")
    text_file(file, "broken")
    assert run_here("config", "path").code == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # to be ignored
    monkeypatch.setenv("HOME", "/nowhere")
    assert run_here("config", "path").stdout == "/nowhere/.config/l4ctx/config.toml\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('kv-dtyp = "int8"', ["kv-dtyp: no such option; did you mean kv-dtype?"]),
        ('replace = true\nnonsense = "1"', ["replace: no such option"]),
        ("kv-dtype = 5", ["kv-dtype: expected a text"]),
        ('kv-dtype = "int9"', ["kv-dtype: 'int9' is not one of auto, float32"]),
        ('kv-host-memory = "8 apples"', ["kv-host-memory: '8 apples' is not a size"]),
        ("kv-host-memory = [1]", ["kv-host-memory: expected a text or a whole number"]),
        ("max-new-tokens = 0", ["max-new-tokens: 0 is less than 1"]),
        ("top-p = 1.5", ["top-p: ", "less than or equal to 1"]),
        ('sample = "yes"', ["sample: expected true or false"]),
        ("models = 3", ["models: expected a table"]),
        ("[models]\na = 3", ["models.a: expected a text"]),
        ("a =", ["no TOML: Invalid value"]),
        ('a = "\x1b[2J"', ["no TOML: "]),
        ("\ud800", ["no TOML: "]),
    ],
)
def test_what_the_file_says_wrongly_is_refused(file: Path, content: str, parts: list[str]) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    for arguments in (("plan", "--tokens", "5", "--model", str(TINY)), ("config", "show")):
        check_refused(run_here(*arguments), 2, f"{file}: ", *parts)
    assert run_here("ask", "--help").code == run_here("--version").code == 0


def test_a_file_that_cannot_be_read(file: Path) -> None:
    file.mkdir(parents=True)
    check_refused(run_here("plan", "--tokens", "5", "--model", str(TINY)), 2, f"{file}: cannot be read: Is a directory")


def test_a_plan_for_gpus_knows_nothing_of_this_machine(file: Path) -> None:
    text_file(file, 'device = "cpu"\nweights-memory = "1GiB"\n')
    result = run_here("plan", "--tokens", "5000", "--model", str(TINY), "--gpu-memory", "8GiB")
    assert (result.code, result.stderr) == (0, "")


# --log-file


def test_a_log_holds_what_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(Path("a.md"), ANSWER)
    log = Path("run.log")
    result = run_here("ask", QUESTION, "a.md", "--model", str(TINY), "--log-file", str(log), "--quiet")
    assert (result.code, result.stdout, result.stderr) == (0, ANSWER, "")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    check_refused(run_here("ask", QUESTION, "b.md", "--model", str(TINY), "--log-file", str(log)), 2, "b.md: no such")
    lines = log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[\d+\] "
    assert all(re.match(stamp, line) for line in lines)
    told = [re.sub(stamp, "", line) for line in lines]
    assert told[0] == "ask begins" and any(line.startswith("1 document, ") for line in told)
    assert told[-2] == "ask begins" and "b.md: no such file" in told[-1]
    assert QUESTION not in log.read_text() and ANSWER not in log.read_text()
    arguments = ("plan", "--tokens", "5", "--model", str(TINY), "--log-file")
    check_refused(run_here(*arguments, "no/such/folder"), 2, "--log-file no/such/folder: cannot be written")
    check_refused(run_here(*arguments, ""), 2, "--log-file: the name of the file is empty")
    assert run_here(*arguments, "/dev/full").code == 0


# Completion and manual pages


def completed(shell: str, **variables: str) -> tuple[str, str]:
    """What the shell is answered, and the heavy modules that this took."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.stderr.write(' '.join({'torch', 'numpy', 'tokenizers'} & sys.modules.keys())))\n"
        "from l4ctx.cli.app import main\nmain()"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**variables, "_L4CTX_COMPLETE": shell, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout, result.stderr


@pytest.mark.parametrize(
    ("shell", "part"),
    [("bash", "complete -o default -F"), ("zsh", "#compdef l4ctx"), ("fish", "complete --command l4ctx")],
)
def test_completion_scripts(shell: str, part: str) -> None:
    script, heavy = completed(f"source_{shell}")
    assert part in script and "_L4CTX_COMPLETE" in script and heavy == ""


def test_what_is_completed() -> None:
    assert completed("complete_bash", COMP_WORDS="l4ctx ask --kv-dt", COMP_CWORD="2") == ("--kv-dtype\n", "")
    assert completed("complete_bash", COMP_WORDS="l4ctx ask --kv-dtype i", COMP_CWORD="3") == ("int8\n", "")
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": "l4ctx ask --pl"}
    assert completed("complete_fish", **fish)[0].startswith("--plain\tShow the answer's Markdown")


def test_completion_is_installed_where_the_shell_looks(tmp_path: Path) -> None:
    code = "import shellingham; shellingham.detect_shell = lambda: ('fish', 'fish')\n" + COMMAND[-1]
    command = [sys.executable, "-P", "-c", code, "--install-completion"]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert "_L4CTX_COMPLETE" in (tmp_path / ".config" / "fish" / "completions" / "l4ctx.fish").read_text()


def test_manual_pages() -> None:
    written = pages()
    assert {"l4ctx.1", "l4ctx-ask.1", "l4ctx-config.1"} <= written.keys()
    for name, text in written.items():
        sections = re.findall(r"^\.SH (.+)$", text, re.M)
        assert sections[:2] == ["NAME", "SYNOPSIS"] and sections[-2:] == ["EXIT STATUS", "SEE ALSO"], name
        assert not re.search(r"(?<!\\)-(?=-)", text), name
        requests = [line for line in text.splitlines() if line.startswith((".", "'"))]
        assert all(re.match(r"\.(TH|SH|TP|PP|BR)\b", line) for line in requests), name
    options = set(re.findall(r"--[a-z][a-z-]+", run_here("ask", "--help").stdout))
    ask = written["l4ctx-ask.1"].replace("\\-", "-")
    assert options <= set(re.findall(r"--[a-z][a-z-]+", ask)) and "L4CTX_KV_DTYPE" in ask


def test_settings_cost_help_nothing(file: Path) -> None:
    assert run_process("--help", XDG_CONFIG_HOME=str(file)).code == 0
