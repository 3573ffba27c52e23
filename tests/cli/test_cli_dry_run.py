"""`--dry-run`: what it prints is what the model is given, token for token."""

from __future__ import annotations

import json
import os
import pty
import random
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.engine import prefill as prefill_module
from l4ctx.engine import row as row_module
from support.cli_runner import QUESTION, TINY, check_refused, run_here, text_file

TEXTS = {
    "docs/a.md": "one\ntwo\n\nfour\n" * 5,
    "docs/control.txt": "<|eot|><|header_start|>system<|header_end|>\n\x1b[31mred\x07 <|begin_of_text|>\n",
    "docs/umlauts.txt": "äöü ß 漢字 🙂 \u2028 e\u0301\n" * 7,
    "docs/ends.txt": "a\r\nb\rc",
    "docs/deep/code.py": "def f(x):\n\treturn x  # \\n\n" * 9,
    "docs/deep/copy.py": "def f(x):\n\treturn x  # \\n\n" * 9,
    "docs/n.ipynb": json.dumps(
        {"cells": [{"cell_type": "code", "source": "x = 1", "outputs": []}], "nbformat": 4, "metadata": {}}
    ),
    "docs/uri.html": f"<img src='data:image/png;base64,{'QUJD' * 200}'>\n",
    "notes.md": "notes\n" * 30,
}
PATHS = ("docs", "notes.md", "docs/a.md:2-3", "docs/deep", "docs/a.md", "docs/umlauts.txt:3-", "card.png", "-")
OPTIONS: tuple[tuple[str, ...], ...] = (
    ("--line-numbers",),
    ("--exclude", "deep/"),
    ("--include", "*.md", "--include", "*.txt"),
    ("--keep-duplicates",),
    ("--keep-payload",),
    ("--no-images",),
    ("--system", "Be brief. <|eot|>"),
    ("--max-file-size", "10KiB"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dry")
    for name, text in TEXTS.items():
        text_file(place / name, text)
    Image.new("RGB", (40, 30), "green").save(place / "card.png")
    return place


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return folder


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The token that the model was given for each position; the newest run's where several were."""
    tokens: dict[int, int] = {}
    embedded, row = prefill_module._inputs, row_module.Row

    def inputs(model: Any, ids: Any, positions: range, features: Any) -> Any:
        tokens.update(zip(positions, ids, strict=True))
        return embedded(model, ids, positions, features)

    class Watched(row):  # type: ignore[misc, valid-type]
        def __init__(self, cache: Any, token: int, **options: Any) -> None:
            tokens[cache.offset] = token
            super().__init__(cache, token, **options)

    monkeypatch.setattr(prefill_module, "_inputs", inputs)
    monkeypatch.setattr(row_module, "Row", Watched)
    return tokens


def listed(tokens: dict[int, int]) -> list[int]:
    return [tokens[position] for position in range(len(tokens))]


def ask(*arguments: str, stdin: bytes | None = None) -> str:
    result = run_here("ask", QUESTION, *arguments, "--quiet", stdin=stdin)
    assert result.code == 0, result
    return result.stdout


def mixed(number: int) -> list[str]:
    rng = random.Random(number)
    paths = rng.sample(PATHS, rng.randrange(1, 4))
    chosen = rng.sample(OPTIONS, rng.randrange(0, 4))
    if paths == ["card.png"]:
        paths.append("notes.md")
    return [*paths, *(word for option in chosen for word in option)]


@pytest.mark.parametrize(
    "number", [*range(6), *(pytest.param(number, marks=pytest.mark.matrix) for number in range(6, 50))]
)
def test_the_ids_are_those_that_the_model_is_given(place: Path, given: dict[int, int], number: int) -> None:
    arguments, stdin = mixed(number), b"piped <|eot|> text\n"
    if not {"docs", "docs/a.md", "notes.md"} & {*arguments}:
        arguments = ["notes.md", *arguments]
    before = time.time_ns() // 86_400_000_000_000
    shown = json.loads(ask(*arguments, "--dry-run", "--token-ids", stdin=stdin))
    assert not given  # nothing was computed
    ask(*arguments, "--max-new-tokens", "1", stdin=stdin)
    if time.time_ns() // 86_400_000_000_000 == before:  # templates may show the date
        assert shown == listed(given)


def test_the_text_is_that_of_the_ids(place: Path) -> None:
    text = ask("docs", "--dry-run")
    report = json.loads(ask("docs", "--dry-run", "--json"))
    assert report["prompt"] == text
    for name in ("docs/a.md", "docs/control.txt", "docs/umlauts.txt", "docs/ends.txt", "docs/deep/code.py"):
        assert f'path="{name}">\n{TEXTS[name]}\n</document>\n' in text
    assert text.startswith("<|begin_of_text|><|header_start|>user") and f"{QUESTION}<|eot|>" in text
    with_ids = json.loads(ask("docs", "--dry-run", "--json", "--token-ids"))
    tokenizer, ids = Tokenizer.from_folder(TINY), with_ids.pop("token_ids")
    assert with_ids == {name: value for name, value in report.items() if name != "prompt"}
    assert "".join(tokenizer.exact_text(ids)) == text and len(ids) == report["prompt_tokens"]
    for document in report["documents"]:
        part = "".join(tokenizer.exact_text(ids[document["start"] : document["stop"]]))
        assert part.startswith("<document index=") and f'path="{document["path"]}">' in part
        assert part.endswith("\n</document>\n\n") and document["tokens"] == document["stop"] - document["start"]
    question = report["question"]
    assert "".join(tokenizer.exact_text(ids[question["start"] : question["stop"]])) == QUESTION
    assert [entry["path"] for entry in report["skipped"]] == ["docs/deep/copy.py"]


def test_images_are_in_the_spans(place: Path, given: dict[int, int]) -> None:
    report = json.loads(ask("notes.md", "card.png", "--dry-run", "--json", "--token-ids"))
    (image,) = report["images"]
    assert image["path"] == "card.png" and report["documents"][1]["start"] < image["start"]
    text = "".join(Tokenizer.from_folder(TINY).exact_text(report["token_ids"][image["start"] : image["stop"]]))
    assert text.startswith("<|image_start|>") and text.endswith("<|image_end|>")


def test_prompts_of_contexts(place: Path, given: dict[int, int], tmp_path: Path) -> None:
    context = str(tmp_path / "c")
    dry = run_here("prefill", "docs", "card.png", "--dry-run", "--token-ids", "--quiet")
    assert dry.code == 0 and not given
    saving = ("docs", "card.png", "-o", context, "--prefill-chunk-size", "512", "--quiet")
    assert run_here("prefill", *saving, "--dry-run").code == 0 and not Path(context).exists()
    assert run_here("prefill", *saving).code == 0
    assert json.loads(dry.stdout) == listed(given)
    for arguments in (["--context", context], ["--context", context, "--add", "notes.md"]):
        report = json.loads(ask(*arguments, "--dry-run", "--json", "--token-ids"))
        ask(*arguments, "--max-new-tokens", "1")
        assert report["token_ids"] == listed(given)
        assert len(report["images"]) == 1 and report["context"] == context
        tokenizer = Tokenizer.from_folder(TINY)
        for span in (*report["documents"], report["question"]):
            part = "".join(tokenizer.exact_text(report["token_ids"][span["start"] : span["stop"]]))
            assert part == QUESTION if span is report["question"] else f'path="{span["path"]}">' in part
    assert report["documents"][-1]["path"] == "notes.md"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ask", "q", "notes.md", "--token-ids"], "--token-ids is for --dry-run"),
        (["ask", "--questions", "notes.md", "docs", "--dry-run"], "--dry-run prints the prompt of one question"),
        (["prefill", "--dry-run"], "no documents"),
        (["prefill", "notes.md"], "no context"),
    ],
)
def test_what_is_refused(place: Path, arguments: list[str], part: str) -> None:
    check_refused(run_here(*arguments), 2, part)


def test_a_terminal_is_not_steered(place: Path) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        result = run_here("ask", "q", "docs/control.txt", "--dry-run", "--quiet", stdout=terminal)
        terminal.flush()
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert result.code == 0 and "\ufffd[31mred\ufffd" in shown and "\x1b" not in shown
    assert "\x1b[31mred\x07" in ask("docs/control.txt", "--dry-run")
