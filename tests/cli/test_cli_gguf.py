"""Commands with a GGUF file as the model: the sample checkpoint's text model, and a vocabulary of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.cli_runner import ANSWER, DOCUMENT, QUESTION, Result, check_refused, run_here, text_file
from support.gguf_files import all_in, write_gguf, write_mmproj
from support.places import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tokenizer.json beside it, as its rule for digits has no name in GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", TINY, all_in("BF16"), with_tokenizer=True)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder / "tiny.gguf"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "doc.md", DOCUMENT)


def test_ask_answers_as_from_the_folder(model: Path) -> None:
    for named in (model, model.parent):
        assert run_here("ask", QUESTION, "doc.md", "--model", str(named), "--quiet") == Result(0, ANSWER, "")


def test_a_context_is_saved_and_belongs_to_the_file(model: Path, tmp_path: Path) -> None:
    made = run_here("prefill", "doc.md", "-o", "c", "--model", str(model), "--quiet")
    assert made.code == 0, made.stderr
    assert run_here("ask", QUESTION, "--context", "c", "--quiet") == Result(0, ANSWER, "")
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "tiny.gguf", TINY, all_in("Q8_0"))
    shutil.copy(TINY / "tokenizer.json", other)
    refused = run_here("ask", QUESTION, "--context", "c", "--model", str(other / "tiny.gguf"), "--quiet")
    check_refused(refused, 7, "weights")


def test_inspect_shows_types_and_what_is_assumed(model: Path) -> None:
    shown = run_here("inspect", str(model))
    assert shown.code == 0, shown.stdout
    for part in ("llama4 (GGUF)", "tensors in BF16", "tensors in F32", "assumed", "attention chunks of 8,192 tokens"):
        assert part in shown.stdout
    report = json.loads(run_here("inspect", str(model), "--json", "--verify").stdout)
    assert report["damage"] == [] and len(report["assumed"]) == 4 and report["vision"] is None
    assert report["weights"]["parameters"] == report["config"]["parameters"]
    assert report["stop_tokens"] == [2291, 2294, 2295] and report["chat_template"] is True


def test_inspect_names_damage(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    Path("cut.gguf").write_bytes(content[: len(content) // 2])
    shown = run_here("inspect", "cut.gguf")
    assert shown.code == 3 and "truncated: tensor" in shown.stdout
    check_refused(run_here("ask", QUESTION, "doc.md", "--model", "cut.gguf"), 3, "truncated: tensor")


def test_plan_counts_the_weights_of_the_file(model: Path) -> None:
    for arguments in (("--tokens", "1000"), ("doc.md",)):
        planned = run_here("plan", *arguments, "--model", str(model), "--json")
        assert planned.code == 0, planned.stderr
        weights = json.loads(planned.stdout)["plan"]["weights"]
        assert abs(weights / model.stat().st_size - 1) < 0.2


def test_images_need_a_vision_tower(model: Path) -> None:
    shutil.copy(TINY.parent / "documents" / "cards.png", "card.png")
    check_refused(run_here("ask", QUESTION, "card.png", "--model", str(model)), 2, "its mmproj file is not beside it")


def test_images_are_read_with_the_vision_tower_beside(model: Path) -> None:
    Path("m").mkdir()
    for name in ("tiny.gguf", "tokenizer.json"):
        shutil.copy(model.parent / name, "m")
    write_mmproj(Path("m/mmproj-tiny-F32.gguf"), TINY)
    shutil.copy(TINY.parent / "documents" / "cards.png", "card.png")
    question = "What is the access code for the amber falcon?"
    answers = [
        run_here("ask", question, "card.png", "--model", named, "--quiet", "--max-new-tokens", "24")
        for named in ("m/tiny.gguf", str(TINY))
    ]
    assert answers[0] == answers[1] and answers[0].code == 0 and answers[0].stdout
    report = json.loads(run_here("inspect", "m", "--json").stdout)
    assert report["damage"] == [] and report["vision"]["has_tensors"] and report["weights"]["shards"] == 2
