"""What a short run neither imports nor waits for, and what is never executed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.places import ROOT

NEVER = ("transformers", "torch._dynamo", "torch._inductor", "sympy", "pandas", "PIL", "matplotlib")
NOT_FOR_AN_ERROR = ("torch", "numpy", "tokenizers", "jinja2", "safetensors")


def modules_of(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of the command, and the modules that it has imported by its end."""
    code = (
        "import os, sys\nleave = os._exit\n"
        "def leaving(code):\n    print('\\n' + ' '.join(sys.modules), flush=True)\n    leave(code)\n"
        "os._exit = sys.exit = leaving\n"
        "from l4ctx.cli.app import main\nmain()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert run.stdout, run.stderr
    return run.returncode, set(run.stdout.splitlines()[-1].split())


def test_a_short_question_loads_no_library_that_it_does_not_use() -> None:
    question = "What is the access code for the amber falcon?"
    code, modules = modules_of("ask", question, "samples/documents/handbook.md", "--model", "samples/tiny")
    assert code == 0 and {"torch", "l4ctx.engine.generate"} <= modules
    assert modules.intersection(NEVER) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "q", "no such file", "--model", "samples/tiny"),
        ("ask", "q", "README.md", "--model", "no such folder"),
        ("ask", "--questions", "README.md", "no such file", "--model", "samples/tiny"),
        ("plan", "--tokens", "1000000", "--model", "samples/tiny"),
        ("--help",),
        ("ask", "--help"),
    ],
)
def test_errors_plans_and_help_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    _, modules = modules_of(*arguments)
    assert "l4ctx.cli.app" in modules
    assert modules.intersection({*NEVER, *NOT_FOR_AN_ERROR}) == set()


def test_tokens_are_counted_without_torch() -> None:
    code, modules = modules_of("tokens", "samples/documents/handbook.md", "--model", "samples/tiny")
    assert code == 0 and {"tokenizers", "l4ctx.prompt.builder"} <= modules
    assert modules.intersection({*NEVER, "torch", "numpy", "safetensors"}) == set()


@pytest.mark.parametrize("name", ["model.py", "cache.py", "typer.py", "model/__init__.py"])
def test_python_m_executes_nothing_in_the_current_folder(tmp_path: Path, name: str) -> None:
    """-m puts that folder first on the path, where somebody's file may have the name of a module that is imported."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("open('executed', 'w').close()\nraise SystemExit('executed')\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "l4ctx", "plan", "--tokens", "1000", "--model", str(ROOT / "samples" / "tiny")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert (run.returncode, run.stdout != "") == (0, True), run.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(given: dict[str, str], spins: str) -> None:
    """The variable must be set before torch is imported."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    code = (
        "import os, sys, l4ctx.machine.processor\nl4ctx.machine.processor.share_cores()\n"
        "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"False {spins}\n"
