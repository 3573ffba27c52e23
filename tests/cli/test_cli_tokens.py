"""`l4ctx tokens`: counts by document before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from l4ctx.run.token_counts import Folder
from support.cli_runner import TINY, changed_checkpoint, check_refused, run_here, text_file

FILES = {"docs/a.md": 40, "docs/deep/b.md": 120, "docs/deep/c.md": 10, "docs/deep/deeper/d.md": 5, "e.md": 90}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five documents and an image, and a checkpoint without weights."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    monkeypatch.setenv("L4CTX_MODEL", str(model))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, lines in FILES.items():
        text_file(Path(name), f"words of {name}\n" * lines)
    return tmp_path


def counted(*arguments: str) -> dict[str, Any]:
    result = run_here("tokens", *arguments, "--json", "--quiet")
    assert (result.code, result.stderr) == (0, ""), result
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def test_a_table_has_the_largest_first(place: Path) -> None:
    result = run_here("tokens", "docs", "e.md", "--quiet")
    assert (result.code, result.stderr) == (0, "")
    head, *rows, total = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert head == ["tokens", "share", "document"]
    by_size = sorted(FILES, key=lambda name: -FILES[name])
    assert [row[2] for row in rows] == by_size and total[1:] == ["100%", "5 documents"]
    counts = [int(row[0].replace(",", "")) for row in rows]
    assert counts == sorted(counts, reverse=True) and sum(counts) == int(total[0].replace(",", ""))
    report = counted("docs", "e.md")
    assert {entry["path"]: entry["tokens"] for entry in report["documents"]} == dict(zip(by_size, counts, strict=True))
    assert report["tokens"] == sum(counts) < report["prompt_tokens"]


def test_the_same_as_plan_counts_and_a_prompt_has(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30), "green").save("card.png")
    report = counted("docs", "card.png")
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    plan = json.loads(run_here("plan", "docs", "card.png", "--json", "--quiet").stdout)
    assert (report["documents"], report["prompt_tokens"]) == (plan["documents"], plan["prompt_tokens"])
    exact = json.loads(run_here("prefill", "docs", "card.png", "--dry-run", "--json", "--quiet").stdout)
    assert report["documents"] == [{"path": each["path"], "tokens": each["tokens"]} for each in exact["documents"]]


def test_a_tree_has_the_sums_of_folders(place: Path) -> None:
    tokens = {entry["path"]: entry["tokens"] for entry in counted("docs", "e.md")["documents"]}
    deep = sum(count for name, count in tokens.items() if name.startswith("docs/deep/"))
    expected = [
        (sum(tokens.values()), "5 documents"),
        (tokens["docs/a.md"] + deep, "docs/"),
        (deep, "  deep/"),
        (tokens["docs/deep/b.md"], "    b.md"),
        (tokens["docs/deep/c.md"], "    c.md"),
        (tokens["docs/deep/deeper/d.md"], "    deeper/"),
        (tokens["docs/deep/deeper/d.md"], "      d.md"),
        (tokens["docs/a.md"], "  a.md"),
        (tokens["e.md"], "e.md"),
    ]
    width = len(f"{expected[0][0]:,}")
    assert run_here("tokens", "docs", "e.md", "--tree", "-q").stdout == "".join(
        f"{count:{width},}  {name}\n" for count, name in expected
    )


def test_more_than_the_model_has_positions_for_is_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = changed_checkpoint(place / "short", max_position_embeddings=512)
    monkeypatch.setenv("L4CTX_MODEL", str(short))
    result = run_here("tokens", "docs", "e.md")
    assert result.code == 0 and "more than the model's 512 positions" in result.stderr
    assert result.stdout == run_here("tokens", "docs", "e.md", "--quiet").stdout


def test_what_is_refused_and_left_out(place: Path) -> None:
    check_refused(run_here("tokens"), 2, "no documents: l4ctx tokens PATH")
    check_refused(run_here("tokens", "none"), 2, "none: no such file or folder")
    shutil.copy("e.md", "docs/z.md")
    shutil.copy("e.md", "docs/y.md")
    result = run_here("tokens", "docs", "--exclude", "deep/")
    assert "skipped docs/z.md: the same content as docs/y.md" in result.stderr
    assert "skipped 1 as --include and --exclude say" in result.stderr and "2 documents" in result.stdout
    piped = run_here("tokens", "-q", stdin=b"some words\n")
    assert piped.code == 0 and piped.stdout.splitlines()[1].endswith("stdin")


def test_sums_of_folders() -> None:
    top = Folder()
    for source, tokens in (("a/b/c", 3), ("a/d", 4), ("e", 5)):
        top.add(source.split("/"), tokens)
    assert (top.tokens, top.number, top.documents) == (12, 3, {"e": 5})
    assert (top.folders["a"].tokens, top.folders["a"].folders["b"].documents) == (7, {"c": 3})
