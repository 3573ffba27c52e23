"""Contexts that version 0.1.0 saved still open, answer and resume.

They lie in saved_by_0_1_0 with the documents they were made of; make.py.txt there made them, with the code of
that version. They were made by `l4ctx prefill docs -o context` with samples/tiny and OPTIONS:

complete: a sealed block of 2,048 tokens, and a tail of 46.
interrupted: Ctrl-C after the first sealed block, 2,048 of 4,200 tokens.
image: a text and a card, 75 tokens, all in the tail.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.cli_runner import ANSWER, TINY, Result, answer, ask, check_refused, run_here, text_file, told
from support.context_toys import files

SAVED = Path(__file__).resolve().parent / "saved_by_0_1_0"
TOKENS = {"complete": 2094, "interrupted": 4200, "image": 75}
SEALED = 2048
OPTIONS = ("--dtype", "float32", "--kv-dtype", "int8", "--attention", "sdpa", "--prefill-chunk-size", "512")
CARD_QUESTION, CARD_ANSWER = (
    "What is the access code for the green star?",
    "The access code for the green star is 40817.\n",
)

pytestmark = pytest.mark.usefixtures("small_rows")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Works in a copy of one of the folders, with a model in the environment."""
    name: str = request.param
    shutil.copytree(SAVED / name, tmp_path / name)
    (tmp_path / name / "context" / "blocks").mkdir(exist_ok=True)  # git keeps no empty folder
    for path in (tmp_path / name / "context").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    (tmp_path / name / "context").chmod(0o700)
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return name


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("saved", names, indirect=True)


def read(context: str = "context") -> Result:
    return run_here("prefill", "docs", "-o", context, *OPTIONS)


def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("context", "manifest.json").read_text(encoding="utf-8"))
    return content


def blocks(context: str) -> list[Path]:
    """In the order of their positions."""
    return sorted(Path(context, "blocks").iterdir())


@of("complete", "interrupted", "image")
def test_nothing_is_damaged(saved: str) -> None:
    before = files(Path("context"))
    shown = run_here("inspect", "context", "--verify", "--json")
    assert shown.code == 0 and shown.stderr == ""
    (state,) = json.loads(shown.stdout)["states"]
    assert state["tokens"] == TOKENS[saved]
    assert files(Path("context")) == before


@of("complete", "interrupted", "image")
def test_the_checkpoint_has_the_same_fingerprints(saved: str) -> None:
    """Those of the text model; the vision model's is part of an image's digest, which decides whether it is reused."""
    from l4ctx.checkpoint.fingerprint import FIELDS, fingerprint
    from model.config import TextConfig
    from model.weights.loading import checked_sources, stored_tensors

    config = TextConfig.from_folder(TINY)
    now = fingerprint(TINY, config, stored_tensors(checked_sources(TINY, config)))
    assert now == {name: manifest()["made_with"][name] for name in FIELDS}
    assert "checkpoint" not in manifest()


@of("complete", "image")
def test_what_is_kept_is_asked_without_documents(saved: str) -> None:
    shutil.rmtree("docs")
    before = files(Path("context"))
    for name in {"complete": "ab", "image": "d"}[saved]:
        assert ask(name, "--context", "context", "--quiet") == Result(0, answer(name), "")
    if saved == "image":
        asked = run_here("ask", CARD_QUESTION, "--context", "context", "--quiet")
        assert asked == Result(0, CARD_ANSWER, "")
    assert files(Path("context")) == before


@of("complete", "image")
def test_the_same_documents_change_nothing(saved: str) -> None:
    before, total = files(Path("context")), TOKENS[saved]
    result = read()
    assert result.code == 0
    assert f"l4ctx: {total:,} of {total:,} tokens are in context already\n" in result.stderr
    assert files(Path("context")) == before


@of("interrupted")
def test_the_interrupted_one_goes_on(saved: str) -> None:
    """It ends with the blocks of a context that is made now, up to the rounding of another processor."""
    total = TOKENS[saved]
    check_refused(ask("a", "--context", "context"), 7, f"context: reading was interrupted after 2,048 of {total:,} tok")
    (first,) = blocks("context")
    before = first.read_bytes()
    result = read()
    assert result.code == 0
    assert f"l4ctx: 2,048 of {total:,} tokens are in context already\n" in result.stderr
    assert read("new").code == 0
    assert first.read_bytes() == before
    assert len(blocks("context")) == len(blocks("new")) == 2
    for ours, new in zip(blocks("context"), blocks("new"), strict=True):
        check_equal_but_for_rounding(ours, new)
    assert run_here("inspect", "context", "--verify").code == 0
    shutil.rmtree("docs")
    for name in "ab":
        assert ask(name, "--context", "context", "--quiet") == Result(0, answer(name), "")


def check_equal_but_for_rounding(one: Path, other: Path) -> None:
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata().keys() == second.metadata().keys()
    mine, others = load_file(one), load_file(other)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (others[name].dtype, others[name].shape)
        if tensor.dtype == torch.int8:
            assert (tensor.int() - others[name].int()).abs().max() <= 1
        else:
            torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-6)


@of("complete")
def test_documents_are_added_behind(saved: str) -> None:
    text_file(Path("more.md"), answer("c"))
    before = files(Path("context"))
    report = told("--add", "more.md", context="context")
    assert (report["reused_tokens"], report["answer"]) == (TOKENS[saved], ANSWER.rstrip())
    assert ask("c", "--context", "context", "--add", "more.md", "--quiet") == Result(0, answer("c"), "")
    assert files(Path("context")) == before


@of("complete")
def test_a_changed_document_is_read_behind_the_sealed_block(saved: str) -> None:
    text_file(Path("docs", "b.md"), answer("c"))
    before = files(Path("context"))
    assert told("docs", context="context")["reused_tokens"] == SEALED
    assert ask("c", "docs", "--context", "context", "--quiet") == Result(0, answer("c"), "")
    assert files(Path("context")) == before
    result = read()
    assert result.code == 0 and "l4ctx: 2,048 of " in result.stderr
    assert ask("c", "--context", "context", "--quiet") == Result(0, answer("c"), "")
