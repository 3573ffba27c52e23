"""Every option of every command that takes a path, with names that no file can have, or that stand for another kind.

Options are found by introspection, so that a new one is tried as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from l4ctx.cli.app import app
from support.cli_runner import DOCUMENT, QUESTION, Result, run_here, text_file
from support.places import TINY

PATHS = {"PATH", "DIR", "FILE", "CONTEXT", "MODEL", "OUT", "MODEL|CONTEXT"}
"""Metavars of what takes a path."""

BASE: dict[str, list[str]] = {
    "ask": [QUESTION, "document.txt", "--model", "model", "--max-new-tokens", "1", "--quiet"],
    "chat": ["document.txt", "--model", "model", "--quiet"],
    "prefill": ["document.txt", "--output", "new", "--model", "model", "--quiet"],
    "inspect": ["document.txt"],
    "plan": ["document.txt", "--model", "model", "--quiet"],
    "tokens": ["document.txt", "--model", "model", "--quiet"],
    "bench": ["--tokens", "9", "--quiet"],
    "quantize": ["model", "--output", "new", "--quiet"],
    "config": ["show"],
    "list": [],
    "log": [],
    "rm": ["document.txt", "--yes"],
    "score": ["document.txt", "--model", "model", "--quiet"],
    "needle": ["document.txt", "--model", "model", "--lengths", "300", "--depths", "1", "--trials", "1", "--quiet"],
}
INSTEAD: dict[tuple[str, str], list[str]] = {  # arguments for options that do not go with the above
    ("ask", "--question-file"): ["document.txt", "--model", "model"],
    ("ask", "--questions"): ["document.txt", "--model", "model"],
    ("ask", "--context"): [QUESTION, "--model", "model"],
    ("ask", "--add"): [QUESTION, "--model", "model", "--context", "new"],
    ("ask", "--resume-answers"): ["document.txt", "--model", "model", "--questions", "questions.txt"],
    ("bench", "--gguf"): ["--model", "model", "--compare", "llama.cpp"],
}
NAMES = {
    "long": "n" * 300,
    "NUL": "a\0b",
    "not UTF-8": "name\udcff",
    "below a file": "document.txt/below",
    "empty": "",
    "a folder": "folder",
    "a file": "bytes.bin",
    "a link to itself": "loop",
    "a link to nothing": "nothing",
    "a socket or device": "/dev/null",
}


def parameters() -> Iterator[tuple[str, Any, str]]:
    """The command, the type and the name of each parameter that a person may give: its option or its metavar."""
    for registered in app.registered_commands:
        function = registered.callback
        assert function is not None
        for name, hint in get_type_hints(function, include_extras=True).items():
            if name == "log_file" and function.__name__ != "plan":  # which all commands have alike
                continue
            if name != "return" and hint is not typer.Context:
                kind, info = get_args(hint)
                is_option = isinstance(info, typer.models.OptionInfo)
                option = _option(info, name) if is_option else info.metavar
                yield function.__name__, (kind, info.metavar), option


def _option(info: typer.models.OptionInfo, name: str) -> str:
    """As it is typed: typer takes a name that is given first for a default."""
    names = [given for given in (info.default, *(info.param_decls or ())) if str(given).startswith("--")]
    return names[0] if names else f"--{name.replace('_', '-')}"


def taking_paths() -> list[tuple[str, str]]:
    """Each command with the option, or the metavar of the argument, that takes a path."""
    return [(command, option) for command, (_, metavar), option in parameters() if metavar in PATHS]


def test_every_path_is_marked_as_one() -> None:
    assert not {
        (command, option)
        for command, (kind, metavar), option in parameters()
        if "Path" in str(kind) and metavar not in PATHS
    }
    assert set(INSTEAD) <= set(taking_paths()) and len(taking_paths()) > 20


def arguments(command: str, option: str, value: str) -> list[str]:
    if not option.startswith("-"):
        given = [
            value if argument == ("model" if option == "MODEL" else "document.txt") else argument
            for argument in BASE[command]
        ]
        assert value in given
        return [command, *given]
    given = INSTEAD.get((command, option), BASE[command])
    if option in given:
        place = given.index(option)
        given = given[:place] + given[place + 2 :]
    return [command, *given, option, value]


def check(result: Result) -> None:
    """An answer or one line."""
    assert result.code in range(8), result
    if result.code:
        lines = [line for line in result.stderr.splitlines() if not re.search(r"taken as a pattern", line)]
        assert len(lines) == 1 and lines[0].startswith("l4ctx: "), result
        assert result.code != 1, result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    text_file(folder / "document.txt", DOCUMENT)
    text_file(folder / "questions.txt", f"{QUESTION}\n")
    (folder / "model").symlink_to(TINY)
    (folder / "folder").mkdir()
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to("loop")
    (folder / "nothing").symlink_to("missing")
    return folder


@pytest.mark.parametrize(("command", "option"), taking_paths())
def test_odd_names_are_refused_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("L4CTX_MODEL", raising=False)
    for name, value in NAMES.items():
        result = run_here(*arguments(command, option, value))
        try:
            check(result)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_what_is_too_long_is_cut_in_the_middle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = run_here("prefill", f"first{'/n' * 9000}last", "-o", "new", "--model", "model")
    check(result)
    assert result.code and "first" in result.stderr and " [...] " in result.stderr and len(result.stderr) < 2100
