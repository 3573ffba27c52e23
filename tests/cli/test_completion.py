"""Completion: the scripts for shells, in bash as far as bash can run them, and what the program tells each shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.completion import get_completion_script

from l4ctx.cli.completion import ASKED
from support.cli_runner import run_here, text_file

SHELLS = ("bash", "zsh", "fish")
EXCERPT = "in the settings ([models])"
"""Of the help of --model, with what rich would take for its markup."""


def completed(monkeypatch: pytest.MonkeyPatch, shell: str, line: str, action: str = "get-args") -> str:
    """What the program answers to a shell's script when Tab is pressed behind the line."""
    words = line.split(" ")
    variables = {
        "_L4CTX_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": action,
        "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        result = run_here()
    assert result.stderr == "" and result.code == (0 if action == "get-args" else result.code)
    return result.stdout if action == "get-args" else str(result.code)


def bash(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def test_every_shell_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of options, each with its help on one line; of choices; and nothing where a path is wanted."""
    names = completed(monkeypatch, "bash", "l4ctx chat --").split()
    assert {"--model", "--context", "--continue", "--last"} <= set(names) and all(name[:2] == "--" for name in names)
    told = completed(monkeypatch, "fish", "l4ctx chat --").splitlines()
    assert [line.partition("\t")[0] for line in told] == names and all(line.count("\t") == 1 for line in told)
    zsh = completed(monkeypatch, "zsh", "l4ctx chat --").splitlines()
    assert [line.partition('"--')[2].partition('"')[0] for line in zsh if line] == [name[2:] for name in names]
    assert EXCERPT in "".join(told) and EXCERPT in "".join(zsh)
    choices = "l4ctx ask --attention m"
    assert [completed(monkeypatch, shell, choices).strip() for shell in SHELLS] == [
        "matmul", "_arguments '*: :((\"matmul\"))'", "matmul",
    ]  # fmt: skip
    assert [completed(monkeypatch, shell, "l4ctx chat a").strip() for shell in SHELLS] == ["", "_files", ""]
    assert completed(monkeypatch, "fish", "l4ctx chat --", "is-args") == "0"
    assert completed(monkeypatch, "fish", "l4ctx chat a", "is-args") == "1"


def test_what_zsh_evaluates_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever quotes, dollars and backticks help has: bash reads these words as zsh does."""
    for line in ("l4ctx ", "l4ctx ask --", "l4ctx config "):
        text_file(tmp_path / "told", completed(monkeypatch, "zsh", line))
        stub = '_arguments() { echo "$#"; printf %s "$1" > argument; }; eval "$(cat told)"'
        assert bash(stub, tmp_path) == "1\n"
        argument = (tmp_path / "argument").read_text()
        assert argument.startswith("*: :((") and argument.endswith("))") and argument.count("\n") < 120


def script_of(shell: str) -> str:
    return get_completion_script(prog_name="l4ctx", complete_var=ASKED, shell=shell)


def test_the_script_of_bash(tmp_path: Path) -> None:
    """Gives the program the words, and bash what it answers."""
    script = script_of("bash")
    stub = text_file(
        tmp_path / "l4ctx",
        '#!/bin/sh\necho "$COMP_CWORD $_L4CTX_COMPLETE ${COMP_WORDS}" > asked\nprintf "x y\\nz\\n"\n',
    )
    stub.chmod(0o755)
    call = "COMP_WORDS=(l4ctx chat --mo); COMP_CWORD=2; _l4ctx_completion l4ctx; printf '[%s]' \"${COMPREPLY[@]}\""
    assert bash(f"{script}\n{call}; complete -p l4ctx", tmp_path) == (
        "[x y][z]complete -o default -F _l4ctx_completion l4ctx\n"
    )
    assert (tmp_path / "asked").read_text() == "2 complete_bash l4ctx\nchat\n--mo\n"
    for shell, part in (("zsh", "#compdef l4ctx"), ("fish", "complete --command l4ctx")):
        assert part in script_of(shell)
