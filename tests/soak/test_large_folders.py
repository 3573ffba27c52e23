"""A million files, folders 100,000 deep and a line of 2 GiB: what they may cost, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli_runner import TINY
from support.places import ROOT

FOLDERS, FILES = 1000, 1000
MEASURED = """
import resource, sys, time
from l4ctx.documents.document import DocumentError
from l4ctx.documents.reader import read_documents
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    found = read_documents(sys.argv[1:], stdin=None)
    print(len(found.documents), len(found.skipped))
except DocumentError as error:
    print(error)
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree fails on deep folders


def measured(folder: Path) -> tuple[str, float, float]:
    """What it said, the seconds of a processor, and the growth in MiB."""
    command = [sys.executable, "-c", MEASURED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    said, figures = done.stdout.splitlines()
    seconds, growth = map(float, figures.split())
    print(f"{said[-100:]}: {seconds:.1f} s, {growth:.0f} MiB")
    return said, seconds, growth


@pytest.mark.soak
@pytest.mark.parametrize(("size", "most"), [(0, 300), (100, 600)])  # the texts themselves are 150 bytes each
def test_a_million_files(place: Path, size: int, most: float) -> None:
    for folder in range(FOLDERS):
        (place / "d" / str(folder)).mkdir(parents=True)
        for file in range(FILES):
            (place / "d" / str(folder) / f"file-{file}.txt").write_text(
                f"{folder * FILES + file:>{size}}" if size else ""
            )
    said, seconds, growth = measured(place / "d")
    assert said == (f"{FOLDERS * FILES} 0" if size else f"0 {FOLDERS * FILES}")
    assert seconds < 120 and growth < most


@pytest.mark.soak
def test_folders_a_hundred_thousand_deep(place: Path) -> None:
    (place / "d").mkdir()
    code = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(100_000):\n    os.mkdir('d')\n    os.chdir('d')"
    subprocess.run([sys.executable, "-c", code, place / "d"], check=True)
    said, seconds, growth = measured(place / "d")
    assert "cannot be read: File name too long" in said and "(--skip-unreadable leaves " in said
    assert seconds < 10 and growth < 100


@pytest.mark.soak
def test_a_line_of_two_gigabytes(place: Path) -> None:
    line = place / "line.txt"
    line.write_bytes(b"words " * 20_000)
    os.truncate(line, 1 << 31)
    code = "from l4ctx.cli.app import main\nmain()"
    command = [sys.executable, "-c", code, "plan", line, "--model", str(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith(f"l4ctx: {line}: 2.0 GiB of text are more than ") and done.stderr.count("\n") == 1
