"""A small share of the fuzzing: some hundred inputs for each reader, the same in every run; and all that ever failed.

`pytest -m fuzz` reads as many as are asked for, in processes of their own (tests/fuzz/campaign.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.campaign import share_of
from fuzz.corpus import CORPUS, MOST_BYTES, failure_of, load
from fuzz.inputs import Failure, Folder, Reader, mutated
from fuzz.limits import attempt, prepare, seed_and_draws
from fuzz.readers import READERS
from fuzz.shrink import by_seed, changed
from support.places import ROOT

SEED = 2026
USUAL = 100
SHARE = {
    "config": 100, "plan": 60, "tokenizer": 80, "chat_template": 15, "weights": 80, "quantized_weights": 0,
    "inspect_checkpoint": 15, "gguf_model": 0, "context": 120, "inspect_context": 50, "text": 80,
    "text_from_a_pipe": 40, "image": 120, "pdf": 20, "pdf_pages": 3, "gitignore": 100, "folder": 80, "command_line": 6,
}  # fmt: skip
"""Inputs in the ordinary suite, if not USUAL: readers that take long, or that need libraries to make valid inputs."""
DRAWN = ("config", "questions", "gguf_header", "notebook")
"""Readers that hypothesis tries in the ordinary suite."""
EXAMPLES = int(os.environ.get("L4CTX_FUZZ_EXAMPLES", "20000"))
"""Inputs of `pytest -m fuzz`."""


@pytest.mark.parametrize("name", [name for name in READERS if SHARE.get(name, USUAL)])
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """If this fails: `python tests/fuzz/corpus.py keep` with the reader, the seed and the number."""
    reader, folder = READERS[name], Folder(tmp_path)
    prepare(reader)
    for number in range(SHARE.get(name, USUAL)):
        seed, draws = seed_and_draws(reader, SEED, number)
        files = mutated(reader, reader.seeds()[seed], draws)
        try:
            attempt(reader, folder, files)
        except Failure as failure:
            pytest.fail(f"{name} {SEED} {number}: {failure.kind}\n{failure.details}")


@pytest.mark.parametrize("name", DRAWN)
def test_changes_that_hypothesis_draws(name: str, tmp_path: Path) -> None:
    _check_drawn(READERS[name], tmp_path, examples=25)


def _check_drawn(reader: Reader, place: Path, examples: int) -> None:
    """What fails is shrunk, and told in full."""
    folder = Folder(place)
    prepare(reader)

    @by_seed(examples)
    @given(changed(reader))
    def read(drawn: tuple[str, dict[str, bytes]]) -> None:
        seed, files = drawn
        valid = reader.seeds()[seed]
        try:
            attempt(reader, folder, files)
        except Failure as failure:
            differing = {name: content for name, content in files.items() if content != valid.get(name)}
            raise AssertionError(f"{reader.name}, {seed}: {failure.kind}: {differing}\n{failure.details}") from None

    read()


def _kept() -> list[Any]:
    """Those that take seconds, as limits of time are what holds them, are for -m fuzz."""
    files = sorted(CORPUS.glob("*.json"))
    slow = {file for file in files if '"slow": true' in file.read_text(encoding="utf-8")}
    return [pytest.param(file, id=file.stem, marks=[pytest.mark.fuzz] * (file in slow)) for file in files]


@pytest.mark.parametrize("file", _kept())
def test_what_failed_once(file: Path) -> None:
    assert file.stat().st_size <= MOST_BYTES
    reader, files = load(file)
    prepare(reader)
    failure = failure_of(reader, files)
    assert failure is None, failure.details


@pytest.mark.fuzz
def test_many() -> None:
    """Inputs over all readers; those that L4CTX_FUZZ_STATE, a folder, has counted are not read again."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "campaign.py"), "--inputs", str(EXAMPLES)]
    state = os.environ.get("L4CTX_FUZZ_STATE")
    command += ["--state", state] if state else []
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the script makes its own path
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=own)
    assert done.returncode == 0, done.stdout


@pytest.mark.fuzz
@pytest.mark.parametrize("name", sorted(READERS))
def test_many_that_hypothesis_draws(name: str, tmp_path: Path) -> None:
    _check_drawn(READERS[name], tmp_path, examples=max(10, share_of(name, EXAMPLES // 20, list(READERS))))


def test_hypothesis_and_a_seed_drive_the_same_changes() -> None:
    found = set()

    @by_seed(30)
    @given(st.randoms(use_true_random=False))
    def draw(chance: object) -> None:
        reader = READERS["questions"]
        found.add(mutated(reader, reader.seeds()["objects"], [chance])["questions.jsonl"])  # type: ignore[list-item]

    draw()
    assert len(found) > 10
