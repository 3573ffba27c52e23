"""Recall maps: the sample model's, what is kept of a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4ctx.cli.tables.recall import recall_text
from l4ctx.evaluation.heat_map import heat_map, percent
from l4ctx.evaluation.needle import NeedleOptions, Result
from l4ctx.evaluation.recall import Cell, Recall
from support.cli_runner import check_refused, run_here, text_file
from support.places import TINY

SMALL = ("needle", "-m", str(TINY), "--lengths", "600,1200", "--depths", "3", "--trials", "1", "--dtype", "float32")


def run(*arguments: str) -> dict[str, Any]:
    result = run_here(*arguments, "--json")
    assert result.code == 0, result
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The answers of a run, and what it told."""
    file = tmp_path_factory.mktemp("needle") / "answers.jsonl"
    return file, run(*SMALL, "--resume", str(file))


def test_the_sample_model_finds_facts(kept: tuple[Path, dict[str, Any]]) -> None:
    file, found = kept
    assert found["all"]["asked"] == 6 and found["all"]["right"] >= 5
    assert [(cell["length"], cell["depth"][0]) for cell in found["cells"]][::3] == [(600, 0), (1200, 0)]
    for answer in found["answers"]:
        assert answer["right"] == (answer["expected"][0][0] in answer["answer"])
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {line["id"]: line for line in lines} == {answer["id"]: answer for answer in found["answers"]}


def test_what_is_kept_is_not_asked_again(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Also after a kill within a line; and a single answer that is missing is the one that is asked for."""
    file, found = kept
    content = file.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(content[:4]) + content[4][:20])
    again = run_here(*SMALL, "--resume", str(cut), "--json")
    assert "4 of 6 answers are in " in again.stderr and "1 text" in again.stderr, again
    assert json.loads(again.stdout)["answers"] == found["answers"]
    assert sorted(cut.read_bytes().splitlines()) == sorted(file.read_bytes().splitlines())
    picture = tmp_path / "map.svg"
    whole = run_here(*SMALL, "--resume", str(file), "-o", str(picture))
    assert "6 of 6 answers" in whole.stderr and "to read" not in whole.stderr
    assert "single: " in whole.stdout and "1.2K" in whole.stdout and picture.stat().st_size < 60_000
    more = run_here(*SMALL[:4], "600", *SMALL[5:], "--trials", "2", "--resume", str(file), "--json")
    assert "3 of 6 answers are in " in more.stderr
    other = run_here(*SMALL, "--resume", str(file), "--seed", "5", "--json")
    assert "already" not in other.stderr


def test_own_text_holds_the_facts(tmp_path: Path) -> None:
    text_file(tmp_path / "docs" / "a.txt", "The old wall by the harbor was painted again in spring.\n" * 9)
    (tmp_path / "docs" / "b.bin").write_bytes(bytes(range(256)))
    lengths = ("--lengths", "500", "--depths", "2", "--trials", "1", "--kv-dir", str(tmp_path))
    result = run_here("needle", str(tmp_path / "docs"), "-m", str(TINY), *lengths)
    assert result.code == 0 and "skipped docs/b.bin" in result.stderr, result
    assert "single: 2 of 2 found" in result.stdout


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path) -> None:
    check_refused(run_here("needle", "-m", str(TINY), "--lengths", "11M"), 4, "more than the model's 10,485,760")
    check_refused(run_here("needle", "-m", str(TINY), "--lengths", "4k,x"), 2, "--lengths")
    check_refused(run_here("needle", "-m", str(TINY), "--tasks", "single,two"), 2, "there is no 'two'")
    check_refused(run_here("needle", "-m", str(TINY), "--tasks", "all", "--lengths", "4k", "--quiet"), 2, "over half")
    check_refused(run_here("needle", "-m", str(TINY), "--lengths", "9", "--quiet"), 2, "over half")
    check_refused(run_here("needle", str(tmp_path), "-m", str(TINY)), 2, "nothing to read")
    large = ("--lengths", "1Mi", "--depths", "1", "--trials", "1", "--kv-host-memory", "1MiB", "--quiet")
    check_refused(run_here("needle", "-m", str(TINY), *large), 5, "--kv-host-memory")
    notes = str(text_file(tmp_path / "notes.txt", "not answers\n"))
    check_refused(run_here(*SMALL, "--resume", notes), 2, "name another file for --resume")
    assert Path(notes).read_text(encoding="utf-8") == "not answers\n"


def recall(lengths: int, wrong: int) -> Recall:
    options = NeedleOptions(tuple(2**number for number in range(10, 10 + lengths)), ("single",), 10, 1, 8)
    results = [
        Result(f"{length}/{depth}", "single", length, depth, 0, index * 10 + depth >= wrong, False, "", "", [], 1)
        for index, length in enumerate(options.lengths)
        for depth in range(10)
    ]
    return Recall(options, results)


def test_maps_fit_forty_columns_and_are_read_without_colours() -> None:
    text = recall_text(recall(11, 13), 40).plain
    assert all(len(line) <= 40 for line in text.splitlines()), text
    assert "single: 97 of 110 found (81-93 %)" in text and text.count("   0-10 %") == 2
    assert "\n   0-10 %    0    0  100" in text


def test_pictures_are_small_and_name_every_cell() -> None:
    svg = heat_map(recall(14, 3), "a<b").svg()
    assert len(svg) < 60_000 and svg.count("of 1 (") == 140 and "a&lt;b: single" in svg


def test_percentages_are_100_only_for_all() -> None:
    assert [percent(Cell(*of)) for of in ((0, 0), (0, 3), (1, 999), (998, 999), (999, 999))] == [
        "",
        "0",
        "1",
        "99",
        "100",
    ]
